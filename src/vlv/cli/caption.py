"""``vlv caption``."""

from __future__ import annotations

import json
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlv.cli import common, shared
from vlv.cli.engine import EngineOptions
from vlv.cli.options import option_group, options, takes_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlv.jobs.caption import CaptionJob, CaptionOutput
    from vlv.jobs.caption_settings import CaptionSettings
    from vlv.jobs.formats import Row
    from vlv.models.folder import Task
    from vlv.models.placement import Placement


@option_group("Output")
class OutputOptions:
    """Where captions go."""

    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="FILE.jsonl, FILE.parquet, FILE.csv, or the folder of a --format; - prints JSON lines. Another folder, "
            "or the URL of one, is shared by many workers.",
        ),
    ] = None
    format: Annotated[
        Literal["table", "webdataset", "imagefolder"],
        typer.Option(
            help="webdataset packs images and captions into tar shards, imagefolder writes metadata.jsonl into the "
            "folder of the images; both beside captions.jsonl, the table."
        ),
    ] = "table"
    sidecar: Annotated[
        str | None,
        typer.Option(help="Write a text file with this suffix beside each image: .txt"),
    ] = None
    on_existing: Annotated[
        Literal["skip", "overwrite", "append", "error"],
        typer.Option(help="What to do with captions that exist already."),
    ] = "skip"
    on_changed: Annotated[
        Literal["skip", "redo"],
        typer.Option(help="What to do with an image that changed since it was captioned."),
    ] = "skip"
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be captioned.")
    ] = False

    @property
    def prints(self) -> bool:
        """Whether captions go to stdout alone."""
        return self.output in {None, "-"} and self.sidecar is None

    def checked(self) -> CaptionOutput:
        """Where captions go, for the job."""
        from vlv.jobs.caption import CaptionOutput

        path = None if self.output in {None, "-"} else Path(str(self.output))
        return CaptionOutput(path, self.format, self.sidecar, self.on_existing, self.on_changed)


@option_group("Instruction")
class InstructionOptions:
    """What kind of captions is wanted of a model that was taught several."""

    style: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="Style of the captions, of those that vlv info lists (repeatable: a column for each).",
        ),
    ] = field(default_factory=list)
    prompt: Annotated[
        str | None, typer.Option(help="What is wanted instead, in words of your own.")
    ] = None
    context_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Field of tables and .json files that tells what is known about an image, such as tags or a name; caption "
            "is the text beside it. For a model that was taught to use it (vlv info).",
        ),
    ] = None
    json_schema: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=r"JSON schema that captions follow; a model writes good JSON where it was taught to (vlv\[json]).",
        ),
    ] = None
    words: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Length of the captions, of a model that was taught lengths (vlv info).",
        ),
    ] = None


@option_group("Instruction")
class WordOptions:
    """Words that captions must or must not have."""

    include: Annotated[
        list[str],
        typer.Option(
            metavar="WORD",
            help="A word or phrase that captions should have (repeatable): one that lacks it is written again with the word "
            "made more likely; the column missing_words tells what could not be had.",
        ),
    ] = field(default_factory=list)
    exclude: Annotated[
        list[str],
        typer.Option(
            metavar="WORD",
            help="A word or phrase that captions must not have, in capitals or not (repeatable); a plural is another word.",
        ),
    ] = field(default_factory=list)


@option_group("Decoding")
class DecodingOptions:
    """How captions are decoded."""

    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest caption in tokens; by default 300, or as many as the model has."
        ),
    ] = None
    num_beams: Annotated[int, typer.Option(help="Beams of the search; 1 is greedy.")] = 1
    early_stopping: Annotated[
        bool,
        typer.Option("--early-stopping", help="End the search with the first finished beams."),
    ] = False
    tidy: Annotated[
        bool | None,
        typer.Option(
            help="Drop repeated and unfinished sentences; by default where a model needs it."
        ),
    ] = None
    temperature: Annotated[
        float | None, typer.Option(help="Sample the tokens at this temperature.")
    ] = None
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens only.")] = (
        None
    )
    llm_bits: Annotated[
        int | None,
        typer.Option(help=r"8 or 4 bits for the language model's weights (vlv\[quant])."),
    ] = None
    seed: common.Seed = 0


@option_group("Verification")
class VerifyOptions:
    """How the frozen decoder checks captions."""

    verify: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Write N candidates for each image and keep the one that explains it best to the frozen decoder.",
        ),
    ] = None
    enough: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Write no more candidates once one explains this share of what the embedding itself explains: 1.",
        ),
    ] = None


