"""``vlv train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlv.cli import common

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


@app.command()
def stage1(
    config: Config,
    run: RunFolder,
    overrides: Overrides = None,
    export: Export = None,
    seed: RunSeed = None,
    max_minutes: MaxMinutes = None,
) -> int:
    """Images alone teach the encoder what the frozen diffusion decoder needs to rebuild them."""
    return _train("stage1", config, run, overrides, export, seed, max_minutes)


@app.command()
def stage2(
    config: Config,
    run: RunFolder,
    overrides: Overrides = None,
    export: Export = None,
    seed: RunSeed = None,
    max_minutes: MaxMinutes = None,
) -> int:
    """Captions teach the language model to read the caption embedding."""
    return _train("stage2", config, run, overrides, export, seed, max_minutes)


def _train(
    stage: str,
    config: str,
    run: Path,
    overrides: list[str] | None,
    export: Path | None,
    seed: int | None,
    max_minutes: float | None,
) -> int:
    from vlv.config import load_config
    from vlv.errors import ConfigError
    from vlv.training.assemble import train
    from vlv.training.interrupt import Interrupted

    changes = [*(overrides or []), *([] if seed is None else [f"loop.seed={seed}"])]
    settings = load_config(config, changes)
    if settings.stage != stage:
        raise ConfigError(
            f"{config} is a configuration of {settings.stage}; use it with vlv train {settings.stage}"
        )
    try:
        result = train(
            settings,
            run,
            export=export,
            max_seconds=None if max_minutes is None else 60 * max_minutes,
        )
    except Interrupted as interruption:
        common.say_once(str(interruption))
        raise
    common.say_once(f"{stage}: {result.step} steps done; the model is in {export or run / 'model'}")
    return 0
