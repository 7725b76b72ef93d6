"""``vlv reconstruct``, ``vlv generate`` and ``vlv mix``: the commands that make images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlv.cli import common
from vlv.cli.options import options, takes_options

Folder = Annotated[Path, typer.Option("--output", "-o", help="Folder for the PNG files.")]


@options
class ReconstructOptions:
    """Options of ``vlv reconstruct``."""

    source: common.InputOptions
    output: Folder
    sheet: Annotated[
        bool, typer.Option("--sheet", help="Also lay originals and results side by side.")
    ] = False
    on_existing: common.OnExisting = "skip"
    batch_size: common.BatchSize = 4
    sampling: common.SamplingOptions
    model: common.ModelOptions


@takes_options
def reconstruct(given: ReconstructOptions) -> int:
    """Reconstruct images from nothing but their caption embeddings."""
    from vlv.jobs.images import ReconstructJob

    placement = given.model.placement(given.sampling.vae)
    job = ReconstructJob(
        given.source.find(),
        given.sampling.settings(given.model),
        given.output,
        given.on_existing,
    )
    with common.Progress(len(job.todo) + len(job.refused)) as progress:
        tally = job.run(
            lambda: given.model.load(["reconstruct"], placement),
            batch_size=given.batch_size,
            report=progress.report,
        )
    if given.sheet:
        for path in job.write_sheets():
            typer.echo(path)
    return common.close(tally, given.output)


@options
class GenerateOptions:
    """Options of ``vlv generate``."""

    texts: Annotated[list[str], typer.Argument(help="Texts, each of which becomes an image.")]
    output: Folder
    negative: Annotated[str | None, typer.Option(help="Text of what the images must not show.")] = (
        None
    )
    on_existing: common.OnExisting = "skip"
    sampling: common.SamplingOptions
    model: common.ModelOptions


@takes_options
def generate(given: GenerateOptions) -> int:
    """Generate images from texts, with the same frozen decoder that reconstructs images."""
    from vlv.jobs.images import generate_files

    settings = given.sampling.settings(given.model)
    placement = given.model.placement(given.sampling.vae)
    paths, tally = generate_files(
        lambda: given.model.load(["generate"], placement),
        given.texts,
        given.output,
        settings,
        given.on_existing,
        given.negative,
    )
    for path in paths:
        typer.echo(path)
    if tally.truncated:
        common.say(
            f"note: {tally.truncated} of {len(given.texts)} texts are longer than the decoder reads and were cut"
        )
    return common.close(tally, given.output)


@options
class MixOptions:
    """Options of ``vlv mix``."""

    inputs: Annotated[
        list[str],
        typer.Argument(help="Two or more images, or caption embeddings that vlv embed wrote."),
    ]
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.png for the mixed image.")]
    keep: Annotated[
        str | None, typer.Option(help="Leading vectors to take of each image: 20,12")
    ] = None
    weights: Annotated[
        str | None, typer.Option(help="Share of each image, for average and slerp: .5,.5")
    ] = None
    mode: Annotated[
        Literal["concat", "average", "slerp"] | None,
        typer.Option(help="concat joins vectors; average and slerp blend them."),
    ] = None
    negative: Annotated[
        str | None,
        typer.Option(help="An image, or an embedding, that the result must not resemble."),
    ] = None
    on_existing: common.OnExisting = "skip"
    image_root: common.ImageRoot = None
    sampling: common.SamplingOptions
    model: common.ModelOptions


@takes_options
def mix(given: MixOptions) -> int:
    """Make one image from the caption embeddings of several.

    With --keep the leading vectors of each embedding are joined, as in the paper; with --weights the
    embeddings are blended.
    """
    from vlv.data.records import Columns
    from vlv.data.source import find_records
    from vlv.errors import ConfigError
    from vlv.jobs.images import MixSettings, mix_files

    columns = Columns(image_root=given.image_root)
    records = [r for name in given.inputs for r in find_records([name], columns=columns)]
    unwanted = [] if given.negative is None else [given.negative]
    negative = [r for name in unwanted for r in find_records([name], columns=columns)]
    if len(negative) > 1:
        raise ConfigError(f"{given.negative} holds {len(negative)} images; name one as negative")
    how = MixSettings.parse(len(records), given.keep, given.weights, given.mode)
    placement = given.model.placement(given.sampling.vae)
    made = mix_files(
        lambda: given.model.load(["reconstruct"], placement),
        records,
        given.output,
        how,
        given.sampling.settings(given.model),
        given.on_existing,
        next(iter(negative), None),
    )
    if not made:
        common.say("the same mix is there already; --on-existing overwrite makes it again")
    typer.echo(given.output)
    return 0
