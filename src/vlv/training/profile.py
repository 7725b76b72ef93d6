"""Where the time of a training step goes.

The run's own loop does the steps; marks at the seams between the parts divide all of the time among them, so that the
shares add up to the step. On a GPU the marks are events in its stream: nobody waits for them, and time in which the GPU
waits for data is booked under data.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlv.errors import ConfigError
from vlv.storage import write_text
from vlv.training.assemble import feed, load_parts, prepare
from vlv.training.distributed import join_world
from vlv.training.feeding import find_data
from vlv.training.flops import FlopMeter, peak_flops
from vlv.training.loop import fit
from vlv.training.objective import Batch, Loader, Losses
from vlv.training.precision import fast_products
from vlv.training.recompute import choose_recomputation

if TYPE_CHECKING:
    from vlv.config import LoopConfig, OptimConfig, RunConfig
    from vlv.training.stages import Stage1, Stage2

_WARM_UP = 3
_OTHER = "other"


@dataclass(frozen=True)
class Profile:
    """Of one optimiser step, on average."""

    steps: int
    """Steps that were timed."""
    images: int
    """Images of one step."""
    seconds: dict[str, float]
    """Seconds by part; their sum is the step."""
    flops_per_image: float | None
    """See `vlv.training.flops`."""
    mfu: float | None
    """Share of the device's peak; None where the peak is not known."""

    @property
    def step_seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        """Of this process."""
        return self.images / self.step_seconds

    def __str__(self) -> str:
        total = self.step_seconds
        lines = [f"{'part':<22}{'ms':>10}{'share':>9}"]
        for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            lines.append(f"{name:<22}{1e3 * seconds:>10.1f}{seconds / total:>9.1%}")
        lines.append(f"{'step':<22}{1e3 * total:>10.1f}{1:>9.1%}")
        speed = f"{self.images} images per step, {self.images_per_second:.2f} images/s"
        if self.flops_per_image is not None:
            rate = self.flops_per_image * self.images_per_second
            speed += (
                f", {self.flops_per_image / 1e9:.3g} GFLOP per image, {rate / 1e12:.3g} TFLOP/s"
            )
        if self.mfu is not None:
            speed += f", MFU {self.mfu:.1%}"
        return "\n".join([*lines, speed])

    def write(self, file: Path) -> None:
        """As JSON."""
        value = {
            **asdict(self),
            "step_seconds": self.step_seconds,
            "images_per_second": self.images_per_second,
        }
        write_text(file, json.dumps(value, indent=1) + "\n")


class Timeline:
    """Time divided among labels: each mark ends the one before.

    Args:
        device: A GPU's time is that of its stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, label: str) -> str:
        """From now on the time is that of `label`; returns the label before."""
        if self._on_gpu:
            stamp: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            stamp.record()
        else:
            stamp = time.perf_counter()
        before = self._marks[-1][0] if self._marks else _OTHER
        self._marks.append((label, stamp))
        return before

    def restart(self) -> None:
        """Forget everything before the last mark."""
        del self._marks[:-1]

    def seconds(self) -> dict[str, float]:
        """Seconds by label up to the last mark."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (label, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            passed = start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
            found[label] = found.get(label, 0.0) + passed
        return found


class _Finished(Exception):  # noqa: N818
    """Enough steps were timed."""


class _TimedLoader:
    """Hands batches on, books the waiting for them, and ends the profile."""

    def __init__(
        self, loader: Loader, timeline: Timeline, passes: int, steps: int, trace: Path | None
    ) -> None:
        self._loader, self._timeline, self._trace = loader, timeline, trace
        self._first, self._last = _WARM_UP * passes, (_WARM_UP + steps) * passes
        self._end = self._last + (passes if trace else 0)

    def __iter__(self) -> Iterator[Batch]:
        profiler: Any = None
        batches = iter(self._loader)
        for number in range(self._end + 1):
            self._timeline.mark("data")
            if number == self._first:
                self._timeline.restart()
            if number == self._last:
                self.seconds = self._timeline.seconds()
                if self._trace is not None:
                    profiler = torch.profiler.profile()
                    profiler.start()
            if number == self._end:
                break
            batch = next(batches)
            self.batch = batch
            self._timeline.mark(_OTHER)
            yield batch
        if profiler is not None:
            profiler.stop()
            profiler.export_chrome_trace(str(self._trace))
        raise _Finished

    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loader.load_state_dict(state)


