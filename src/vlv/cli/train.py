"""``vlv train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlv.cli import common

if TYPE_CHECKING:
    from vlv.config import RunConfig

app = typer.Typer(name="train", help="Train the two stages of the method.", no_args_is_help=True)

Config = Annotated[str, typer.Option("--config", "-c", help="A preset or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change a setting: optim.lr=1e-4 (repeatable).")
]
RunFolder = Annotated[
    Path,
    typer.Option(
        "--run", "--run-dir", help="Folder of the run; created. (torchrun takes --run for its own.)"
    ),
]
Export = Annotated[
    Path | None, typer.Option(help="Where the finished model goes; RUN/model by default.")
]
RunSeed = Annotated[int | None, typer.Option(min=0, help="Same as --set loop.seed=N.")]
MaxMinutes = Annotated[
    float | None,
    typer.Option(min=0, help="Stop and save after this time; the same command goes on."),
]

Rate = Annotated[
    float | None, typer.Option(help="Price of a GPU; same as --set loop.usd_per_gpu_hour=N.")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Say what would be done: parts, batches, epochs, memory, hours and cost. Reads no weights.",
    ),
]
Profile = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="STEPS", help="Only time so many steps, part by part; nothing is learnt."
    ),
]
Trace = Annotated[
    bool, typer.Option("--trace", help="With --profile: also RUN/trace.json, for Perfetto.")
]
Processes = Annotated[int, typer.Option(min=1, help="Of --dry-run: GPUs that will train together.")]


@app.command()
def stage1(
    config: Config,
    run: RunFolder,
    overrides: Overrides = None,
    export: Export = None,
    seed: RunSeed = None,
    max_minutes: MaxMinutes = None,
    usd_per_gpu_hour: Rate = None,
    dry_run: DryRun = False,
    processes: Processes = 1,
    profile: Profile = None,
    trace: Trace = False,
) -> int:
    """Images alone teach the encoder what the frozen diffusion decoder needs to rebuild them."""
    settings = _settings("stage1", config, overrides, seed, usd_per_gpu_hour)
    if dry_run:
        return _plan(settings, run, processes)
    if profile is not None or trace:
        return _profile(settings, run, profile, trace)
    return _train(settings, run, export, max_minutes)


@app.command()
def stage2(
    config: Config,
    run: RunFolder,
    overrides: Overrides = None,
    export: Export = None,
    seed: RunSeed = None,
    max_minutes: MaxMinutes = None,
    usd_per_gpu_hour: Rate = None,
    dry_run: DryRun = False,
    processes: Processes = 1,
    profile: Profile = None,
    trace: Trace = False,
) -> int:
    """Captions teach the language model to read the caption embedding."""
    settings = _settings("stage2", config, overrides, seed, usd_per_gpu_hour)
    if dry_run:
        return _plan(settings, run, processes)
    if profile is not None or trace:
        return _profile(settings, run, profile, trace)
    return _train(settings, run, export, max_minutes)


@app.command()
def summary(run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")]) -> int:
    """Write RUN/summary.html: curves, samples, cost and settings on one page. A run does it at its end, too."""
    from vlv.training.summary import write_summary

    common.say(f"the summary is in {write_summary(run)}")
    return 0


def _settings(
    stage: str, config: str, overrides: list[str] | None, seed: int | None, rate: float | None
) -> RunConfig:
    """The configuration with the changes of the command line."""
    from vlv.config import load_config
    from vlv.errors import ConfigError

    named = {"loop.seed": seed, "loop.usd_per_gpu_hour": rate}
    changes = [f"{key}={value}" for key, value in named.items() if value is not None]
    settings = load_config(config, [*(overrides or []), *changes])
    if settings.stage != stage:
        raise ConfigError(
            f"{config} is a configuration of {settings.stage}; use it with vlv train {settings.stage}"
        )
    return settings


def _plan(settings: RunConfig, run: Path, processes: int) -> int:
    from vlv.jobs.run_plan import plan_lines, plan_run

    for line in plan_lines(plan_run(settings, run, num_processes=processes), run):
        typer.echo(line)
    return 0


def _profile(settings: RunConfig, run: Path, steps: int | None, trace: bool) -> int:
    from vlv.errors import ConfigError
    from vlv.training.profile import profile_run

    if steps is None:
        raise ConfigError("--trace has no effect without --profile STEPS; give both")
    typer.echo(str(profile_run(settings, run, steps, trace=trace)))
    common.say(f"the figures are in {run / 'profile.json'}")
    return 0


def _train(settings: RunConfig, run: Path, export: Path | None, max_minutes: float | None) -> int:
    from vlv.training.assemble import train
    from vlv.training.interrupt import Interrupted

    try:
        result = train(
            settings,
            run,
            export=export,
            max_seconds=None if max_minutes is None else 60 * max_minutes,
        )
    except Interrupted as interruption:
        common.say_once(str(interruption))
        if interruption.preempted:
            return common.PREEMPTED
        raise
    common.say_once(
        f"{settings.stage}: {result.step} steps done; the model is in {export or run / 'model'}"
    )
    return 0
