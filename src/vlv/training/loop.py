"""The training loop, for every objective of the project.

An `Objective` says what trains and which loss; a loader hands out batches for ever and knows its position; `fit`
does the rest: arithmetic precision, accumulation, clipping, schedule, log, evaluation, checkpoints, resuming.
"""

from __future__ import annotations

import fcntl
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vlv.config import FREE_ON_RESUME, LoopConfig, OptimConfig
from vlv.errors import CheckpointError, ConfigError, DataError, OutputError
from vlv.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from vlv.training.journal import Journal, Meter
from vlv.training.optim import MovingAverage, Optimizer, trainable_parameters
from vlv.training.rng import (
    decode,
    encode,
    preserved_rng,
    rng_state,
    seed_everything,
    set_rng_state,
)

if TYPE_CHECKING:
    from types import FrameType

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
Evaluate = Callable[[int], dict[str, float]]
Sample = Callable[[int, Path], None]

_MAX_FAILED_SAVES = 3


@dataclass(frozen=True)
class Losses:
    """What an objective returns for one batch."""

    total: Tensor
    """Scalar to be minimised."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """Scalars for the log, by name."""


class Objective(Protocol):
    """What trains, and which loss."""

    @property
    def module(self) -> nn.Module:
        """Everything that is used; the parameters that require a gradient are trained and saved."""

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Loss of one batch; every random draw comes from `generator` (on the CPU)."""


class Loader(Protocol):
    """An endless stream of batches that knows its position."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present position on."""

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed out, as JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""


@dataclass(frozen=True)
class FitResult:
    """How a run stands."""

    step: int
    """Optimiser steps done."""
    finished: bool
    """Whether these are all."""
    metrics: dict[str, float]
    """Last value of everything in metrics.jsonl."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal or its time limit; its state is saved and the same command goes on."""

    def __init__(self, message: str, result: FitResult) -> None:
        super().__init__(message)
        self.result = result


