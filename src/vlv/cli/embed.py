"""``vlv embed``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlv.cli import common, shared
from vlv.cli.options import options, takes_options

if TYPE_CHECKING:
    from vlv.jobs.embed import EmbedSettings


@options
class EmbedOptions:
    """Options of ``vlv embed``."""

    source: common.InputOptions
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="FILE.safetensors; FILE.json goes beside it. A folder, or the URL of one, is shared by many workers.",
        ),
    ]
    on_existing: common.OnExisting = "skip"
    store_dtype: Annotated[
        str, typer.Option(help="Type of the stored numbers: float32, float16 or bfloat16.")
    ] = "float32"
    batch_size: common.BatchSize = 32
    model: common.ModelOptions
    workers: shared.WorkerOptions


@takes_options
def embed(given: EmbedOptions) -> int:
    """Save the caption embeddings of images: the tensor z, (images, queries, width)."""
    from vlv.errors import OutputError
    from vlv.jobs.embed import EmbedJob, EmbedSettings

    settings = EmbedSettings(given.model.name, given.model.revision, given.store_dtype)
    if shared.is_shared(given.output, given.workers):
        return _share(given, settings)
    placement, output = given.model.placement(), Path(given.output)
    job = EmbedJob(given.source.find(), settings, output, given.on_existing)
    with common.Progress(len(job.todo)) as progress:
        tally = job.run(
            lambda: given.model.load(["embed"], placement),
            batch_size=given.batch_size,
            report=lambda batch: progress.report([item.error for item in batch]),
        )
    if job.is_empty:
        raise OutputError(f"none of the inputs could be embedded, so {output} is not written")
    return common.close(tally, output)


def _share(given: EmbedOptions, settings: EmbedSettings) -> int:
    from vlv.jobs.shared.operators import EmbedShards

    shared.refuse(limit=given.source.limit is not None, on_existing=given.on_existing != "skip")
    operator = EmbedShards(settings, given.batch_size)
    return shared.work_on(
        given.output,
        given.source.source(),
        operator,
        given.workers,
        given.model,
        ["embed"],
        given.model.placement(),
    )
