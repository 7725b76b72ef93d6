"""``vlv embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlv.cli import common


def embed(
    inputs: common.Inputs,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="FILE.safetensors; FILE.json goes beside it.")
    ],
    on_existing: Annotated[
        Literal["skip", "overwrite", "error"],
        typer.Option(help="What to do with a file that is there."),
    ] = "skip",
    store_dtype: Annotated[
        str, typer.Option(help="Of the stored numbers: float32, float16 or bfloat16.")
    ] = "float32",
    model: common.Model = common.SHIPPED_MODEL,
    revision: common.Revision = None,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
    offload: common.Offload = False,
    compiled: common.Compile = False,
    batch_size: common.BatchSize = 16,
    recursive: common.Recursive = True,
    limit: common.Limit = None,
    image_column: common.ImageColumn = None,
) -> int:
    """Save the caption embeddings of images: the tensor z, (images, queries, width)."""
    from vlv.jobs.embed import EmbedJob, EmbedSettings

    placement = common.placement(device, dtype, offload, compiled=compiled)
    job = EmbedJob(
        common.find_inputs(inputs, recursive, limit, image_column),
        EmbedSettings(model=model, revision=revision, dtype=store_dtype),
        output,
        on_existing,
    )
    with common.Progress(len(job.todo)) as progress:
        tally = job.run(
            lambda: common.load_pipeline(model, ["embed"], revision=revision, placement=placement),
            batch_size=batch_size,
            report=lambda batch: progress.report([item.error for item in batch]),
        )
    return common.close(tally, output)
