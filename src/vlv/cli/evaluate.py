"""``vlv eval``."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlv.cli import ablation, common, experiments

if TYPE_CHECKING:
    from vlv.evaluation.results import Results
    from vlv.models.pipeline import VLVPipeline
    from vlv.toyworld.inspector import Inspector

app = typer.Typer(name="eval", help="Measure a model.", no_args_is_help=True)

Num = Annotated[int, typer.Option(min=2, help="Scenes to render and measure on.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")]
Rows = Annotated[Path | None, typer.Option("--records", help="Write one JSON line per scene.")]
Sheet = Annotated[Path | None, typer.Option(help="Write a PNG of the first scenes.")]
Sections = Annotated[
    str | None, typer.Option(help="Comma-separated: vae,inspector,teacher,...; all by default.")
]
InspectorFolder = Annotated[
    Path | None, typer.Option("--inspector", help="The inspector; MODEL/inspector by default.")
]
Stage1 = Annotated[
    str | None, typer.Option(help="The model before stage 2, to compare the reconstructions.")
]
Control = Annotated[str | None, typer.Option(help="A model trained without stage 1, to compare.")]


app.add_typer(experiments.predict)
app.command()(experiments.judge)
app.command()(experiments.score)
app.command()(experiments.rate)
app.command()(ablation.ablation)
app.command()(experiments.report)
app.command()(experiments.results)


@app.callback()
def _group() -> None:
    """Measure a model: all of the toy world at once, or an experiment of the paper in three steps."""


@app.command()
def toyworld(
    model: common.Model = common.SHIPPED_MODEL,
    num: Num = 2000,
    seed: common.Seed = 0,
    sections: Sections = None,
    stage1: Stage1 = None,
    control: Control = None,
    inspector: InspectorFolder = None,
    json_file: Json = None,
    records: Rows = None,
    sheet: Sheet = None,
    batch_size: common.BatchSize = 64,
    steps: common.Steps = 20,
    guidance: common.Guidance = 2.0,
    device: common.Device = "auto",
) -> int:
    """Render fresh scenes and measure what a model of the toy world makes of them.

    Prints every figure with a 95 % interval over the scenes, and with the floor and the goal where there are any.
    The same seed gives the same figures. With --json an interrupted run goes on where it stopped.
    """
    from vlv.evaluation.results import format_results
    from vlv.evaluation.toyworld import evaluate_toyworld

    parts = None if json_file is None else json_file.with_name(json_file.name + ".parts")
    results = evaluate_toyworld(
        _load(model, device),
        _load_inspector(model, inspector),
        num=num,
        seed=seed,
        batch_size=batch_size,
        steps=steps,
        guidance=guidance,
        sections=None if sections is None else [name.strip() for name in sections.split(",")],
        stage1=None if stage1 is None else _load(stage1, device),
        control=None if control is None else _load(control, device),
        parts=parts,
        progress=sys.stderr.isatty(),
    )
    typer.echo(format_results(results))
    _write(results, json_file, records, sheet)
    if parts is not None:
        shutil.rmtree(parts, ignore_errors=True)
    return 0


def _load(model: str, device: str) -> VLVPipeline:
    """All parts that a model has."""
    from transformers.utils.logging import disable_progress_bar

    from vlv.models.pipeline import VLVPipeline
    from vlv.models.placement import pick_device

    disable_progress_bar()
    pipe = VLVPipeline.from_pretrained(model)
    pipe.to(pick_device(device))
    return pipe


def _load_inspector(model: str, folder: Path | None) -> Inspector:
    """The inspector of a model folder, or the one named."""
    import torch

    from vlv.errors import ModelFolderError
    from vlv.models.folder import find_folder
    from vlv.toyworld.inspector import Inspector

    folder = folder or find_folder(model) / "inspector"
    if not (folder / "config.json").is_file():
        raise ModelFolderError(
            f"there is no inspector in {folder}; name the folder of one with --inspector"
        )
    inspector: Inspector = Inspector.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    return inspector


def _write(
    results: Results, json_file: Path | None, records: Path | None, sheet: Path | None
) -> None:
    from vlv.evaluation.toyworld import example_sheet
    from vlv.jobs.pictures import write_png
    from vlv.storage import write_text

    if json_file is not None:
        write_text(json_file, json.dumps(results.to_dict(), indent=2) + "\n")
    if records is not None:
        write_text(records, "".join(json.dumps(row) + "\n" for row in results.samples))
    if sheet is not None:
        write_png(sheet, example_sheet(results), results.settings)
    for path in (json_file, records, sheet):
        if path is not None:
            common.say(f"written: {path}")
