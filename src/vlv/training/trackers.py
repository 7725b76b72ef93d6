"""Where the figures and samples of a run go beside its own folder: TensorBoard, Weights & Biases, Trackio.

Each package is imported only where it is asked for. The two services get an id that lies in `trackers.json` of the run
folder, so that a resumed run goes on in the same place. W&B works offline where it knows no key (`wandb sync` sends the
run later); Trackio keeps everything on this machine.
"""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vlv.errors import ConfigError
from vlv.storage import read_settings, write_json

_EXTRAS = {"tensorboard": "train", "wandb": "track", "trackio": "track"}
_IDS = "trackers.json"


class Tracker(Protocol):
    """Takes what the journal writes."""

    def figures(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name; `kind` is train or eval."""

    def samples(self, step: int, images: Sequence[Path], texts: Sequence[Path]) -> None:
        """Files that were drawn and written at a step."""

    def close(self) -> None:
        """Write what is left."""


def open_trackers(
    names: Sequence[str] | None, run_dir: Path, settings: Mapping[str, object], *, step: int
) -> list[Tracker]:
    """The trackers of a run.

    Args:
        names: Which; None is TensorBoard where it is installed, and nothing where it is not.
        run_dir: Folder of the run.
        settings: Its resolved configuration.
        step: Steps already done: what was logged of later ones is hidden or drawn over.

    Raises:
        ConfigError: A package is not installed.
    """
    if names is None:
        names = ["tensorboard"] if find_spec("tensorboard") else []
    trackers: list[Tracker] = []
    for name in names:
        package = _package(name)
        if name == "tensorboard":
            trackers.append(TensorBoard(run_dir / name, step))
        else:
            trackers.append(Service(package, name, run_dir, settings))
    return trackers


class TensorBoard:
    """Events in a folder, read by `tensorboard --logdir`."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events: Any = SummaryWriter(folder, purge_step=step + 1)

    def figures(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One scalar per name."""
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def samples(self, step: int, images: Sequence[Path], texts: Sequence[Path]) -> None:
        """Pictures and captions."""
        for number, file in enumerate(images):
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._events.add_image(f"samples/{number}", pixels, step, dataformats="HWC")
        for text in texts:
            lines = text.read_text(encoding="utf-8").splitlines()
            self._events.add_text("samples/captions", "\n\n".join(lines), step)

    def close(self) -> None:
        """Write the last events."""
        self._events.close()


class Service:
    """Weights & Biases or Trackio, which share a manner of speaking.

    Args:
        package: The imported module.
        name: wandb or trackio.
        run_dir: Folder of the run, whose name the run gets.
        settings: Its configuration.
    """

    def __init__(
        self, package: ModuleType, name: str, run_dir: Path, settings: Mapping[str, object]
    ) -> None:
        self._package, self._takes_steps = package, name == "trackio"
        project = os.environ.get(f"{name.upper()}_PROJECT", "vlv")
        run_id = _run_id(run_dir, name)
        if name == "wandb":
            self._run: Any = package.init(
                project=project,
                name=run_dir.name,
                id=run_id,
                resume="allow",
                dir=str(run_dir),
                config=dict(settings),
                mode=_wandb_mode(package),
            )
            self._run.define_metric("*", step_metric="step")
        else:
            self._run = package.init(
                project=project, name=run_id, resume="allow", config=dict(settings)
            )

    def figures(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """All numbers of a line together."""
        self._log({f"{kind}/{name}": value for name, value in values.items()}, step)

    def samples(self, step: int, images: Sequence[Path], texts: Sequence[Path]) -> None:
        """Pictures, with the captions below them."""
        caption = "".join(text.read_text(encoding="utf-8") for text in texts)
        shown = {
            f"samples/{number}": self._package.Image(str(file), caption=caption or None)
            for number, file in enumerate(images)
        }
        if not shown and caption:
            shown = {"samples/captions": caption}
        if shown:
            self._log(shown, step)

    def _log(self, values: Mapping[str, object], step: int) -> None:
        """W&B would drop a step that it has seen, so there it is one figure more; to Trackio it is the step."""
        if self._takes_steps:
            self._run.log(dict(values), step=step)
        else:
            self._run.log({**values, "step": step})

    def close(self) -> None:
        """Say that this is all for now."""
        self._run.finish()


def _wandb_mode(wandb: ModuleType) -> str | None:
    """What WANDB_MODE says; or else offline where no key is known, so that nobody waits at a login prompt."""
    if os.environ.get("WANDB_MODE") or wandb.api.api_key:
        return None
    return "offline"


def _run_id(run_dir: Path, name: str) -> str:
    """The id of this run with a service; made on first use and kept in the run folder."""
    file = run_dir / _IDS
    ids = read_settings(file) or {}
    if name not in ids:
        ids[name] = f"{run_dir.name}-{secrets.token_hex(4)}"
        write_json(file, ids)
    return str(ids[name])


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f'loop.trackers names {name}, which is not installed; run pip install "vlv[{_EXTRAS[name]}]", '
            "or take it out of loop.trackers"
        ) from error
