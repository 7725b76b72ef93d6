"""``vlv eval ablation``."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlv.cli import common
from vlv.cli.options import option_group, options, takes_options

if TYPE_CHECKING:
    from vlv.evaluation.experiments.trainings import Plan


@option_group("Training")
class TrainingOptions:
    """How the variants are trained."""

    parts: Annotated[
        Path, typer.Option(help="Folder of the pretrained parts (vlv toyworld pretrain).")
    ]
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of every variant.")] = 3
    rate: Annotated[
        list[float],
        typer.Option(
            help="Factor of the learning rate; of several (repeatable) validation chooses one for each variant."
        ),
    ] = field(default_factory=lambda: [1.0])
    stage1: Annotated[str, typer.Option("--stage1", help="Preset or file of stage 1.")] = (
        "tiny-ablation-stage1"
    )
    stage2: Annotated[str, typer.Option("--stage2", help="Preset or file of stage 2.")] = (
        "tiny-ablation-stage2"
    )
    set1: Annotated[
        list[str],
        typer.Option(help="Change a setting of stage 1: loop.steps=300 (repeatable)."),
    ] = field(default_factory=list)
    set2: Annotated[list[str], typer.Option(help="Likewise of stage 2 (repeatable).")] = field(
        default_factory=list
    )
    stage3: Annotated[
        str, typer.Option("--stage3", help="Preset or file of stage 3 (rewards, methods).")
    ] = "tiny-ablation-stage3"
    captions: Annotated[
        str, typer.Option(help="Preset or file of its yardstick, a stage 2 with true captions.")
    ] = "tiny-ablation-captions-stage2"
    finished: Annotated[str, typer.Option(help="The finished model that both go on from.")] = (
        "vlv-tiny"
    )
    set3: Annotated[list[str], typer.Option(help="Change a setting of both (repeatable).")] = field(
        default_factory=list
    )
    wrong: Annotated[
        Path | None,
        typer.Option(
            help="Captions of a bad teacher (vlv toyworld render --wrong); --set2 changes how they are learnt."
        ),
    ] = None
    model: Annotated[
        list[str],
        typer.Option(
            metavar="VARIANT=FOLDER",
            help="Measure this model instead of training the variant; once for each seed.",
        ),
    ] = field(default_factory=list)
    trained: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the training runs, which ablations can share; RUN/trained by default."
        ),
    ] = None

    def given(self) -> dict[str, list[str]]:
        """The models of --model by variant."""
        from vlv.errors import ConfigError

        found: dict[str, list[str]] = {}
        for text in self.model:
            variant, equals, folder = text.partition("=")
            if not (variant and equals and folder):
                raise ConfigError(f'"{text}" names no model; write --model VARIANT=FOLDER')
            found.setdefault(variant, []).append(folder)
        return found


@option_group("Measuring")
class MeasuringOptions:
    """How they are measured."""

    num: Annotated[int, typer.Option(min=2, help="Scenes to measure on.")] = 1000
    tuning_num: Annotated[
        int, typer.Option(min=2, help="Scenes of the split val to choose rates on.")
    ] = 500
    seed: common.Seed = 0
    batch_size: common.BatchSize = 64
    steps: common.Steps = 20
    guidance: common.Guidance = 2.0
    device: common.Device = "auto"


@options
class AblationOptions:
    """``vlv eval ablation``."""

    name: Annotated[
        str,
        typer.Argument(
            help="queries, unfreezing, data, decoder, control, bottleneck, warm, drift, rewards, methods or teacher."
        ),
    ]
    run_dir: common.RunDir
    training: TrainingOptions
    measuring: MeasuringOptions

    def plan(self) -> Plan:
        """How the variants are trained and measured."""
        from vlv.evaluation.experiments.toyworld import Plan as Measuring
        from vlv.evaluation.experiments.trainings import Plan

        training, m = self.training, self.measuring
        return Plan(
            parts=training.parts,
            stage1=training.stage1,
            stage2=training.stage2,
            changes1=tuple(training.set1),
            stage3=training.stage3,
            captions=training.captions,
            finished=training.finished,
            changes2=tuple(training.set2),
            changes3=tuple(training.set3),
            wrong=training.wrong,
            rates=tuple(training.rate),
            seeds=training.seeds,
            given=training.given(),
            measuring=Measuring(m.num, m.seed, m.batch_size, m.steps, m.guidance),
            tuning_num=m.tuning_num,
            trained=training.trained,
        )


@takes_options
def ablation(given: AblationOptions) -> int:
    """Train the variants of one of the paper's ablations alike, and measure them in the toy world.

    Training s of a variant has the seed s; --seed is that of the scenes. With several values of --rate, and where a variant has settings
    of its own to choose from, a further training of each is measured on the split val first, and the best one is taken.
    What is trained or measured is not done again.
    Writes RUN/result.json, which vlv eval report reads, and RUN/plot.png.
    """
    return common.train(lambda: _run(given))


def _run(given: AblationOptions) -> str:
    """Train, measure, print and plot; returns what comes next."""
    from vlv.cli.experiments import progress
    from vlv.evaluation.experiments.ablations import run_ablation
    from vlv.evaluation.report.page import ablation_chart
    from vlv.evaluation.results import Results, format_results

    plan, folder = given.plan(), given.run_dir
    device = common.quiet_device(given.measuring.device)
    with progress("measuring") as report:
        section = run_ablation(given.name, folder, plan, device, report)
    about = {"ablation": given.name, "seeds": str(plan.seeds), "num": str(plan.measuring.num)}
    plot = ablation_chart(section.to_dict()["figures"])
    plot.savefig(folder / "plot.png", dpi=110, facecolor="white", metadata=about)
    typer.echo(format_results(Results({}, (section,))))
    return f"next: vlv eval report {folder}"
