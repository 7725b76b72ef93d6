"""``vlv embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlv.cli import common
from vlv.cli.options import options, takes_options


@options
class EmbedOptions:
    """Options of ``vlv embed``."""

    source: common.InputOptions
    output: Annotated[
        Path, typer.Option("--output", "-o", help="FILE.safetensors; FILE.json goes beside it.")
    ]
    on_existing: common.OnExisting = "skip"
    store_dtype: Annotated[
        str, typer.Option(help="Type of the stored numbers: float32, float16 or bfloat16.")
    ] = "float32"
    batch_size: common.BatchSize = 16
    model: common.ModelOptions


@takes_options
def embed(given: EmbedOptions) -> int:
    """Save the caption embeddings of images: the tensor z, (images, queries, width)."""
    from vlv.jobs.embed import EmbedJob, EmbedSettings

    placement = given.model.placement()
    job = EmbedJob(
        given.source.find(),
        EmbedSettings(given.model.model, given.model.revision, given.store_dtype),
        given.output,
        given.on_existing,
    )
    with common.Progress(len(job.todo)) as progress:
        tally = job.run(
            lambda: given.model.load(["embed"], placement),
            batch_size=given.batch_size,
            report=lambda batch: progress.report([item.error for item in batch]),
        )
    return common.close(tally, given.output)
