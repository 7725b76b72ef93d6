"""``vlv eval doubts``, ``best-of``, ``instruct``, ``words``, ``search`` and ``representation``: what a model does with rendered scenes, whose truth is known."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlv.cli import common
from vlv.cli.options import option_group, options, takes_options
from vlv.cli.toyworld import SplitName

if TYPE_CHECKING:
    from vlv.evaluation.experiments.scene_plan import ScenePlan
    from vlv.evaluation.results import Results


@option_group("Scenes")
class SceneOptions:
    """Which scenes a model is measured on, and what is kept of it."""

    split: Annotated[
        SplitName, typer.Option(help="Of the toy world; tune on val, measure on test.")
    ] = "test"
    num: Annotated[int, typer.Option(min=2, help="Scenes.")] = 2000
    seed: common.Seed = 1
    batch_size: common.BatchSize = 16
    evidence: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps what was found; an interrupted run goes on."),
    ] = None
    json_file: common.JsonFile = None

    def plan(self) -> ScenePlan:
        """The scenes."""
        from vlv.evaluation.experiments.scene_plan import ScenePlan

        return ScenePlan(self.split, self.num, self.seed, self.batch_size)

    @contextmanager
    def collecting(
        self, total: int | None = None, unit: str = "scene"
    ) -> Iterator[tuple[Path, Callable[[int], None]]]:
        """A folder for what is found, and the progress, which is told how much more is done."""
        progress = common.Progress(
            total or self.num, unit=unit, resumable=self.evidence is not None
        )
        with tempfile.TemporaryDirectory() as folder, progress:
            yield self.evidence or Path(folder), progress.advance

    def show(self, results: Results) -> None:
        """Print the figures, and write them to a file where one is named."""
        from vlv.evaluation.results import format_results
        from vlv.storage import write_json

        typer.echo(format_results(results))
        if self.json_file is not None:
            write_json(self.json_file, results.to_dict())
            common.say(f"written: {self.json_file}")


@options
class DoubtsOptions:
    """``vlv eval doubts``."""

    model: common.ModelOptions
    scenes: SceneOptions
    fit: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Fit the probabilities to these scenes and write them: MODEL/doubts.json.",
        ),
    ] = None
    calibration: Annotated[
        Path | None, typer.Option(help="Probabilities to measure; MODEL/doubts.json by default.")
    ] = None


@takes_options
def doubts(given: DoubtsOptions) -> int:
    """Caption rendered scenes, ask the frozen decoder which sentences are wrong, and measure how well it knows.

    Prints how the doubts rank sentences and claims (AUROC), whether their probabilities are calibrated, and what `vlv verify
    --fix` would gain. With --fit the probabilities are fit to the scenes first, and written.
    """
    from vlv.errors import ConfigError
    from vlv.evaluation.experiments.doubts import collect, fit_calibration, measure
    from vlv.models.calibration import Calibration
    from vlv.storage import check_writable, write_json

    if given.fit is not None and given.calibration is not None:
        raise ConfigError("--fit writes a calibration and --calibration reads one; leave one out")
    plan = given.scenes.plan()
    calibration = None if given.calibration is None else Calibration.load(given.calibration)
    check_writable(given.fit, given.scenes.json_file)
    pipe = given.model.load(["caption", "generate"])
    if given.fit is None and (calibration := calibration or pipe.calibration) is None:
        raise ConfigError(f"{given.model.model} has no doubts.json; write one with --fit FILE")
    with given.scenes.collecting() as (folder, report):
        cases = collect(pipe, plan, folder, report)
    if given.fit is not None:
        calibration = fit_calibration(cases, plan)
        write_json(given.fit, calibration.to_dict())
        common.say(f"written: {given.fit}")
    assert calibration is not None
    given.scenes.show(measure(cases, calibration, plan))
    return 0


@options
class BestOfOptions:
    """``vlv eval best-of``."""

    model: common.ModelOptions
    scenes: SceneOptions
    candidates: Annotated[int, typer.Option(min=2, help="Captions of each, N.")] = 16
    timesteps: Annotated[int, typer.Option(min=1, help="At which they are scored.")] = 3
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the samples.")] = 0.7
    rewards: Annotated[
        list[str],
        typer.Option(
            "--reward",
            help="Of stage 3, that chooses too: drawing, redrawing, context (repeatable).",
        ),
    ] = field(default_factory=list)


@takes_options
def best_of(given: BestOfOptions) -> int:
    """Write several captions of rendered scenes, and measure what it gains to choose among them.

    The frozen decoder (vlv caption --verify), the captioner's own log-probability and the truth choose among the first 2, 4, 8
    ... captions; the first is greedy, the others are samples.
    """
    from vlv.evaluation.experiments.best_of import BestOfPlan, collect, measure
    from vlv.storage import check_writable

    plan = BestOfPlan(
        **asdict(given.scenes.plan()),
        candidates=given.candidates,
        timesteps=given.timesteps,
        temperature=given.temperature,
        rewards=tuple(given.rewards),
    )
    check_writable(given.scenes.json_file)
    pipe = given.model.load(["caption", "generate"])
    with given.scenes.collecting() as (folder, report):
        rows = collect(pipe, plan, folder, report)
    given.scenes.show(measure(rows, plan))
    return 0


@options
class InstructOptions:
    """``vlv eval instruct``."""

    model: common.ModelOptions
    scenes: SceneOptions
    before: Annotated[
        str | None,
        typer.Option(help="A model whose plain captions are compared: that before the training."),
    ] = None


@takes_options
def instruct(given: InstructOptions) -> int:
    """Ask a model about rendered scenes for every style of captions and many answers, and measure how well it follows.

    Prints the share of captions in the style and of the length that was asked for, how many of their claims are right, the
    accuracy of answers by kind of question, and F1 of plain captions, with --before against those of another model.
    """
    from vlv.evaluation.experiments.instruct import collect, measure
    from vlv.storage import check_writable

    plan = given.scenes.plan()
    check_writable(given.scenes.json_file)
    pipe = given.model.load(["caption"])
    before = None
    if given.before is not None:
        before = common.load_pipeline(
            given.before, ["caption"], placement=given.model.placement(), yes=given.model.yes
        )
    with given.scenes.collecting() as (folder, report):
        rows = collect(pipe, before, plan, folder, report)
    given.scenes.show(measure(rows, plan))
    return 0


@options
class WordsOptions:
    """``vlv eval words``."""

    model: common.ModelOptions
    scenes: SceneOptions


@takes_options
def words(given: WordsOptions) -> int:
    """Exclude and include words in captions of rendered scenes, and measure whether it is done and what it does to the truth.

    Prints the share of excluded facts that stay out and of included words that are written, true and false ones, the claims that
    are right in each case, and the bias that it took. Any model will do.
    """
    from vlv.evaluation.experiments.words import collect, measure
    from vlv.storage import check_writable

    plan = given.scenes.plan()
    check_writable(given.scenes.json_file)
    pipe = given.model.load(["caption"])
    with given.scenes.collecting() as (folder, report):
        rows = collect(pipe, plan, folder, report)
    given.scenes.show(measure(rows, plan))
    return 0


@options
class SearchOptions:
    """``vlv eval search``."""

    model: common.ModelOptions
    scenes: SceneOptions
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
    fit: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Fit a search space to these scenes instead, and write it: MODEL/search.safetensors.",
        ),
    ] = None
    steps: Annotated[int, typer.Option(min=1, help="Of --fit.")] = 1000
    fit_batch: Annotated[
        int, typer.Option(min=2, help="Of --fit: scenes among which a text has to find its own.")
    ] = 128


@takes_options
def search(given: SearchOptions) -> int:
    """Index rendered scenes, search for them by text and by image, and measure how often the right ones are found.

    A text is answered by any scene that is all it says, an image by the same content in another style. Beside late interaction
    stand its first stage alone, and search among the model's own captions.
    """
    from vlv.evaluation.experiments.search import (
        Measured,
        SearchPlan,
        build,
        measure,
        write_captions,
    )
    from vlv.models.search_space import Space
    from vlv.storage import check_writable

    if given.fit is not None:
        return _fit_space(given, given.fit)
    plan = SearchPlan(
        **asdict(given.scenes.plan()),
        queries=given.queries,
        candidates=given.candidates,
        captions=given.captions,
    )
    check_writable(given.scenes.json_file)
    space = None if given.space is None else Space.load(given.space)
    pipe = given.model.load(["search", *(["caption"] if plan.captions else [])])  # type: ignore[list-item]
    total = plan.num * (2 if plan.captions else 1) + 5 * plan.queries
    with given.scenes.collecting(total, "step") as (folder, report):
        index = build(pipe, plan, folder, report, space)
        captions = write_captions(pipe, plan, folder, report) if plan.captions else None
        results = measure(Measured(index, plan, captions), report)
    given.scenes.show(results)
    return 0


def _fit_space(given: SearchOptions, file: Path) -> int:
    from vlv.evaluation.experiments.search import fit
    from vlv.storage import check_writable
    from vlv.training.search_space import FitPlan

    plan = given.scenes.plan()
    how = FitPlan(steps=given.steps, batch_size=given.fit_batch, seed=plan.seed)
    check_writable(file)
    pipe = given.model.load(["search"])
    with common.Progress(2 * plan.num + how.steps, unit="step", resumable=False) as progress:
        space = fit(pipe, plan, how, progress.advance)
    space.save(file)
    common.say(f"written: {file}")
    return 0


@options
class RepresentationOptions:
    """``vlv eval representation``."""

    model: common.ModelOptions
    scenes: SceneOptions
    train: Annotated[
        int, typer.Option(min=20, help="Further scenes, of the split train, that teach the probes.")
    ] = 2000
    queries: Annotated[
        int, typer.Option(min=1, help="Scenes for retrieval, and as many for arithmetic.")
    ] = 200


@takes_options
def representation(given: RepresentationOptions) -> int:
    """Ask linear probes what the vision tower, z, its context and the model's own caption know of rendered scenes.

    Beside the probes stand retrieval of the same content in another style, and arithmetic: the scene with a red cube, minus red,
    plus blue. The same scenes, the same number of principal components and a penalty chosen alike for all.
    """
    from vlv.evaluation.experiments.representation import (
        RepresentationPlan,
        Representer,
        num_images,
        study,
    )
    from vlv.storage import check_writable

    plan = RepresentationPlan(
        **asdict(given.scenes.plan()), train=given.train, queries=given.queries
    )
    check_writable(given.scenes.json_file)
    pipe = given.model.load(["search", "caption"])
    with given.scenes.collecting(num_images(plan), "image") as (folder, report):
        results = study(Representer(pipe, plan, folder, report))
    given.scenes.show(results)
    return 0
