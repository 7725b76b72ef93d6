"""``vlv data filter``, ``pack`` and ``split``: any collection of images into tar shards with an index."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlv.cli import common
from vlv.cli.options import option_group, options, takes_options

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from vlv.curation.engine import Engine
    from vlv.curation.job import ShardJob
    from vlv.curation.shards import ShardLimits
    from vlv.curation.table_filter import TableJob

Inputs = Annotated[
    list[str],
    typer.Argument(
        help="Folders, images, globs, .tar shards, .parquet or .jsonl tables, saved Hugging Face datasets or "
        "hf:OWNER/NAME[:SPLIT], the output of img2dataset."
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder to write; goes on where it was.")
]
Share = Annotated[float, typer.Option(min=0, max=1, help="Share of the images.")]


@option_group("Images")
class CollectionOptions:
    """Which images."""

    inputs: Inputs
    image_root: common.ImageRoot = None


@option_group("Shards")
class ShardOptions:
    """How large shards are."""

    per_shard: Annotated[int, typer.Option(min=1, help="Most images in a shard.")] = 1000
    shard_mb: Annotated[
        float | None,
        typer.Option(min=0.001, help="Most megabytes of images in a shard; no limit by default."),
    ] = None

    def limits(self) -> ShardLimits:
        """The largest shard."""
        from vlv.curation.shards import ShardLimits

        size = None if self.shard_mb is None else int(self.shard_mb * 1e6)
        return ShardLimits(self.per_shard, size)


@option_group("Processes")
class EngineOptions:
    """Who does the work."""

    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Processes; one per processor by default.")
    ] = None
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help=r"Processes of this machine, or Ray Data (vlv\[scale]): same output."),
    ] = "local"
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Address of a running Ray cluster whose machines share the folders; else Ray starts here."
        ),
    ] = None

    def make(self) -> AbstractContextManager[Engine]:
        """The engine that runs the work."""
        from vlv.curation.engine import make_engine

        return make_engine(self.engine, self.workers, self.ray_address)


@options
class FilterOptions:
    """Options of ``vlv data filter``."""

    source: CollectionOptions
    output: Output
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            "-c",
            help="Preset (relaxed, clean, paper) or YAML file of rules; relaxed by default, for --table paper.",
        ),
    ] = None
    change: Annotated[
        list[str],
        typer.Option("--set", help="Change one rule: --set short_side_above=255 (repeatable)."),
    ] = field(default_factory=list)
    table: Annotated[
        bool,
        typer.Option(
            "--table", help="Filter Parquet tables of addresses by their columns, for img2dataset."
        ),
    ] = False
    shards: ShardOptions
    engine: EngineOptions


@takes_options
def filter_images(given: FilterOptions) -> int:
    """Keep the images that meet every rule, as tar shards with an index; say why the others were dropped.

    The default rules fit any folder of images: they drop what is damaged, empty, tiny, very elongated, crushed or there
    twice. The folder also gets dropped.parquet (every image that was dropped, and why), summary.json and summary.svg.
    """
    from vlv.curation.job import ShardJob
    from vlv.curation.settings import load_filter
    from vlv.errors import ConfigError

    preset = given.config or ("paper" if given.table else "relaxed")
    rules = load_filter(preset, given.change)
    source = given.source
    if given.table:
        if source.image_root is not None:
            raise ConfigError("--image-root has no effect with --table, which opens no image")
        from vlv.curation.table_filter import TableJob

        job: ShardJob | TableJob = TableJob(source.inputs, given.output, rules)
    else:
        limits, root = given.shards.limits(), source.image_root
        job = ShardJob(source.inputs, given.output, config=rules, limits=limits, image_root=root)
    return _run(job, given.engine)


@options
class PackOptions:
    """Options of ``vlv data pack``."""

    source: CollectionOptions
    output: Output
    shards: ShardOptions
    engine: EngineOptions


@takes_options
def pack(given: PackOptions) -> int:
    """Put every image of any inputs into tar shards of a wanted size, with an index."""
    from vlv.curation.job import ShardJob

    limits, source = given.shards.limits(), given.source
    job = ShardJob(source.inputs, given.output, "pack", limits=limits, image_root=source.image_root)
    return _run(job, given.engine)


@options
class SplitOptions:
    """Options of ``vlv data split``."""

    source: CollectionOptions
    output: Output
    train: Share = 0.98
    val: Share = 0.01
    test: Share = 0.01
    radius: Annotated[
        int, typer.Option(min=0, max=16, help="Bits of 64 in which near duplicates differ at most.")
    ] = 4
    seed: common.Seed = 0
    shards: ShardOptions
    engine: EngineOptions


@takes_options
def split(given: SplitOptions) -> int:
    """Divide images into train, val and test by a hash of their content; near duplicates stay together.

    The shares are met on average: where an image goes depends on it and its near duplicates alone.
    """
    from vlv.curation.decide import Split
    from vlv.curation.job import ShardJob
    from vlv.curation.settings import FilterConfig

    shares = {"train": given.train, "val": given.val, "test": given.test}
    shares = {name: share for name, share in shares.items() if share > 0}
    job = ShardJob(
        given.source.inputs,
        given.output,
        "split",
        FilterConfig(near_duplicates=given.radius),
        given.shards.limits(),
        Split(shares, given.radius, given.seed),
        keep_duplicates=True,
        options={"shares": shares, "seed": given.seed},
        image_root=given.source.image_root,
    )
    return _run(job, given.engine)


def _run(job: ShardJob | TableJob, engine: EngineOptions) -> int:
    with common.Progress(unit="part") as progress, engine.make() as runner:
        summary = job.run(runner, progress.stage)
    typer.echo(summary.table())
    if summary.faults:
        common.say(
            f"{summary.faults} images or files are damaged; each is named in {job.output}/dropped.parquet"
        )
    return int(summary.exit_code)
