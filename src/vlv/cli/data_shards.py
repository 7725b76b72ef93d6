"""``vlv data filter``, ``pack`` and ``split``: any collection of images into tar shards with an index."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import typer
from tqdm import tqdm

from vlv.cli import common

if TYPE_CHECKING:
    from vlv.curation.job import ShardJob
    from vlv.curation.shards import ShardLimits

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
PerShard = Annotated[int, typer.Option(min=1, help="Most images of a shard.")]
ShardMb = Annotated[
    float | None,
    typer.Option(min=0.001, help="Most megabytes of images in a shard; no limit by default."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes; one for every processor by default.")
]
EngineName = Annotated[
    Literal["local", "ray"],
    typer.Option(help="Processes of this machine, or Ray Data (vlv[scale]): the same output."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        help="Of a running Ray cluster whose machines share the folders; else Ray starts here."
    ),
]
Config = Annotated[
    str,
    typer.Option("--config", "-c", help="Preset (paper, clean, relaxed) or YAML file of rules."),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Change one rule: --set short_side_above=255.")
]
Share = Annotated[float, typer.Option(min=0, max=1, help="Share of the images.")]


def filter_images(
    inputs: Inputs,
    output: Output,
    config: Config = "paper",
    change: Set = None,
    per_shard: PerShard = 1000,
    shard_mb: ShardMb = None,
    table: Annotated[
        bool,
        typer.Option(
            "--table", help="Filter Parquet tables of addresses by their columns, for img2dataset."
        ),
    ] = False,
    workers: Workers = None,
    engine: EngineName = "local",
    ray_address: RayAddress = None,
) -> int:
    """Keep the images that meet every rule, as tar shards with an index; say why the others were dropped.

    The rules are those of the paper by default. The folder also gets dropped.parquet (every image that was dropped,
    and why), summary.json and summary.svg.
    """
    from vlv.curation.job import ShardJob
    from vlv.curation.settings import load_filter

    rules = load_filter(config, change or ())
    if table:
        from vlv.curation.table_filter import TableJob

        job: ShardJob | TableJob = TableJob(inputs, output, rules)
    else:
        job = ShardJob(inputs, output, config=rules, limits=_limits(per_shard, shard_mb))
    return _run(job, engine, workers, ray_address)


def pack(
    inputs: Inputs,
    output: Output,
    per_shard: PerShard = 1000,
    shard_mb: ShardMb = None,
    workers: Workers = None,
    engine: EngineName = "local",
    ray_address: RayAddress = None,
) -> int:
    """Put every image of any inputs into tar shards of a wanted size, with an index."""
    from vlv.curation.job import ShardJob

    job = ShardJob(inputs, output, "pack", limits=_limits(per_shard, shard_mb))
    return _run(job, engine, workers, ray_address)


def split(
    inputs: Inputs,
    output: Output,
    train: Share = 0.98,
    val: Share = 0.01,
    test: Share = 0.01,
    radius: Annotated[
        int, typer.Option(min=0, max=16, help="Bits of 64 in which near duplicates differ at most.")
    ] = 4,
    seed: common.Seed = 0,
    per_shard: PerShard = 1000,
    shard_mb: ShardMb = None,
    workers: Workers = None,
    engine: EngineName = "local",
    ray_address: RayAddress = None,
) -> int:
    """Divide images into train, val and test by a hash of their content; near duplicates stay together.

    The shares are met on average: where an image goes depends on it and its near duplicates alone.
    """
    from vlv.curation.job import ShardJob
    from vlv.curation.settings import FilterConfig
    from vlv.curation.split import Split

    shares = {"train": train, "val": val, "test": test}
    shares = {name: share for name, share in shares.items() if share > 0}
    job = ShardJob(
        inputs,
        output,
        "split",
        FilterConfig(near_duplicates=radius),
        _limits(per_shard, shard_mb),
        Split(shares, radius, seed),
        keep_duplicates=True,
        options={"shares": shares, "seed": seed},
    )
    return _run(job, engine, workers, ray_address)


def _limits(per_shard: int, shard_mb: float | None) -> ShardLimits:
    from vlv.curation.shards import ShardLimits

    return ShardLimits(per_shard, None if shard_mb is None else int(shard_mb * 1e6))


def _run(job: object, engine: str, workers: int | None, ray_address: str | None) -> int:
    from vlv.curation.engine import make_engine

    with Bar() as bar, make_engine(engine, workers, ray_address) as runner:
        summary = job.run(runner, bar.report)  # type: ignore[attr-defined]
    typer.echo(summary.table())
    if summary.faults:
        common.say(
            f"{summary.faults} images or files are damaged; each is named in {job.output}/dropped.parquet"  # type: ignore[attr-defined]
        )
    return int(summary.exit_code)


class Bar:
    """A bar on stderr for each part of the work."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._what = ""

    def report(self, what: str, done: int, of: int) -> None:
        """So many of so many chunks or shards are done."""
        if what != self._what:
            self._close()
            self._what = what
            self._bar = tqdm(
                total=of, initial=done, desc=what, unit="part", disable=not sys.stderr.isatty()
            )
        elif self._bar is not None:
            self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._close()
        if kind is KeyboardInterrupt:
            common.say("what is done is kept; the same command goes on from there")