class _TimedObjective:
    """An objective whose backward pass is followed by the optimiser."""

    def __init__(self, objective: Stage1 | Stage2, timeline: Timeline) -> None:
        self._objective, self._timeline = objective, timeline
        self.module = objective.module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """The objective's, with marks."""
        self._timeline.mark(_OTHER)
        losses = self._objective.loss(batch, generator)
        losses.total.register_hook(self._backward_begins)  # type: ignore[no-untyped-call]
        return losses

    def _backward_begins(self, _: Tensor) -> None:
        self._timeline.mark(_OTHER)
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self._timeline.mark("optimiser"))


@contextmanager
def watched(objective: Stage1 | Stage2, timeline: Timeline) -> Iterator[None]:
    """Mark where each part begins and ends, in both directions."""
    decoder: Any = objective.decoder
    caption_decoder = getattr(objective, "caption_decoder", None)
    seams = [
        (objective.encoder, "forward", "encoder"),
        (decoder, "context", "text tower"),
        (decoder, "posterior", "VAE"),
        (decoder, "_predict", "U-Net"),
        (caption_decoder, "loss", "LLM"),
    ]
    present = [seam for seam in seams if seam[0] is not None]
    for owner, method, label in present:
        setattr(owner, method, _marked(getattr(owner, method), label, timeline))
    try:
        yield
    finally:
        for owner, method, _ in present:
            delattr(owner, method)


def _marked(method: Callable[..., Any], label: str, timeline: Timeline) -> Callable[..., Any]:
    forward = label if label == "VAE" else f"{label} forward"

    def begins(_: Tensor) -> None:
        timeline.mark(f"{label} backward")

    def call(*args: Any, **kwargs: Any) -> Any:
        outer = timeline.mark(forward)
        result = method(*args, **kwargs)
        timeline.mark(outer)
        if isinstance(result, Tensor) and result.requires_grad:
            result.register_hook(begins)  # type: ignore[no-untyped-call]
        return result

    return call


def profile_training(
    objective: Stage1 | Stage2,
    loader: Loader,
    loop: LoopConfig,
    optim: OptimConfig,
    run_dir: Path,
    steps: int,
    *,
    trace: bool = False,
) -> Profile:
    """Time the first steps of a run; what they learn is thrown away, and nothing of the run is touched.

    Args:
        objective: Its weights change.
        loader: Of the run.
        loop: Of the run; it does not log, evaluate or save meanwhile.
        optim: Of the run.
        run_dir: Gets profile.json, and trace.json.
        steps: Optimiser steps to time, after three to warm up.
        trace: Also write every operation of one more step, for chrome://tracing or Perfetto.

    Returns:
        The profile.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timeline = Timeline(device)
    never = max(loop.steps, _WARM_UP + steps + 2)
    quiet = loop.model_copy(
        update={
            "steps": never,
            "log_every": never,
            "eval_every": None,
            "sample_every": None,
            "save_every": never,
            "save_every_seconds": None,
            "trackers": [],
        }
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    where = run_dir / "trace.json" if trace else None
    passes = loop.passes_per_step()
    timed = _TimedLoader(loader, timeline, passes, steps, where)
    flops = FlopMeter(objective)
    scratch = tempfile.TemporaryDirectory()
    with scratch as folder, watched(objective, timeline), suppress(_Finished):
        fit(_TimedObjective(objective, timeline), timed, quiet, optim, Path(folder))
    images = loop.batch_size * passes
    seconds = {name: value / steps for name, value in timed.seconds.items()}
    count, peak = flops.per_image({**timed.batch, "step": 0}), peak_flops(device, loop.peak_tflops)
    rate = images / sum(seconds.values())
    mfu = None if count is None or peak is None else count * rate / peak
    found = Profile(steps, images, seconds, count, mfu)
    found.write(run_dir / "profile.json")
    return found


def profile_run(config: RunConfig, run_dir: Path, steps: int, *, trace: bool = False) -> Profile:
    """Find out where the time of a run's step goes; nothing is learnt, see `profile_training`.

    Args:
        config: The run.
        run_dir: Gets profile.json, and trace.json.
        steps: Steps to time.
        trace: Also write every operation of one step.

    Raises:
        ConfigError: Several processes were launched.
    """
    world = join_world()
    if world.num_ranks > 1:
        raise ConfigError(
            f"a profile is that of one process, but {world.num_ranks} were launched; launch one"
        )
    found, parts = find_data(config.data), load_parts(config)
    objective = prepare(config, parts, world.device)
    choose_recomputation(objective, config.data.image_size, config.loop, config.optim, world)
    with (
        fast_products(tf32=config.loop.tf32),
        feed(config, parts, found, run_dir, world) as loader,
    ):
        return profile_training(
            objective, loader, config.loop, config.optim, run_dir, steps, trace=trace
        )
