"""``vlv eval``."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlv.cli import ablation, common, eval_scenes, experiments
from vlv.cli.engine import EngineOptions
from vlv.cli.options import option_group, options, takes_options

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
app.command()(eval_scenes.doubts)
app.command("best-of")(eval_scenes.best_of)
app.command()(eval_scenes.instruct)
app.command()(eval_scenes.words)
app.command()(eval_scenes.search)
app.command()(eval_scenes.representation)
app.command()(experiments.report)
app.command()(experiments.results)


@app.callback()
def _group() -> None:
    """Measure a model: all of the toy world at once, or an experiment of the paper in three steps."""


@option_group("Models")
class ModelsOptions:
    """What is measured, and with what."""

    model: common.Model = common.SHIPPED_MODEL
    adapter: common.Adapter = None
    stage1: Annotated[
        str | None, typer.Option(help="The model before stage 2, to compare the reconstructions.")
    ] = None
    stage2: Annotated[
        str | None, typer.Option(help="The model before stage 3, to compare the captions.")
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

        def load(name: str, adapter: str | None = None) -> VLVPipeline:
            return VLVPipeline.from_pretrained(name, adapter=adapter).to(device)

        inspector = load_inspector(self.inspector or Path(self.model), device)
        others = {"stage1": self.stage1, "stage2": self.stage2, "control": self.control}
        loaded = {role: None if name is None else load(name) for role, name in others.items()}
        return Models(load(self.model, self.adapter), inspector, **loaded)


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
    split: Annotated[Literal["test", "val"], typer.Option(help="Tune on val, report on test.")] = (
        "test"
    )
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
        return Plan(
            self.num,
            self.seed,
            self.batch_size,
            self.steps,
            self.guidance,
            sections,
            self.split,
        )


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
