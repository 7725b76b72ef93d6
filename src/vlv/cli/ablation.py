"""``vlv eval ablation``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlv.cli import common

if TYPE_CHECKING:
    from vlv.evaluation.experiments.ablations import Plan


Name = Annotated[
    str, typer.Argument(help="queries, unfreezing, data, decoder, control or bottleneck.")
]
RunFolder = Annotated[
    Path, typer.Option("--run", help="Folder of the run; the same command goes on.")
]
Parts = Annotated[
    Path, typer.Option(help="Folder of the pretrained parts (vlv toyworld pretrain).")
]
Seeds = Annotated[int, typer.Option(min=1, help="Trainings of every variant.")]
Stage1 = Annotated[str, typer.Option("--stage1", help="Preset or file of stage 1.")]
Stage2 = Annotated[str, typer.Option("--stage2", help="Preset or file of stage 2.")]
Changes1 = Annotated[
    list[str] | None,
    typer.Option("--set1", help="Change a setting of stage 1: loop.steps=300 (repeatable)."),
]
Changes2 = Annotated[
    list[str] | None, typer.Option("--set2", help="Likewise of stage 2 (repeatable).")
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="VARIANT=FOLDER",
        help="Measure this model instead of training the variant; once for each seed.",
    ),
]
Trained = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the training runs, which ablations can share; RUN/trained by default."
    ),
]
Num = Annotated[int, typer.Option(min=2, help="Scenes to measure on.")]


def ablation(
    name: Name,
    run_folder: RunFolder,
    parts: Parts,
    seeds: Seeds = 3,
    stage1: Stage1 = "tiny-ablation-stage1",
    stage2: Stage2 = "tiny-ablation-stage2",
    changes1: Changes1 = None,
    changes2: Changes2 = None,
    models: Models = None,
    trained: Trained = None,
    num: Num = 500,
    seed: common.Seed = 0,
    batch_size: common.BatchSize = 64,
    steps: common.Steps = 20,
    guidance: common.Guidance = 2.0,
    device: common.Device = "auto",
) -> int:
    """Train the variants of one of the paper's ablations alike, and measure them in the toy world.

    Training s of a variant has the seed s; --seed is that of the scenes. What is trained or measured is not done again.
    Writes RUN/result.json, which vlv eval report reads, and RUN/plot.png.
    """
    from vlv.evaluation.experiments.ablations import Plan
    from vlv.training.interrupt import Interrupted

    plan = Plan(
        parts,
        stage1,
        stage2,
        tuple(changes1 or ()),
        tuple(changes2 or ()),
        seeds,
        _given(models or []),
        num,
        seed,
        batch_size,
        steps,
        guidance,
        trained,
    )
    try:
        _run(name, run_folder, plan, device)
    except Interrupted as interruption:
        common.say(str(interruption))
        if interruption.preempted:
            return common.PREEMPTED
        raise
    common.say(f"next: vlv eval report {run_folder}")
    return 0


def _run(name: str, folder: Path, plan: Plan, device: str) -> None:
    """Train, measure, print and plot."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from vlv.evaluation.experiments.ablations import run_ablation
    from vlv.evaluation.report.page import ablation_chart
    from vlv.evaluation.results import Results, format_results
    from vlv.models.placement import pick_device

    disable_progress_bar()
    where = torch.device(pick_device(device))
    section = run_ablation(name, folder, plan, where, progress=sys.stderr.isatty())
    about = {"ablation": name, "seeds": str(plan.seeds), "num": str(plan.num)}
    plot = ablation_chart(section.to_dict()["figures"])
    plot.savefig(folder / "plot.png", dpi=110, facecolor="white", metadata=about)
    typer.echo(format_results(Results({}, (section,))))


def _given(models: list[str]) -> dict[str, list[str]]:
    """The models of --model by variant."""
    from vlv.errors import ConfigError

    given: dict[str, list[str]] = {}
    for text in models:
        variant, equals, folder = text.partition("=")
        if not (variant and equals and folder):
            raise ConfigError(f'"{text}" names no model; write --model VARIANT=FOLDER')
        given.setdefault(variant, []).append(folder)
    return given
