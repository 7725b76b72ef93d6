"""``vlv caption``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlv.cli import common

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlv.jobs.caption import CaptionJob
    from vlv.jobs.table import Row

Output = Annotated[
    str | None,
    typer.Option("--output", "-o", help="FILE.jsonl or FILE.parquet; - prints JSON lines."),
]
Sidecar = Annotated[
    str | None, typer.Option(help="Write a text file with this suffix beside each image: .txt")
]
OnExisting = Annotated[
    Literal["skip", "overwrite", "append", "error"],
    typer.Option(help="What to do with captions that are there already."),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(help="Longest caption, in tokens; by default 300, or as many as the model has."),
]
NumBeams = Annotated[int, typer.Option(help="Beams of the search; 1 is greedy.")]
Temperature = Annotated[float | None, typer.Option(help="Draw the tokens at this temperature.")]
EarlyStopping = Annotated[
    bool, typer.Option("--early-stopping", help="End the search with the first finished beams.")
]
Tidy = Annotated[
    bool | None,
    typer.Option(help="Drop repeated and unfinished sentences; by default where a model needs it."),
]
TopP = Annotated[float | None, typer.Option(help="Draw among the likeliest tokens only.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list what would be captioned.")]


def caption(
    inputs: common.Inputs,
    output: Output = None,
    sidecar: Sidecar = None,
    on_existing: OnExisting = "skip",
    model: common.Model = common.SHIPPED_MODEL,
    revision: common.Revision = None,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
    offload: common.Offload = False,
    llm_bits: common.LLMBits = None,
    compiled: common.Compile = False,
    batch_size: common.BatchSize = 8,
    max_new_tokens: MaxNewTokens = None,
    num_beams: NumBeams = 1,
    early_stopping: EarlyStopping = False,
    tidy: Tidy = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    recursive: common.Recursive = True,
    limit: common.Limit = None,
    image_column: common.ImageColumn = None,
    dry_run: DryRun = False,
    seed: common.Seed = 0,
) -> int:
    """Describe images in words.

    Captions go to stdout, or to a table (--output), or to text files beside the images (--sidecar).
    An interrupted run goes on where it stopped when the same command is given again.
    """
    from vlv.jobs.caption import CaptionJob, CaptionSettings

    where = common.placement(device, dtype, offload, llm_bits=llm_bits, compiled=compiled)
    load = partial(common.load_pipeline, model, ["caption"], revision=revision, placement=where)
    table = None if output in {None, "-"} else Path(str(output))
    job = CaptionJob(
        common.find_inputs(inputs, recursive, limit, image_column),
        CaptionSettings(
            model,
            revision,
            max_new_tokens,
            num_beams,
            temperature,
            top_p,
            seed,
            early_stopping=early_stopping,
            tidy=tidy,
            dtype=common.dtype_name(where),
            llm_bits=where.llm_bits,
        ),
        output=table,
        sidecar=sidecar,
        on_existing=on_existing,
    )
    if dry_run:
        return _list(job)
    printer = _Printer(job, as_json=output == "-", silent=bool(table or sidecar))
    with printer.progress:
        tally = job.run(load, batch_size=batch_size, report=printer.report)
    return common.close(tally, table)


def _list(job: CaptionJob) -> int:
    from vlv.jobs.inputs import file_name

    for record in job.todo:
        typer.echo(file_name(record))
    common.say(f"dry run: {len(job.todo)} to caption, {job.skipped} already done")
    return 0


class _Printer:
    """Shows rows as they come: captions on stdout where asked for, failures and progress on stderr."""

    def __init__(self, job: CaptionJob, *, as_json: bool, silent: bool) -> None:
        self._as_json, self._silent = as_json, silent and not as_json
        self._single = len(job.todo) == 1
        self.progress = common.Progress(len(job.todo), resumable=silent)

    def report(self, rows: Sequence[Row]) -> None:
        self.progress.report([row["error"] for row in rows])
        for row in () if self._silent else rows:
            self._print(row)

    def _print(self, row: Row) -> None:
        if self._as_json:
            typer.echo(json.dumps(row, ensure_ascii=False))
        elif row["error"] is None:
            text = " ".join(row["caption"].split())
            typer.echo(text if self._single else f"{row['file_name']}\t{text}")
