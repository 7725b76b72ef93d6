"""``vlv train`` and ``vlv summary``."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlv.cli import common
from vlv.cli.engine import EngineOptions
from vlv.cli.options import option_group, options, takes_options
from vlv.errors import ConfigError

if TYPE_CHECKING:
    from vlv.config import RunConfig


@option_group("Looking before or instead")
class LookOptions:
    """What is done instead of training."""

    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what would be done: parts, batches, epochs, memory, hours and cost. Reads no weights.",
        ),
    ] = False
    processes: Annotated[
        int, typer.Option(min=1, help="Of --dry-run: GPUs that will train together.")
    ] = 1
    profile: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="STEPS", help="Only time so many steps, part by part; nothing is learnt."
        ),
    ] = None
    trace: Annotated[
        bool, typer.Option("--trace", help="With --profile: also RUN_DIR/trace.json, for Perfetto.")
    ] = False


@options
class TrainOptions:
    """Options of ``vlv train``."""

    config: Annotated[
        str,
        typer.Argument(
            help="A YAML file, or a preset such as quick-stage1; it says which stage is trained."
        ),
    ]
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Folder of the run; created.")]
    changes: Annotated[
        list[str], typer.Option("--set", help="Change a setting: optim.lr=1e-4 (repeatable).")
    ] = field(default_factory=list)
    export: Annotated[
        Path | None,
        typer.Option(
            help="Where the finished model goes; RUN_DIR/model by default, with adapters nowhere."
        ),
    ] = None
    seed: Annotated[int | None, typer.Option(min=0, help="Same as --set loop.seed=N.")] = None
    max_minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Stop and save after this time; the same command goes on."),
    ] = None
    usd_per_gpu_hour: Annotated[
        float | None, typer.Option(help="Price of a GPU; same as --set loop.usd_per_gpu_hour=N.")
    ] = None
    engine: EngineOptions
    look: LookOptions

    def settings(self) -> RunConfig:
        """The configuration with the changes of the command line."""
        from vlv.config import load_config

        named = {
            "loop.seed": self.seed,
            "loop.usd_per_gpu_hour": self.usd_per_gpu_hour,
            "stage3.engine": self.engine.engine,
        }
        changes = [f"{key}={value}" for key, value in named.items() if value is not None]
        return load_config(self.config, [*self.changes, *changes])


@takes_options
def train(given: TrainOptions) -> int:
    """Train a stage of the method; the same command goes on after an interruption.

    Stage 1: images alone teach the encoder what the frozen diffusion decoder needs to reconstruct them.
    Stage 2: captions teach the language model to read the caption embedding.
    Stage 3: images alone make its captions truer, with the frozen diffusion decoder as judge.
    """
    settings, look = given.settings(), given.look
    if look.dry_run:
        return _plan(settings, given.run_dir, look.processes)
    if look.profile is not None or look.trace:
        if given.engine.engine is not None:
            raise ConfigError("--profile times what this process writes; leave --engine out")
        return _profile(settings, given.run_dir, look.profile, look.trace)
    return common.train(lambda: _train(settings, given))


def summary(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
) -> int:
    """Write RUN_DIR/summary.html: curves, samples, cost and settings on one page. A run does it at its end, too."""
    from vlv.training.summary import write_summary

    common.say(f"the summary is in {write_summary(run_dir)}")
    return 0


def _plan(settings: RunConfig, run_dir: Path, processes: int) -> int:
    from vlv.jobs.plans import plan_run

    for line in plan_run(settings, run_dir, num_processes=processes).lines(run_dir):
        typer.echo(line)
    return 0


def _profile(settings: RunConfig, run_dir: Path, steps: int | None, trace: bool) -> int:
    from vlv.training.profile import profile_run

    if steps is None:
        raise ConfigError("--trace has no effect without --profile STEPS; give both")
    typer.echo(str(profile_run(settings, run_dir, steps, trace=trace)))
    common.say(f"the figures are in {run_dir / 'profile.json'}")
    return 0


def _train(settings: RunConfig, given: TrainOptions) -> str:
    from vlv.training.assemble import train as train_stage

    seconds = None if given.max_minutes is None else 60 * given.max_minutes
    result = train_stage(
        settings,
        given.run_dir,
        export=given.export,
        max_seconds=seconds,
        engine=given.engine.settings(),
    )
    return f"{settings.stage}: {result.step} steps done; {_where(settings, given)}"


def _where(settings: RunConfig, given: TrainOptions) -> str:
    from vlv.training.export import Results

    results = Results(given.run_dir, given.export)
    if settings.lora is None:
        return f"the model is in {results.model}"
    base = f", its base in {results.base}" if results.base.is_dir() else ""
    merged = "" if given.export is None else f", and merged with its base in {given.export}"
    return f"the adapter is in {results.adapter}{base}{merged}"
