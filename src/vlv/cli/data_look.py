"""``vlv data check`` and ``stats``: look at a collection and change nothing."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated

import typer

from vlv.cli import common
from vlv.cli.data_shards import CollectionOptions, EngineOptions
from vlv.cli.options import options, takes_options


@options
class CheckOptions:
    """Options of ``vlv data check``."""

    source: CollectionOptions
    report: Annotated[
        Path | None, typer.Option(help="Also write every problem as a line of this FILE.jsonl.")
    ] = None
    engine: EngineOptions


@takes_options
def check(given: CheckOptions) -> int:
    """Decode every record, compare it with the index of its shards, and name what is wrong; exit code 2 if anything is."""
    from vlv.curation.check import check as run
    from vlv.storage import check_writable

    check_writable(given.report)
    with common.Progress(unit="part") as progress, given.engine.make() as runner:
        found = run(given.source.inputs, runner, progress.stage, given.source.image_root)
    typer.echo(found.table())
    if given.report is not None:
        found.write(given.report)
    return found.exit_code


@options
class StatsOptions:
    """Options of ``vlv data stats``."""

    source: CollectionOptions
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="FILE.html; FILE.json with all figures goes beside it."
        ),
    ]
    tokenizer: Annotated[
        list[str],
        typer.Option(
            help="Counts the lengths: words, vlv-tiny, a folder or OWNER/NAME on the hub (repeatable)."
        ),
    ] = field(default_factory=lambda: ["words", common.SHIPPED_MODEL])
    samples: Annotated[int, typer.Option(min=0, help="Images on the page.")] = 24
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Image collection"
    seed: common.Seed = 0
    engine: EngineOptions


@takes_options
def stats(given: StatsOptions) -> int:
    """Describe a collection on one HTML page: caption lengths beside the paper's, words, repetition, sizes, images."""
    from vlv.curation.stats import collect, to_json
    from vlv.curation.stats_page import check_path, make_page, save

    check_path(given.output)
    with common.Progress(unit="part") as progress, given.engine.make() as runner:
        found = collect(
            given.source.inputs,
            runner,
            tokenizers=given.tokenizer,
            num_samples=given.samples,
            seed=given.seed,
            report=progress.stage,
            image_root=given.source.image_root,
        )
    save(given.output, make_page(found, given.source.inputs, given.title), to_json(found))
    for line in found.lines():
        typer.echo(line)
    common.say(f"-> {given.output}, {given.output.with_suffix('.json')}")
    return found.exit_code
