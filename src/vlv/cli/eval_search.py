"""``vlv eval search``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from vlv.cli import common
from vlv.cli.options import options, takes_options
from vlv.cli.toyworld import SplitName


@options
class SearchOptions:
    """``vlv eval search``."""

    model: common.ModelOptions
    split: Annotated[
        SplitName, typer.Option(help="Of the toy world; tune on val, measure on test.")
    ] = "test"
    num: Annotated[int, typer.Option(min=2, help="Scenes in the index.")] = 2000
    seed: common.Seed = 1
    queries: Annotated[
        int, typer.Option(min=1, help="Scenes that are searched for, by four texts and an image.")
    ] = 500
    candidates: Annotated[
        int, typer.Option(min=1, help="Images that are compared token by token.")
    ] = 300
    captions: Annotated[
        bool, typer.Option(help="Compare with search among the model's own captions.")
    ] = True
    space: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Search space; MODEL/search.safetensors by default."),
    ] = None
    batch_size: common.BatchSize = 32
    fit: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Fit a search space to these scenes instead, and write it: MODEL/search.safetensors.",
        ),
    ] = None
    steps: Annotated[int, typer.Option(min=1, help="Of --fit.")] = 1000
    evidence: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps index and captions; an interrupted run goes on."),
    ] = None
    json_file: common.JsonFile = None


@takes_options
def search(given: SearchOptions) -> int:
    """Index rendered scenes, search for them by text and by image, and measure how often the right ones are found.

    A text is answered by any scene that is all it says, an image by the same content in another style. Beside late interaction
    stand its first stage alone, and search among the model's own captions.
    """
    from vlv.cli.evaluate import show
    from vlv.evaluation.experiments.search import (
        Measured,
        SearchPlan,
        build,
        measure,
        write_captions,
    )
    from vlv.search.space import Space
    from vlv.storage import check_writable

    if given.fit is not None:
        return _fit_space(given, given.fit)
    plan = SearchPlan(
        given.split,
        given.num,
        given.seed,
        given.batch_size,
        queries=given.queries,
        candidates=given.candidates,
        captions=given.captions,
    )
    check_writable(given.json_file)
    space = None if given.space is None else Space.load(given.space)
    pipe = given.model.load(["search", *(["caption"] if plan.captions else [])])  # type: ignore[list-item]
    total = plan.num * (2 if plan.captions else 1) + 5 * plan.queries
    progress = common.Progress(total, unit="step", resumable=given.evidence is not None)
    with tempfile.TemporaryDirectory() as temporary, progress:
        folder = given.evidence or Path(temporary)
        index = build(pipe, plan, folder, progress.advance, space)
        captions = None
        if plan.captions:
            captions = write_captions(pipe, plan, folder, progress.advance)
        results = measure(Measured(index, plan, captions), progress.advance)
    show(results, given.json_file)
    return 0


def _fit_space(given: SearchOptions, file: Path) -> int:
    from vlv.evaluation.experiments.scene_plan import ScenePlan
    from vlv.evaluation.experiments.search import fit
    from vlv.storage import check_writable
    from vlv.training.projection import FitPlan

    plan = ScenePlan(given.split, given.num, given.seed, given.batch_size)
    how = FitPlan(steps=given.steps, seed=given.seed)
    check_writable(file)
    pipe = given.model.load(["search"])
    with common.Progress(plan.num + how.steps, unit="step", resumable=False) as progress:
        space = fit(pipe, plan, how, progress.advance)
    space.save(file)
    common.say(f"written: {file}")
    return 0
