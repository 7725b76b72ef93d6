"""Where the time of a training step goes.

Marks at the seams between the parts divide all of the time among them, so that the shares add up to the step. On a GPU the
marks are events in its stream: nobody waits for them, and time in which the GPU waits for data counts as data.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlv.config import LoopConfig, OptimConfig, RunConfig
from vlv.errors import ConfigError
from vlv.models.draws import RowGenerator
from vlv.storage import write_text
from vlv.training.assemble import feed, load_parts, prepare
from vlv.training.distributed import World, join_world
from vlv.training.feeding import find_data
from vlv.training.microbatches import with_targets
from vlv.training.objective import Batch, Loader, Losses
from vlv.training.precision import fast_products
from vlv.training.prediction import FlopMeter, peak_flops
from vlv.training.recompute import choose_recomputation
from vlv.training.stage3 import Stage
from vlv.training.step import TrainingStep
from vlv.training.weights import set_train_mode

_WARM_UP = 3
_OTHER = "other"


@dataclass(frozen=True)
class Profile:
    """One optimiser step, on average."""

    steps: int
    """Steps that were timed."""
    images: int
    """Images of one step."""
    seconds: dict[str, float]
    """Seconds by part; their sum is the step."""
    flops_per_image: float | None
    """See `vlv.training.prediction`."""
    mfu: float | None
    """Share of the device's peak; None where the peak is not known."""

    @property
    def step_seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        """Speed of this process."""
        return self.images / self.step_seconds

    def __str__(self) -> str:
        total = self.step_seconds
        rows = [*sorted(self.seconds.items(), key=lambda item: -item[1]), ("step", total)]
        lines = [f"{'part':<22}{'ms':>10}{'share':>9}"]
        lines += [f"{name:<22}{1e3 * s:>10.1f}{s / total:>9.1%}" for name, s in rows]
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
        """Write it as JSON."""
        rates = {"step_seconds": self.step_seconds, "images_per_second": self.images_per_second}
        write_text(file, json.dumps(asdict(self) | rates, indent=1) + "\n")


class Timeline:
    """Time divided among labels: each mark ends the one before."""

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


@contextmanager
def watched(objective: Stage, step: TrainingStep, timeline: Timeline) -> Iterator[None]:
    """Mark where each part of a step begins and ends, in both directions."""
    decoder, reader = objective.decoder, getattr(objective, "caption_decoder", None)
    seams: list[tuple[Any, str, str]] = [
        (objective.encoder, "forward", "encoder"),
        (decoder, "context", "text tower"),
        (decoder, "posterior", "VAE"),
        (decoder, "_predict", "U-Net"),
    ]
    if reader is not None:
        seams.append((reader, "loss_of_tokens", "LLM"))
    with ExitStack() as stack:
        for owner, method, label in seams:
            wrapped = _marked(getattr(owner, method), label, timeline)
            stack.enter_context(_replaced(owner, method, wrapped))
        loss = objective.loss

        def marked_loss(*args: Any) -> Losses:
            losses = loss(*args)
            losses.total.register_hook(lambda _: timeline.mark(_OTHER) and None)  # type: ignore[no-untyped-call]
            return losses

        stack.enter_context(_replaced(objective, "loss", marked_loss))
        clip = step.optimizer.clip

        def marked_clip() -> Tensor:
            timeline.mark("optimiser")
            return clip()

        stack.enter_context(_replaced(step.optimizer, "clip", marked_clip))
        yield


@contextmanager
def _replaced(owner: Any, method: str, by: Callable[..., Any]) -> Iterator[None]:
    setattr(owner, method, by)
    try:
        yield
    finally:
        delattr(owner, method)


def _marked(method: Callable[..., Any], label: str, timeline: Timeline) -> Callable[..., Any]:
    forward = label if label == "VAE" else f"{label} forward"

    def begins(_: Tensor) -> None:
        timeline.mark(f"{label} backward")

    def call(*args: Any, **kwargs: Any) -> Any:
        outer = timeline.mark(forward)
        result = method(*args, **kwargs)
        timeline.mark(outer)
        tensor = getattr(result, "sequence", result)  # a context holds one
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(begins)  # type: ignore[no-untyped-call]
        return result

    return call


def _draws(loop: LoopConfig, step: int, number: int) -> RowGenerator:
    """The random numbers of one pass of a step."""
    first = number * loop.batch_size
    return RowGenerator(loop.seed, step, range(first, first + loop.batch_size))


def profile_training(
    objective: Stage,
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
        objective: On its device; its weights change.
        loader: The run's.
        loop: The run's.
        optim: The run's.
        run_dir: Gets profile.json, and trace.json.
        steps: Optimiser steps to time, after three to warm up.
        trace: Also write every operation of one more step, for chrome://tracing or Perfetto.
    """
    device = next(objective.module.parameters()).device
    peak = peak_flops(device, loop.peak_tflops, precision=loop.precision, tf32=loop.tf32)
    meter, timeline, passes = FlopMeter(objective), Timeline(device), loop.passes_per_step()
    step = TrainingStep(objective, loop, optim, World(0, 1, device))
    set_train_mode(step.module, everything=loop.train_mode == "all")
    stream = iter(loader)

    def take_step(number: int) -> Batch:
        timeline.mark("data")
        if number == _WARM_UP:
            timeline.restart()
        taken = islice(stream, passes)
        batches = [
            with_targets(batch, objective, loop.batch_size, _draws(loop, number, index))
            for index, batch in enumerate(taken)
        ]
        timeline.mark(_OTHER)
        step(batches, number)
        return batches[0]

    with watched(objective, step, timeline):
        for number in range(_WARM_UP + steps):
            batch = take_step(number)
        timeline.mark("data")
        seconds = {name: value / steps for name, value in timeline.seconds().items()}
        if trace:
            with torch.profiler.profile() as profiler:
                take_step(_WARM_UP + steps)
            run_dir.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(run_dir / "trace.json"))
    images, count = loop.batch_size * passes, meter.per_image({**batch, "step": 0})
    rate = images / sum(seconds.values())
    mfu = None if count is None or peak is None else count * rate / peak
    found = Profile(steps, images, seconds, count, mfu)
    found.write(run_dir / "profile.json")
    return found


def profile_run(config: RunConfig, run_dir: Path, steps: int, *, trace: bool = False) -> Profile:
    """Find out where the time of a run's step goes; nothing is learnt, see `profile_training`.

    Raises:
        ConfigError: Several processes were launched.
    """
    world = join_world()
    if world.num_ranks > 1:
        raise ConfigError(
            f"a profile is that of one process, but {world.num_ranks} were launched; launch one"
        )
    loop, optim = config.loop, config.optim
    found, parts = find_data(config.data), load_parts(config)
    objective = prepare(config, parts, world.device)
    choose_recomputation(objective, config.data.image_size, loop, optim, world)
    with fast_products(tf32=loop.tf32), feed(config, parts, found, run_dir, world) as loader:
        return profile_training(objective, loader, loop, optim, run_dir, steps, trace=trace)