@options
class CaptionOptions:
    """Options of ``vlv caption``."""

    source: common.InputOptions
    to: OutputOptions
    wording: common.WordingOptions
    max_words: Annotated[
        int | None,
        typer.Option(
            help="Cut captions to so many words, after a sentence if possible.",
            rich_help_panel=common.WORDING,
        ),
    ] = None
    wanted: InstructionOptions
    filters: WordOptions
    text: DecodingOptions
    check: VerifyOptions
    model: common.ModelOptions
    engine: EngineOptions
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Images processed together; auto doubles it while that is faster. Halved when memory is short.",
            rich_help_panel="Model and device",
        ),
    ] = "32"
    workers: shared.WorkerOptions

    def settings(self, dtype: str) -> CaptionSettings:
        """Everything that a caption depends on, besides the image."""
        from vlv.jobs.caption_settings import CaptionSettings

        return CaptionSettings(
            self.model.name,
            self.model.revision,
            self.text.max_new_tokens,
            self.text.num_beams,
            self.text.temperature,
            self.text.top_p,
            self.text.seed,
            early_stopping=self.text.early_stopping,
            tidy=self.text.tidy,
            dtype=dtype,
            llm_bits=self.text.llm_bits,
            verify=self.check.verify,
            enough=self.check.enough,
            engine=self.engine.engine,
            styles=tuple(self.wanted.style),
            prompt=self.wanted.prompt,
            words=self.wanted.words,
            schema=_read_schema(self.wanted.json_schema),
            context_column=self.wanted.context_column,
            include=tuple(self.filters.include),
            exclude=tuple(self.filters.exclude),
            wording=self.wording.wording(self.max_words),
        )


@takes_options
def caption(given: CaptionOptions) -> int:
    """Describe images in words.

    Captions go to stdout, or to a table (--output), or to text files beside the images (--sidecar).
    An interrupted run goes on where it stopped when the same command is given again.
    """
    from vlv.jobs.caption import CaptionJob, check_known
    from vlv.jobs.inputs import BatchSize

    size = BatchSize.parse(given.batch_size)
    placement = given.model.placement(llm_bits=given.text.llm_bits)
    settings = given.settings(common.dtype_name(placement))
    given.engine.settings()  # complain now
    if given.to.format == "table" and shared.is_shared(given.to.output, given.workers):
        return _share(given, settings, placement)
    output = given.to.checked()
    column = settings.context_column
    reads = column is not None or given.to.format == "webdataset"  # which keeps metadata
    records = given.source.find(detail="texts" if reads else "images")
    check_known(records, column)
    job = CaptionJob(records, settings, output)
    if given.to.dry_run:
        return _list(job)
    printer = _Printer(job, as_json=given.to.output == "-", silent=not given.to.prints)
    needed = _needed(settings)
    with printer.progress, given.engine.running() as attach:
        tally = job.run(
            lambda: attach(given.model.load(needed, placement)),
            batch_size=size,
            report=printer.report,
        )
    if printer.num_candidates:
        common.say(
            f"verified: {printer.num_candidates / max(tally.done, 1):.1f} candidates for each caption"
        )
    if printer.num_lacking:
        common.say(f"{printer.num_lacking} captions lack a word of --include")
    return common.close(tally, output.path)


def _read_schema(file: Path | None) -> str | None:
    from vlv.data.foreign import decode_text, read_file

    return None if file is None else decode_text(read_file(file), file)


def _needed(settings: CaptionSettings) -> list[Task]:
    return ["caption"] if settings.verify is None else ["caption", "generate"]


def _share(given: CaptionOptions, settings: CaptionSettings, placement: Placement) -> int:
    from vlv.jobs.shared.operators import CaptionShards

    to = given.to
    shared.refuse(
        limit=given.source.limit is not None,
        sidecar=to.sidecar is not None,
        on_existing=to.on_existing != "skip",
        on_changed=to.on_changed != "skip",
    )
    with given.engine.running() as attach:
        return shared.work_on(
            str(to.output),
            given.source.source(),
            CaptionShards(settings, given.batch_size),
            given.workers,
            given.model,
            _needed(settings),
            placement,
            attach=attach if given.engine.engine else None,
            dry_run=to.dry_run,
        )


def _list(job: CaptionJob) -> int:

    for record in job.todo:
        typer.echo(record.name)
    for _, why in job.refused:
        common.say(f"would fail: {why}")
    changed = f", {job.changed} changed since" if job.changed else ""
    common.say(f"dry run: {len(job.todo)} to caption, {job.skipped} already done{changed}")
    return 0


class _Printer:
    """Shows rows as they come: captions on stdout where asked for, failures and progress on stderr."""

    def __init__(self, job: CaptionJob, *, as_json: bool, silent: bool) -> None:
        self._as_json, self._silent = as_json, silent and not as_json
        self._single = len(job.todo) == 1
        styles = job.settings.style_columns.items()
        self._columns = [([style], column) for style, column in styles] or [([], "caption")]
        self.num_candidates = self.num_lacking = 0
        self.progress = common.Progress(len(job.todo) + len(job.refused), resumable=silent)

    def report(self, rows: Sequence[Row]) -> None:
        self.num_candidates += sum(row.get("n_candidates") or 0 for row in rows)
        self.num_lacking += sum(row.get("missing_words") is not None for row in rows)
        self.progress.report([row["error"] for row in rows])
        for row in () if self._silent else rows:
            self._print(row)

    def _print(self, row: Row) -> None:
        if self._as_json:
            typer.echo(json.dumps(row, ensure_ascii=False))
        elif row["error"] is None:
            name = [] if self._single else [row["file_name"]]
            for label, column in self._columns:
                typer.echo("\t".join([*name, *label, " ".join(row[column].split())]))
