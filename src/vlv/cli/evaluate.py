"""``vlv eval``."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlv.cli import ablation, common, eval_search, experiments
from vlv.cli.engine import EngineOptions
from vlv.cli.options import option_group, options, takes_options
from vlv.cli.toyworld import SplitName

if TYPE_CHECKING:
    from vlv.evaluation.experiments.run import Run
    from vlv.evaluation.experiments.toyworld import Models, Plan
    from vlv.evaluation.results import Results

app = typer.Typer(name="eval", help="Measure a model.", no_args_is_help=True)
app.add_typer(experiments.predict)
app.command()(experiments.judge)
app.command()(experiments.score)
app.command()(experiments.rate)
app.command()(ablation.ablation)
app.command()(eval_search.search)
app.command()(experiments.report)
app.command()(experiments.results)


@app.callback()
def _group() -> None:
    """Measure a model: all of the toy world at once, or an experiment of the paper in three steps."""


@option_group("Models")
class ModelsOptions:
    """What is measured, and with what."""

    model: common.Model = common.SHIPPED_MODEL
    stage1: Annotated[
        str | None, typer.Option(help="The model before stage 2, to compare the reconstructions.")
    ] = None
    control: Annotated[
        str | None, typer.Option(help="A model trained without stage 1, to compare.")
    ] = None
    inspector: Annotated[
        Path | None, typer.Option(help="The inspector; MODEL/inspector by default.")
    ] = None
    device: common.Device = "auto"

    def load(self) -> Models:
        """All models, with all parts that they have."""
        from vlv.evaluation.experiments.backends import load_inspector
        from vlv.evaluation.experiments.toyworld import Models
        from vlv.models.pipeline import VLVPipeline

        device = common.quiet_device(self.device)

        def load(name: str) -> VLVPipeline:
            return VLVPipeline.from_pretrained(name).to(device)

        inspector = load_inspector(self.inspector or Path(self.model), device)
        stage1, control = (
            None if name is None else load(name) for name in (self.stage1, self.control)
        )
        return Models(load(self.model), inspector, stage1, control)


@option_group("Output")
class FigureOptions:
    """What is shown and written."""

    full: Annotated[
        bool, typer.Option("--full", help="Print every figure instead of the dozen that say most.")
    ] = False
    json_file: common.JsonFile = None
    records: Annotated[Path | None, typer.Option(help="Write one JSON line per scene.")] = None
    sheet: Annotated[Path | None, typer.Option(help="Write a PNG of the first scenes.")] = None

    @property
    def files(self) -> list[Path]:
        """What is to be written."""
        return [x for x in (self.json_file, self.records, self.sheet) if x is not None]

    def write(self, results: Results, run: Run) -> None:
        """Write the files that were asked for."""
        from vlv.evaluation.experiments.toyworld_scores import sample_rows
        from vlv.evaluation.report.page import example_sheet
        from vlv.jobs.pictures import write_png
        from vlv.storage import write_json, write_text

        if self.json_file is not None:
            write_json(self.json_file, results.to_dict())
        if self.records is not None:
            write_text(self.records, "".join(json.dumps(row) + "\n" for row in sample_rows(run)))
        if self.sheet is not None:
            write_png(self.sheet, example_sheet(run), results.settings)
        for path in self.files:
            common.say(f"written: {path}")


@options
class ToyworldOptions:
    """``vlv eval toyworld``."""

    models: ModelsOptions
    num: Annotated[int, typer.Option(min=2, help="Scenes to render and measure on.")] = 2000
    seed: common.Seed = 0
    sections: Annotated[
        str | None, typer.Option(help="Comma-separated: vae,inspector,teacher,...; all by default.")
    ] = None
    steps: common.Steps = 20
    guidance: common.Guidance = 2.0
    batch_size: common.BatchSize = 64
    engine: EngineOptions
    output: FigureOptions

    def plan(self) -> Plan:
        """How the model is measured."""
        from vlv.evaluation.experiments.toyworld import Plan
        from vlv.evaluation.experiments.toyworld_scores import SECTIONS

        names = tuple(SECTIONS) if self.sections is None else self.sections.split(",")
        sections = tuple(name.strip() for name in names)
        return Plan(self.num, self.seed, self.batch_size, self.steps, self.guidance, sections)


@app.command()
@takes_options
def toyworld(given: ToyworldOptions) -> int:
    """Render fresh scenes and measure what a model of the toy world makes of them.

    Prints a dozen figures with a 95 % interval over the scenes, and the floor and the goal where there are any; --full prints all.
    The same seed gives the same figures. With --json an interrupted run goes on where it stopped.
    """
    from vlv.evaluation.experiments.toyworld import evaluate_toyworld
    from vlv.evaluation.experiments.toyworld_scores import SUMMARY
    from vlv.evaluation.results import format_results, format_summary
    from vlv.storage import check_writable

    plan, engine = given.plan(), given.engine.settings()
    file = given.output.json_file
    check_writable(*given.output.files)
    models = given.models.load()
    kept = None if file is None else file.with_name(file.name + ".parts")
    resumable = kept is not None
    with (
        tempfile.TemporaryDirectory() as folder,
        experiments.progress("measuring", resumable=resumable) as report,
    ):
        results, run = evaluate_toyworld(models, plan, kept or Path(folder), report, engine)
        given.output.write(results, run)
    typer.echo(format_results(results) if given.output.full else format_summary(results, SUMMARY))
    if kept is not None:
        shutil.rmtree(kept, ignore_errors=True)
    return 0


@options
class DoubtsOptions:
    """``vlv eval doubts``."""

    model: common.ModelOptions
    split: Annotated[
        SplitName, typer.Option(help="Of the toy world; fit on val, measure on test.")
    ] = "test"
    num: Annotated[int, typer.Option(min=2, help="Scenes, one caption of each.")] = 2000
    seed: common.Seed = 1
    batch_size: common.BatchSize = 8
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
    evidence: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps what the decoder says, so that an interrupted run goes on."
        ),
    ] = None
    json_file: common.JsonFile = None


@app.command()
@takes_options
def doubts(given: DoubtsOptions) -> int:
    """Caption rendered scenes, ask the frozen decoder which sentences are wrong, and measure how well it knows.

    Prints how the doubts rank sentences and claims (AUROC), whether their probabilities are calibrated, and what `vlv verify
    --fix` would gain. With --fit the probabilities are fit to the scenes first, and written.
    """
    from vlv.errors import ConfigError
    from vlv.evaluation.experiments.doubts import collect, fit_calibration, measure
    from vlv.evaluation.experiments.scene_plan import ScenePlan
    from vlv.models.calibration import Calibration
    from vlv.storage import check_writable, write_json

    if given.fit is not None and given.calibration is not None:
        raise ConfigError("--fit writes a calibration and --calibration reads one; leave one out")
    plan = ScenePlan(given.split, given.num, given.seed, given.batch_size)
    calibration = None if given.calibration is None else Calibration.load(given.calibration)
    check_writable(given.fit, given.json_file)
    pipe = given.model.load(["caption", "generate"])
    if given.fit is None and (calibration := calibration or pipe.calibration) is None:
        raise ConfigError(f"{given.model.model} has no doubts.json; write one with --fit FILE")
    progress = common.Progress(plan.num, unit="scene", resumable=given.evidence is not None)
    with tempfile.TemporaryDirectory() as folder, progress:
        cases = collect(pipe, plan, given.evidence or Path(folder), progress.advance)
    if given.fit is not None:
        calibration = fit_calibration(cases, plan)
        write_json(given.fit, calibration.to_dict())
        common.say(f"written: {given.fit}")
    assert calibration is not None
    results = measure(cases, calibration, plan)
    show(results, given.json_file)
    return 0


@options
class BestOfOptions:
    """``vlv eval best-of``."""

    model: common.ModelOptions
    split: Annotated[
        SplitName, typer.Option(help="Of the toy world; tune on val, measure on test.")
    ] = "test"
    num: Annotated[int, typer.Option(min=2, help="Scenes.")] = 2000
    seed: common.Seed = 1
    candidates: Annotated[int, typer.Option(min=2, help="Captions of each, N.")] = 16
    timesteps: Annotated[int, typer.Option(min=1, help="At which they are scored.")] = 3
    batch_size: common.BatchSize = 8
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the samples.")] = 0.7
    rewards: Annotated[
        list[str],
        typer.Option(
            "--reward",
            help="Of stage 3, that chooses too: drawing, redrawing, context (repeatable).",
        ),
    ] = field(default_factory=list)
    evidence: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps every caption's scores; an interrupted run goes on."),
    ] = None
    json_file: common.JsonFile = None


@app.command("best-of")
@takes_options
def best_of(given: BestOfOptions) -> int:
    """Write several captions of rendered scenes, and measure what it gains to choose among them.

    The frozen decoder (vlv caption --verify), the captioner's own log-probability and the truth choose among the first 2, 4, 8
    ... captions; the first is greedy, the others are samples.
    """
    from vlv.evaluation.experiments.best_of import BestOfPlan, collect, measure
    from vlv.storage import check_writable

    plan = BestOfPlan(
        given.split,
        given.num,
        given.seed,
        given.batch_size,
        candidates=given.candidates,
        timesteps=given.timesteps,
        temperature=given.temperature,
        rewards=tuple(given.rewards),
    )
    check_writable(given.json_file)
    pipe = given.model.load(["caption", "generate"])
    progress = common.Progress(plan.num, unit="scene", resumable=given.evidence is not None)
    with tempfile.TemporaryDirectory() as folder, progress:
        rows = collect(pipe, plan, given.evidence or Path(folder), progress.advance)
    results = measure(rows, plan)
    show(results, given.json_file)
    return 0


@options
class InstructOptions:
    """``vlv eval instruct``."""

    model: common.ModelOptions
    before: Annotated[
        str | None,
        typer.Option(help="A model whose plain captions are compared: that before the training."),
    ] = None
    split: Annotated[SplitName, typer.Option(help="Of the toy world.")] = "test"
    num: Annotated[int, typer.Option(min=2, help="Scenes.")] = 2000
    seed: common.Seed = 1
    batch_size: common.BatchSize = 16
    evidence: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps every text, so that an interrupted run goes on."),
    ] = None
    json_file: common.JsonFile = None


@app.command()
@takes_options
def instruct(given: InstructOptions) -> int:
    """Ask a model about rendered scenes for every style of captions and many answers, and measure how well it follows.

    Prints the share of captions in the style that was asked for, how many of their claims are right, the accuracy of answers
    by kind of question, and F1 of plain captions, with --before against those of another model.
    """
    from vlv.evaluation.experiments.instruct import collect, measure
    from vlv.evaluation.experiments.scene_plan import ScenePlan
    from vlv.storage import check_writable

    plan = ScenePlan(given.split, given.num, given.seed, given.batch_size)
    check_writable(given.json_file)
    pipe = given.model.load(["caption"])
    before = None
    if given.before is not None:
        before = common.load_pipeline(
            given.before, ["caption"], placement=given.model.placement(), yes=given.model.yes
        )
    progress = common.Progress(plan.num, unit="scene", resumable=given.evidence is not None)
    with tempfile.TemporaryDirectory() as folder, progress:
        rows = collect(pipe, before, plan, given.evidence or Path(folder), progress.advance)
    show(measure(rows, plan), given.json_file)
    return 0


def show(results: Results, file: Path | None) -> None:
    """Print the figures, and write them to a file where one is named."""
    from vlv.evaluation.results import format_results
    from vlv.storage import write_json

    typer.echo(format_results(results))
    if file is not None:
        write_json(file, results.to_dict())
        common.say(f"written: {file}")
