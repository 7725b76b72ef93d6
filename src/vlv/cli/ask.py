"""``vlv ask``."""

from __future__ import annotations

import json
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlv.cli import common
from vlv.cli.options import options, takes_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlv.jobs.ask import Asked, AskJob
    from vlv.jobs.formats import Row


@options
class AskOptions:
    """Options of ``vlv ask``."""

    images: Annotated[
        str,
        typer.Argument(
            help="An image, a folder or a shard; or, without QUESTIONS, a table (.jsonl, .csv, .parquet) of images and questions."
        ),
    ]
    questions: Annotated[
        list[str], typer.Argument(help="Each is asked about every image.", show_default=False)
    ] = field(default_factory=list)
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="FILE.jsonl, FILE.parquet or FILE.csv; - prints JSON lines."
        ),
    ] = None
    on_existing: common.OnExisting = "skip"
    question_column: Annotated[
        str | None, typer.Option(help='Name of the question in a table; "question" by default.')
    ] = None
    image_column: Annotated[
        str | None, typer.Option(help="Name of the image in a table; the usual names by default.")
    ] = None
    image_root: common.ImageRoot = None
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens; 300 by default.")
    ] = None
    llm_bits: Annotated[
        int | None,
        typer.Option(help=r"8 or 4 bits for the language model's weights (vlv\[quant])."),
    ] = None
    model: common.ModelOptions
    batch_size: Annotated[
        str, typer.Option(metavar="N|auto", help="Questions answered together.")
    ] = "32"

    def find(self) -> list[Asked]:
        """What is asked about what."""
        from vlv.data.records import Columns
        from vlv.data.source import Source
        from vlv.errors import ConfigError
        from vlv.jobs.ask import ask_of_all, read_questions

        columns = Columns(self.image_column, image_root=self.image_root)
        if self.questions:
            if self.question_column is not None:
                raise ConfigError(
                    "--question-column has no effect beside questions on the command line; leave one out"
                )
            return ask_of_all(
                Source([self.images], columns, detail="images").records(), self.questions
            )
        if Path(self.images).suffix.lower() not in {".jsonl", ".csv", ".parquet"}:
            raise ConfigError(
                f'no question was asked; put it behind {self.images} in quotes: "How many cubes?", or name a table of questions'
            )
        return read_questions(Path(self.images), columns, self.question_column)


@takes_options
def ask(given: AskOptions) -> int:
    """Answer questions about images.

    Answers go to stdout, one of yes or no with the probability of yes, or to a table (--output). An interrupted run goes on
    where it stopped when the same command is given again. The model must have been taught to answer (vlv info).
    """
    from vlv.jobs.ask import AskJob, AskSettings
    from vlv.jobs.inputs import BatchSize

    size = BatchSize.parse(given.batch_size)
    placement = given.model.placement(llm_bits=given.llm_bits)
    settings = AskSettings(
        given.model.name,
        given.model.revision,
        given.max_new_tokens,
        common.dtype_name(placement),
        given.llm_bits,
    )
    prints = given.output in {None, "-"}
    output = None if prints else Path(str(given.output))
    job = AskJob(given.find(), settings, output, given.on_existing)
    printer = _Printer(job, as_json=given.output == "-", silent=not prints)
    with printer.progress:
        tally = job.run(
            lambda: given.model.load(["caption"], placement),
            batch_size=size,
            report=printer.report,
        )
    return common.close(tally, output)


class _Printer:
    """Shows answers as they come, failures and progress on stderr."""

    def __init__(self, job: AskJob, *, as_json: bool, silent: bool) -> None:
        self._as_json, self._silent = as_json, silent
        self._images = {asked.record.id for asked in job.todo}
        self._questions = {asked.question for asked in job.todo}
        self.progress = common.Progress(len(job.todo), unit="question", resumable=silent)

    def report(self, rows: Sequence[Row]) -> None:
        self.progress.report([row["error"] for row in rows])
        for row in () if self._silent else rows:
            if self._as_json:
                typer.echo(json.dumps(row, ensure_ascii=False))
            elif row["error"] is None:
                typer.echo(self._line(row))

    def _line(self, row: Row) -> str:
        """What tells the answers apart, the answer, and the probability of yes."""
        parts = [row["file_name"]] if len(self._images) > 1 else []
        parts += [row["question"]] if len(self._questions) > 1 else []
        parts.append(" ".join(row["answer"].split()))
        return "\t".join(parts + ([] if row["yes"] is None else [f"{row['yes']:.3f}"]))
