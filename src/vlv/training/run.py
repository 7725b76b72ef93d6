"""The state of a run, and each thing that the loop does to it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vlv.config import FORMER_SETTINGS, FREE_ON_RESUME, LoopConfig, OptimConfig, default_of
from vlv.errors import CheckpointError, ConfigError, DataError, OutputError
from vlv.training.checkpoint import latest_checkpoint, save_checkpoint
from vlv.training.clock import Clock
from vlv.training.journal import Journal, Meter
from vlv.training.objective import Batch, Evaluate, FitResult, Loader, Objective, Sample, to_device
from vlv.training.optim import MovingAverage, Optimizer, trainable_parameters
from vlv.training.rng import decode, encode, preserved_rng, rng_state, set_rng_state
from vlv.training.weights import changing_buffers, load_weights, on_device, set_train_mode

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

_MAX_FAILED_SAVES = 3


class Run:
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
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1:
            raise ConfigError(
                f"{self.accelerator.num_processes} processes were launched, but training runs in one; launch one"
            )
        self.objective, self.loader, self.config, self.optim = objective, loader, config, optim
        self.run_dir, self.settings = run_dir, settings
        self.module = on_device(objective.module, self.accelerator.device)
        self.parameters = trainable_parameters(self.module)
        self.optimizer = Optimizer(self.parameters, optim, config.steps)
        self.average = MovingAverage(self.parameters, config.ema) if config.ema else None
        self.generator = torch.Generator().manual_seed(config.seed)
        self.meter = Meter()
        self.step = self.bad_steps = self.skipped_steps = self.failed_saves = 0
        self.pending: list[dict[str, Tensor]] = []
        processes = self.accelerator.num_processes
        self.accelerator.gradient_accumulation_steps = config.passes_per_step(processes)
        self.clock = Clock(config.steps, processes, config.usd_per_gpu_hour)
        self.last_save = time.monotonic()

    # --- one step

    def forward_backward(self, batch: Batch) -> None:
        """Add the gradient of one batch."""
        rows = len(next(iter(batch.values())))
        if rows != self.config.batch_size:
            raise DataError(
                f"the loader hands out {rows} rows, but loop.batch_size is {self.config.batch_size}"
            )
        device = self.accelerator.device
        batch = to_device(batch, device) | {"step": self.step}
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            losses = self.objective.loss(batch, self.generator)
        self.accelerator.backward(losses.total)
        parts = {"loss": losses.total, **losses.parts}
        self.pending.append({name: value.detach() for name, value in parts.items()})
        self.meter.images += rows * self.accelerator.num_processes

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
        self.meter.seconds += self.clock.tick()
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

    def set_train_mode(self) -> None:
        """Dropout where it belongs."""
        set_train_mode(self.module, everything=self.config.train_mode == "all")

    # --- looking

    def log(self) -> None:
        """One line with the means since the last one."""
        lr = self.optim.lr * self.optimizer.factor(self.step - 1)
        values = {**self.meter.means(), "lr": lr, "skipped_steps": self.skipped_steps}
        if torch.cuda.is_available():
            values["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.journal.write("train", self.step, values | self.clock.figures(self.step))
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
        self.journal.show(self.step, folder)

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Eval mode, no gradients, averaged weights; the random draws and the clock of training stand still."""
        swapped = self.average.swapped_in() if self.average is not None else nullcontext()
        with preserved_rng(), swapped, torch.no_grad():
            self.module.eval()
            yield
        self.set_train_mode()
        self.clock.tick()

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
            **self.clock.state_dict(),
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
        load_weights(
            self.module, checkpoint.tensors("trainable"), checkpoint, must_hold=set(self.parameters)
        )
        self.optimizer.load_tensors(checkpoint.tensors("optimizer"))
        if self.average is not None:
            self.average.load_tensors(checkpoint.tensors("ema"))
        self.step, self.bad_steps = state["step"], state["bad_steps"]
        self.skipped_steps = state["skipped_steps"]
        self.clock.load_state_dict(state, self.step)
        self.meter.load_state_dict(state["meter"], self.accelerator.device)
        self.loader.load_state_dict(state["loader"])
        self.generator.set_state(decode(state["generator"]))
        set_rng_state(state["rng"])

    def open_journal(self) -> Journal:
        """The records of the run folder, cut to the present step."""
        journal = Journal(
            self.run_dir,
            self.settings,
            total_steps=self.config.steps,
            step=self.step,
            trackers=self.config.trackers,
        )
        self.clock.was_paid(journal.device_hours)
        return journal

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


def _refuse_other_settings(saved: dict[str, Any], now: dict[str, Any], run_dir: Path) -> None:
    """Name the first setting that differs from the one the run was started with.

    A setting that did not exist then had what is its default now.
    """
    before, after = _flat(saved), _flat(now)
    for key in sorted((before.keys() | after.keys()) - FREE_ON_RESUME - FORMER_SETTINGS):
        old, new = (side[key] if key in side else default_of(key) for side in (before, after))
        if old != new:
            raise CheckpointError(
                f"{key} is {new!r}, but the run in {run_dir} was started with {old!r}; "
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
