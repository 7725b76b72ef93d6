"""``vlv reconstruct``, ``vlv generate`` and ``vlv mix``: the commands that draw images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlv.cli import common

Folder = Annotated[Path, typer.Option("--output", "-o", help="Folder for the PNG files.")]
MixMode = Literal["concat", "average", "slerp"]


def reconstruct(
    inputs: common.Inputs,
    output: Folder,
    sheet: Annotated[
        bool, typer.Option("--sheet", help="Also lay originals and results side by side.")
    ] = False,
    on_existing: Annotated[
        Literal["skip", "overwrite", "error"],
        typer.Option(help="What to do with images that are there."),
    ] = "skip",
    model: common.Model = common.SHIPPED_MODEL,
    revision: common.Revision = None,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
    offload: common.Offload = False,
    vae: common.VAE = "whole",
    compiled: common.Compile = False,
    batch_size: common.BatchSize = 4,
    steps: common.Steps = 20,
    guidance: common.Guidance = 2.0,
    sampler: common.Sampler = "dpm",
    recursive: common.Recursive = True,
    limit: common.Limit = None,
    image_column: common.ImageColumn = None,
    seed: common.Seed = 0,
) -> int:
    """Rebuild images from nothing but their caption embeddings."""
    from vlv.jobs.reconstruct import ReconstructJob, SampleSettings

    placement = common.placement(device, dtype, offload, vae, compiled=compiled)
    job = ReconstructJob(
        common.find_inputs(inputs, recursive, limit, image_column),
        SampleSettings(model, revision, steps, guidance, sampler, seed),
        output,
        on_existing,
    )
    with common.Progress(len(job.todo)) as progress:
        tally = job.run(
            lambda: common.load_pipeline(
                model, ["reconstruct"], revision=revision, placement=placement
            ),
            batch_size=batch_size,
            report=lambda batch: progress.report([item.error for item in batch]),
        )
    if sheet:
        for path in job.write_sheets():
            typer.echo(path)
    return common.close(tally, output)


def generate(
    texts: Annotated[list[str], typer.Argument(help="Texts, each of which becomes an image.")],
    output: Folder,
    model: common.Model = common.SHIPPED_MODEL,
    revision: common.Revision = None,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
    offload: common.Offload = False,
    vae: common.VAE = "whole",
    steps: common.Steps = 20,
    guidance: common.Guidance = 2.0,
    sampler: common.Sampler = "dpm",
    seed: common.Seed = 0,
) -> int:
    """Draw images from texts, with the same frozen decoder that rebuilds images."""
    from vlv.jobs.reconstruct import SampleSettings, generate_files

    settings = SampleSettings(model, revision, steps, guidance, sampler, seed)
    placement = common.placement(device, dtype, offload, vae)
    pipe = common.load_pipeline(model, ["generate"], revision=revision, placement=placement)
    paths, tally = generate_files(pipe, texts, output, settings)
    for path in paths:
        typer.echo(path)
    if tally.truncated:
        common.say(
            f"note: {tally.truncated} of {len(texts)} texts are longer than the decoder reads and were cut"
        )
    return common.close(tally, output)


def mix(
    inputs: Annotated[list[Path], typer.Argument(help="Two or more images.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.png for the mixed image.")],
    keep: Annotated[
        str | None, typer.Option(help="Leading vectors to take of each image: 20,12")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Share of each image, for average and slerp: .5,.5")
    ] = None,
    mode: Annotated[
        MixMode | None, typer.Option(help="concat joins vectors; average and slerp blend them.")
    ] = None,
    model: common.Model = common.SHIPPED_MODEL,
    revision: common.Revision = None,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
    offload: common.Offload = False,
    vae: common.VAE = "whole",
    steps: common.Steps = 20,
    guidance: common.Guidance = 2.0,
    sampler: common.Sampler = "dpm",
    seed: common.Seed = 0,
) -> int:
    """Draw one image from the caption embeddings of several.

    With --keep the leading vectors of each embedding are joined, as in the paper; with --weights the
    embeddings are blended.
    """
    from vlv.jobs.mix import MixSettings, mix_files
    from vlv.jobs.reconstruct import SampleSettings

    how = MixSettings.parse(len(inputs), keep, weights, mode)
    placement = common.placement(device, dtype, offload, vae)
    pipe = common.load_pipeline(model, ["reconstruct"], revision=revision, placement=placement)
    settings = SampleSettings(model, revision, steps, guidance, sampler, seed)
    mix_files(pipe, inputs, output, how, settings)
    typer.echo(output)
    return 0
