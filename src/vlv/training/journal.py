"""What a run tells of itself: metrics.jsonl, figures for trackers, progress, time and cost, config.yaml, versions.json."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
import yaml
from torch import Tensor

from vlv.errors import OutputError
from vlv.progress import Progress, say
from vlv.storage import Json, check_in_place, read_journal, write_text
from vlv.training.trackers import open_trackers

logger = logging.getLogger(__name__)

_PACKAGES = [
    "vlv",
    "torch",
    "transformers",
    "diffusers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "pillow",
]


class Meter:
    """Means since the last log line; sums stay on the device until they are read."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.images = 0
        self.seconds = 0.0

    def add(self, values: Mapping[str, Tensor], counts: Tensor) -> None:
        """Add one value of each name, if `counts` (a boolean scalar on the device) says so."""
        for name, value in values.items():
            value = value.detach().float().where(counts, 0.0)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + counts.float()

    def means(self) -> dict[str, float]:
        """Mean of each name, and images per second of training time."""
        state = self.state_dict()
        means = {
            name: total / state["counts"][name]
            for name, total in state["sums"].items()
            if state["counts"][name]
        }
        return means | {"images_per_second": round(self.images / max(self.seconds, 1e-9), 2)}

    def state_dict(self) -> Json:
        """JSON values from which the sums go on exactly."""
        names = list(self.sums)
        both = [*self.sums.values(), *(self.counts[name] for name in names)]
        numbers = torch.stack(both).tolist() if both else []
        sums, counts = (dict(zip(names, part, strict=True)) for part in _halves(numbers))
        return {"sums": sums, "counts": counts, "images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state: Json, device: torch.device) -> None:
        """Set what `state_dict` returned."""
        self.sums, self.counts = (
            {name: torch.tensor(value, device=device) for name, value in state[part].items()}
            for part in ("sums", "counts")
        )
        self.images, self.seconds = state["images"], state["seconds"]


class Clock:
    """Wall time of a run, training and looking together, and the hours of its devices.

    Work that a crash undid is no part of `elapsed_seconds`, but its devices were paid for: `device_seconds` keeps it.

    Args:
        steps: Optimiser steps of the whole run.
        num_devices: Processes that train together, one device each.
        usd_per_hour: Price of one device; None where it is not known.
    """

    def __init__(self, steps: int, num_devices: int, usd_per_hour: float | None) -> None:
        self.steps, self.num_devices, self.usd_per_hour = steps, num_devices, usd_per_hour
        self.elapsed_seconds = self.device_seconds = 0.0
        self._first_step = 0
        self._first_seconds = 0.0
        self._last = time.monotonic()

    def tick(self) -> float:
        """Book the time since the last call, and return it in seconds."""
        now = time.monotonic()
        seconds = now - self._last
        self._last = now
        self.elapsed_seconds += seconds
        self.device_seconds += seconds * self.num_devices
        return seconds

    def eta_seconds(self, step: int) -> float | None:
        """Seconds to the end at the pace since the run was last started; None before its first step is done."""
        done = step - self._first_step
        if done < 1:
            return None
        return (self.elapsed_seconds - self._first_seconds) / done * (self.steps - step)

    def figures(self, step: int) -> dict[str, float]:
        """For the log: elapsed_seconds, device_hours, and where they are known eta_seconds and cost_usd."""
        hours = self.device_seconds / 3600
        figures = {"elapsed_seconds": round(self.elapsed_seconds, 2), "device_hours": hours}
        if (eta := self.eta_seconds(step)) is not None:
            figures["eta_seconds"] = round(eta, 1)
        if self.usd_per_hour is not None:
            figures["cost_usd"] = hours * self.usd_per_hour
        return {name: float(f"{value:.6g}") for name, value in figures.items()}

    def was_paid(self, device_hours: float) -> None:
        """Hours that the log of the run states; some may have been lost in a crash."""
        self.device_seconds = max(self.device_seconds, 3600 * device_hours)

    def state_dict(self) -> dict[str, float]:
        """JSON values."""
        return {"elapsed_seconds": self.elapsed_seconds, "device_seconds": self.device_seconds}

    def load_state_dict(self, state: Json, step: int) -> None:
        """Go on from what `state_dict` returned at a step; the time since this clock was made counts."""
        begun = state["elapsed_seconds"]
        self.elapsed_seconds += begun
        self.device_seconds += state["device_seconds"]
        self._first_step, self._first_seconds = step, begun


class Journal:
    """Writer of the run folder's records.

    Args:
        run_dir: The run folder; created.
        settings: The resolved configuration, written to config.yaml.
        total_steps: Length of the progress bar.
        step: Steps already done; later lines of metrics.jsonl are dropped, so that it reads as one run.
        pending: Kinds of lines that are to be written for this step again.
        trackers: Where figures and samples go too, see `open_trackers`.

    Raises:
        ConfigError: A tracker is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: Mapping[str, object],
        *,
        total_steps: int,
        step: int,
        trackers: Sequence[str] | None,
        pending: Sequence[str] = (),
    ) -> None:
        write_text(run_dir / "config.yaml", yaml.safe_dump(dict(settings), sort_keys=False))
        write_text(run_dir / "versions.json", json.dumps(versions(), indent=1))
        self._file = run_dir / "metrics.jsonl"
        known = read_metrics(self._file)
        self.device_hours = max((line.get("device_hours", 0.0) for line in known), default=0.0)
        lines = [
            line
            for line in known
            if line["step"] < step or (line["step"] == step and line["kind"] not in pending)
        ]
        write_text(self._file, "".join(json.dumps(line) + "\n" for line in lines))
        self.latest = {key: value for line in lines for key, value in line.items()}
        self._stream = self._file.open("ab", buffering=0)
        self._trackers = open_trackers(trackers, run_dir, settings, step=step)
        self._progress = Progress(total_steps, done=step, what=run_dir.name, unit="step")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.close()
        self._stream.close()
        for tracker in self._trackers:
            tracker.close()
        self._summarize()

    def _summarize(self) -> None:
        """Write summary.html; a run does not fail for want of its page."""
        from vlv.training.summary import write_summary  # which reads what is written here

        try:
            write_summary(self._file.parent)
        except (OSError, OutputError) as error:
            logger.warning("the summary could not be written: %s", error)

    def tick(self) -> None:
        """Move the progress bar by one step."""
        self._progress.advance()

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Append one line: `kind` is train or eval.

        Raises:
            OutputError: The disk refuses.
        """
        line = {"step": step, "kind": kind, **values}
        try:
            self._stream.write(f"{json.dumps(line)}\n".encode())
        except OSError as error:
            raise OutputError(
                f"{self._file} cannot be written ({error.strerror or error}); make room and run the same command again"
            ) from error
        self.latest |= line
        for tracker in self._trackers:
            tracker.figures(kind, step, values)
        if kind == "train":
            self._progress.postfix(", ".join(_in_short(values)))
        else:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            say(f"step {step}  {shown}")

    def show(self, step: int, folder: Path) -> None:
        """Hand the samples of a step, `<step>*.png` and `<step>*.txt`, to the trackers."""
        images, texts = (
            [file for file in sorted(folder.glob(f"*.{kind}")) if _step_of(file) == step]
            for kind in ("png", "txt")
        )
        for tracker in self._trackers:
            tracker.samples(step, images, texts)

    def flush(self) -> None:
        """Force metrics.jsonl to the disk: a checkpoint must not be ahead of it.

        Raises:
            OutputError: It is gone, and with it perhaps the run folder.
        """
        check_in_place(self._stream, self._file)
        os.fsync(self._stream.fileno())


def read_metrics(file: Path) -> list[Json]:
    """The lines of a metrics.jsonl; a last line that a crash cut short is left out.

    Raises:
        OutputError: A line before the last is damaged.
    """
    return list(read_journal(file))


def _halves(numbers: list[float]) -> tuple[list[float], list[float]]:
    half = len(numbers) // 2
    return numbers[:half], numbers[half:]


def versions() -> dict[str, str]:
    """What the run was made with: packages, Python, platform, processor and command line."""
    installed = {name: importlib.metadata.version(name) for name in _PACKAGES if _installed(name)}
    return installed | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": str(torch.get_num_threads()),
        "command": shlex.join([_program(), *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _program() -> str:
    """The program that runs, without the folder of this machine in which it lies."""
    name = Path(sys.argv[0]).name
    return "vlv" if name == "__main__.py" else name


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _in_short(values: Mapping[str, float]) -> Iterator[str]:
    """What of a log line stands beside the progress bar."""
    yield f"loss {values.get('loss', math.nan):.4f}"  # none if every step since the last line was skipped
    yield f"{values['images_per_second']:.1f} img/s"
    if "mfu" in values:
        yield f"{100 * values['mfu']:.0f} % MFU"
    if "cost_usd" in values:
        yield f"{values['cost_usd']:.2f} USD"


def _step_of(file: Path) -> int:
    """The step in the name of a sample, such as 0001000.png; -1 where there is none."""
    digits = re.match(r"\d+", file.name)
    return int(digits[0]) if digits else -1