def fit(
    objective: Objective,
    loader: Loader,
    config: LoopConfig,
    optim: OptimConfig,
    run_dir: Path,
    *,
    evaluate: Evaluate | None = None,
    sample: Sample | None = None,
    max_seconds: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> FitResult:
    """Train until `config.steps`, going on from the newest good checkpoint in `run_dir`; a finished run is left alone.

    On return `objective.module` holds the final weights (their moving average, if there is one) in eval mode. The same
    settings, data and thread count give the same weights, however often the run was interrupted (bit-equal on CPU).

    Args:
        objective: What trains, and which loss.
        loader: Endless batches of `config.batch_size` rows.
        config: Length, precision, and when to log, evaluate and save.
        optim: The optimiser.
        run_dir: Folder of the run; created.
        evaluate: Called with the step; its figures go to metrics.jsonl. Runs in eval mode, without gradients, with
            the averaged weights, and cannot disturb the random draws of training. `sample` likewise.
        sample: Called with the step and the folder for pictures.
        max_seconds: Stop and save after this time, as an interrupt does.
        settings: The rest of the run's configuration (JSON values): saved, and compared when a run goes on.

    Raises:
        Interrupted: SIGINT, SIGTERM, SIGUSR1 or `max_seconds`; the state is saved.
        CheckpointError: The folder belongs to another configuration, or all its checkpoints are damaged.
        ConfigError: Nothing to train, or settings that contradict each other.
        DataError: The loader ended, or its batches have another size.
        OutputError: Another process trains in `run_dir`, or checkpoints cannot be written.
    """
    resolved = {
        **(settings or {}),
        "loop": config.model_dump(mode="json"),
        "optim": optim.model_dump(mode="json"),
    }
    with ExitStack() as stack:
        stack.enter_context(_lock(run_dir))
        stack.enter_context(preserved_rng())
        stop = stack.enter_context(_StopRequests(max_seconds))
        seed_everything(config.seed)
        run = _Run(objective, loader, config, optim, run_dir, resolved)
        run.resume()
        run.journal = stack.enter_context(run.open_journal())
        if run.step < config.steps:
            _train(run, stop, evaluate, sample)
        run.hand_over_weights()
        return run.result()


def _train(
    run: _Run, stop: _StopRequests, evaluate: Evaluate | None, sample: Sample | None
) -> None:
    """The loop: one turn is one forward and backward pass, and at the end of a step everything that is due."""
    set_train_mode(run.module)
    for batch in run.loader:
        with run.accelerator.accumulate():
            run.forward_backward(batch)
        if not run.accelerator.sync_gradients:
            continue
        run.update()
        config, last = run.config, run.step == run.config.steps
        if last or _due(run.step, config.log_every):
            run.log()
        if evaluate is not None and (last or _due(run.step, config.eval_every)):
            run.evaluate(evaluate)
        if sample is not None and (last or _due(run.step, config.sample_every)):
            run.sample(sample)
        if last or stop.reason or _due(run.step, config.save_every) or run.save_is_overdue():
            run.save(must_succeed=last or bool(stop.reason))
        if last:
            return
        if stop.reason:
            raise Interrupted(
                f"{stop.reason} at step {run.step} of {config.steps}; the state is saved in {run.run_dir}, "
                "and the same command goes on from there",
                run.result(),
            )
    raise DataError(
        f"the data ended after {run.step} of {run.config.steps} steps; the loader must repeat it"
    )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class _Run:
    """The state of a run, and each thing that is done to it."""

    journal: Journal

    def __init__(
        self,
        objective: Objective,
        loader: Loader,
        config: LoopConfig,
        optim: OptimConfig,
        run_dir: Path,
        settings: dict[str, Any],
    ) -> None:
        # The precision is not given to Accelerator: it would be fixed for the whole process.
        self.accelerator = Accelerator(gradient_accumulation_steps=config.accumulate)
        if self.accelerator.num_processes > 1:
            raise ConfigError(
                f"{self.accelerator.num_processes} processes were launched, but training runs in one; launch one"
            )
        self.objective, self.loader, self.config, self.optim = objective, loader, config, optim
        self.run_dir, self.settings = run_dir, settings
        self.module = objective.module.to(self.accelerator.device)
        self.parameters = trainable_parameters(self.module)
        self.optimizer = Optimizer(self.parameters, optim, config.steps)
        self.average = MovingAverage(self.parameters, config.ema) if config.ema else None
        self.generator = torch.Generator().manual_seed(config.seed)
        self.meter = Meter()
        self.step = self.bad_steps = self.skipped_steps = self.failed_saves = 0
        self.pending: list[dict[str, Tensor]] = []
        self.elapsed_seconds = 0.0
        self.clock = self.last_save = time.monotonic()

    # --- one step

    def forward_backward(self, batch: Batch) -> None:
        """Add the gradient of one batch."""
        rows = len(next(iter(batch.values())))
        if rows != self.config.batch_size:
            raise DataError(
                f"the loader hands out {rows} rows, but loop.batch_size is {self.config.batch_size}"
            )
        device = self.accelerator.device
        batch = {
            k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v
            for k, v in batch.items()
        }
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            losses = self.objective.loss(batch, self.generator)
        self.accelerator.backward(losses.total)
        self.pending.append({"loss": losses.total.detach(), **losses.parts})
        self.meter.images += rows

    def update(self) -> None:
        """Clip, step, average; or skip the step if the loss or gradient is not finite."""
        norm = self.accelerator.clip_grad_norm_(
            self.parameters.values(), self.optim.clip or math.inf
        )
        loss = torch.stack([values["loss"] for values in self.pending]).sum()
        if bool(torch.isfinite(norm + loss)):  # the one wait for the device in a step
            self.optimizer.step(self.step)
            if self.average is not None:
                self.average.update(self.step)
            for values in self.pending:
                self.meter.add(values)
            self.meter.add({"grad_norm": norm})
            self.bad_steps = 0
        else:
            self._count_bad_step()
        self.pending.clear()
        self.optimizer.zero_grad()
        self.step += 1
        self._tick()
        self.journal.tick()

    def _count_bad_step(self) -> None:
        self.bad_steps += 1
        self.skipped_steps += 1
        logger.warning(
            "step %d: the loss or its gradient is not finite; the step is skipped", self.step + 1
        )
        if self.bad_steps >= self.config.max_bad_steps:
            raise ConfigError(
                f"the loss or its gradient was not finite in {self.bad_steps} steps in a row up to step "
                f"{self.step + 1}; lower optim.lr (now {self.optim.lr}) or set loop.precision to fp32"
            )

    def _tick(self) -> None:
        """Book the time since the last call as training time."""
        now = time.monotonic()
        self.meter.seconds += now - self.clock
        self.elapsed_seconds += now - self.clock
        self.clock = now

    # --- looking

    def log(self) -> None:
        """One line with the means since the last one."""
        lr = self.optim.lr * self.optimizer.factor(self.step - 1)
        values = {**self.meter.means(), "lr": lr, "skipped_steps": self.skipped_steps}
        self.journal.write(
            "train", self.step, values | {"elapsed_seconds": round(self.elapsed_seconds, 2)}
        )
        self.meter.reset()

    def evaluate(self, evaluate: Evaluate) -> None:
        """One line with the figures of the evaluation."""
        with self._looking():
            values = evaluate(self.step)
        if values:
            self.journal.write("eval", self.step, values)

    def sample(self, sample: Sample) -> None:
        """Pictures into samples/."""
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        with self._looking():
            sample(self.step, folder)

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Eval mode, no gradients, averaged weights; the random draws and the clock of training stand still."""
        swapped = self.average.swapped_in() if self.average is not None else nullcontext()
        with preserved_rng(), swapped, torch.no_grad():
            self.module.eval()
            yield
        set_train_mode(self.module)
        now = time.monotonic()
        self.elapsed_seconds += now - self.clock
        self.clock = now

    # --- saving and resuming

    def save_is_overdue(self) -> bool:
        """Whether `save_every_seconds` have gone by since the last checkpoint."""
        limit = self.config.save_every_seconds
        return limit is not None and time.monotonic() - self.last_save >= limit

    def save(self, *, must_succeed: bool) -> None:
        """Write a checkpoint; a full disk is survived a few times, as the one before is still there."""
        tensors = {"trainable": self._weights(), "optimizer": self.optimizer.tensors()}
        if self.average is not None:
            tensors["ema"] = self.average.averages
        self.last_save = time.monotonic()
        try:
            self.journal.flush()
            save_checkpoint(
                self._checkpoints, tensors, self._state(), keep_last=self.config.keep_last
            )
        except OSError as error:
            self.failed_saves += 1
            logger.warning("step %d: the checkpoint could not be saved: %s", self.step, error)
            if must_succeed or self.failed_saves >= _MAX_FAILED_SAVES:
                raise OutputError(
                    f"the checkpoint of step {self.step} could not be saved in {self._checkpoints} ({error}); "
                    "make room and run the same command again"
                ) from error
        else:
            self.failed_saves = 0

    @property
    def _checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def _weights(self) -> dict[str, Tensor]:
        """Trained parameters, and the buffers that a module in train mode may change."""
        return {**self.parameters, **changing_buffers(self.module)}

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "bad_steps": self.bad_steps,
            "elapsed_seconds": self.elapsed_seconds,
            "meter": self.meter.state_dict(),
            "loader": self.loader.state_dict(),
            "generator": encode(self.generator.get_state()),
            "rng": rng_state(),
            "settings": self.settings,
        }

    def resume(self) -> None:
        """Go on from the newest good checkpoint, if there is one."""
        checkpoint = latest_checkpoint(self._checkpoints)
        if checkpoint is None:
            return
        state = checkpoint.state
        _refuse_other_settings(state["settings"], self.settings, self.run_dir)
        _load_weights(
            self.module, checkpoint.tensors("trainable"), checkpoint, must_hold=set(self.parameters)
        )
        self.optimizer.load_tensors(checkpoint.tensors("optimizer"))
        if self.average is not None:
            self.average.load_tensors(checkpoint.tensors("ema"))
        self.step, self.bad_steps = state["step"], state["bad_steps"]
        self.skipped_steps, self.elapsed_seconds = state["skipped_steps"], state["elapsed_seconds"]
        self.meter.load_state_dict(state["meter"], self.accelerator.device)
        self.loader.load_state_dict(state["loader"])
        self.generator.set_state(decode(state["generator"]))
        set_rng_state(state["rng"])

    def open_journal(self) -> Journal:
        """The records of the run folder, cut to the present step."""
        return Journal(
            self.run_dir,
            self.settings,
            total_steps=self.config.steps,
            step=self.step,
            tensorboard=self.config.tensorboard,
        )

    def hand_over_weights(self) -> None:
        """Leave the module as it should be used."""
        if self.average is not None:
            self.average.copy_to_parameters(self.average.averages)
        self.module.eval()

    def result(self) -> FitResult:
        """How the run stands."""
        metrics = {
            key: value for key, value in self.journal.latest.items() if key not in {"step", "kind"}
        }
        return FitResult(self.step, self.step == self.config.steps, metrics)


def set_train_mode(module: nn.Module) -> None:
    """Train mode, except for submodules whose parameters are all frozen: they keep eval mode (no dropout, no drift)."""
    module.train()
    for part in module.modules():
        parameters = list(part.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            part.eval()


def changing_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers of submodules that train, such as running means of batch norms."""
    trained = {
        f"{name}.{buffer}" if name else buffer
        for name, part in module.named_modules()
        if any(p.requires_grad for p in part.parameters())
        for buffer, _ in part.named_buffers(recurse=False)
    }
    persistent = module.state_dict(keep_vars=True)
    return {name: persistent[name] for name in sorted(trained & persistent.keys())}


def load_trained(module: nn.Module, run_dir: Path, *, ema: bool = True, part: str = "") -> int:
    """Load the weights of a run's newest good checkpoint into a module; return their step.

    Args:
        module: Gets the weights; parameters that were not trained keep their values.
        run_dir: Folder of the run.
        ema: Prefer the moving average, where the run kept one.
        part: Only the weights below this name, such as "encoder", into a module that is that part.

    Raises:
        CheckpointError: There is no checkpoint, or it does not fit the module.
    """
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{run_dir} has no checkpoint; train the run first")
    weights = checkpoint.tensors("trainable") | (checkpoint.tensors("ema") if ema else {})
    if part:
        prefix = f"{part}."
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        if not weights:
            raise CheckpointError(
                f"{checkpoint.path} holds no weights of {part!r}; they were not trained"
            )
    _load_weights(module, weights, checkpoint, must_hold=set())
    return checkpoint.step


@torch.no_grad()
def _load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], checkpoint: Checkpoint, *, must_hold: set[str]
) -> None:
    """Copy weights by name; none may be unknown or of another shape, and `must_hold` may not be missing."""
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    if missing := must_hold - weights.keys():
        raise CheckpointError(
            f"{checkpoint.path} lacks {min(missing)}; it belongs to another model"
        )
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            there = tuple(own[name].shape) if name in own else "absent"
            raise CheckpointError(
                f"{checkpoint.path} holds {name} {tuple(value.shape)}, which is {there} in this model; "
                "it belongs to another model"
            )
    for name, value in weights.items():
        own[name].copy_(value)


def _refuse_other_settings(saved: dict[str, Any], now: dict[str, Any], run_dir: Path) -> None:
    """Name the first setting that differs from the one the run was started with."""
    before, after = _flat(saved), _flat(now)
    for key in sorted(before.keys() | after.keys()):
        if key not in FREE_ON_RESUME and before.get(key) != after.get(key):
            raise CheckpointError(
                f"{key} is {after.get(key)!r}, but the run in {run_dir} was started with {before.get(key)!r}; "
                "put it back to go on, or name another run folder to start a new run"
            )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    """Make the run folder, and keep other processes out of it; the system frees the lock when a process dies."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"another process is training in {run_dir}; wait for it or name another folder"
            ) from error
        yield


class _StopRequests:
    """Turns the first SIGINT, SIGTERM or SIGUSR1, and the time limit, into `reason`; a second signal acts at once."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, max_seconds: float | None) -> None:
        self._deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
        self._received = ""
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str:
        """Why to stop, or nothing."""
        if self._received:
            return self._received
        return "the time limit was reached" if time.monotonic() >= self._deadline else ""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._receive) for number in self._SIGNALS
            }
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = f"{signal.Signals(number).name} was received"
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
