"""``vlv data check`` and ``stats``: look at a collection and change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlv.cli import common
from vlv.cli.data_shards import Bar, EngineName, Inputs, RayAddress, Workers


def check(
    inputs: Inputs,
    report: Annotated[
        Path | None, typer.Option(help="Also write every problem as a line of this FILE.jsonl.")
    ] = None,
    workers: Workers = None,
    engine: EngineName = "local",
    ray_address: RayAddress = None,
) -> int:
    """Decode every record, compare it with the index of its shards, and name what is wrong; exit code 2 if anything is."""
    from vlv.curation.check import check as run
    from vlv.curation.engine import make_engine

    with Bar() as bar, make_engine(engine, workers, ray_address) as runner:
        found = run(inputs, runner, bar.report)
    typer.echo(found.table())
    if report is not None:
        found.write(report)
    return found.exit_code


def stats(
    inputs: Inputs,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="FILE.html; FILE.json with all figures goes beside it."
        ),
    ],
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(
            help="Counts the lengths: words, vlv-tiny, a folder or OWNER/NAME on the hub (repeatable); "
            "words and vlv-tiny by default."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Images on the page.")] = 24,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Image collection",
    seed: common.Seed = 0,
    workers: Workers = None,
    engine: EngineName = "local",
    ray_address: RayAddress = None,
) -> int:
    """Describe a collection on one HTML page: caption lengths beside the paper's, words, repetition, sizes, images."""
    from vlv.curation.engine import make_engine
    from vlv.curation.stats import collect, to_json
    from vlv.curation.stats_page import check_path, make_page, save

    check_path(output)
    names = tokenizer or ["words", common.SHIPPED_MODEL]
    with Bar() as bar, make_engine(engine, workers, ray_address) as runner:
        found = collect(
            inputs, runner, tokenizers=names, num_samples=samples, seed=seed, report=bar.report
        )
    save(output, make_page(found, inputs, title), to_json(found))
    for line in found.lines():
        typer.echo(line)
    common.say(f"-> {output}, {output.with_suffix('.json')}")
    return found.exit_code
