"""The state of a run, and each thing that the loop does to it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlv.config import FORMER_SETTINGS, FREE_ON_RESUME, LoopConfig, OptimConfig, default_of
from vlv.data.positions import merge_states
from vlv.errors import CheckpointError, ConfigError, DataError, OutputError
from vlv.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    reopen_checkpoint,
    save_checkpoint,
)
from vlv.training.clock import Clock
from vlv.training.distributed import World, join_world, others_may_end
from vlv.training.flops import FlopMeter, peak_flops
from vlv.training.hollow import without_numbers
from vlv.training.journal import Journal, Meter, SilentJournal
from vlv.training.objective import Batch, Evaluate, FitResult, Loader, Objective, Sample
from vlv.training.optim import BadSteps, MovingAverage, Optimizer, trainable_parameters
from vlv.training.passes import Forward, Passes, num_rows
from vlv.training.rng import preserved_rng
from vlv.training.sharding import put_together, shard, undo_sharding, uses_fsdp, whole_weights
from vlv.training.weights import changing_buffers, load_weights, on_device, set_train_mode

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

_FORMAT = 2


class Run:
    """The state of a run, and each thing that is done to it."""

    journal: Journal | SilentJournal

    def __init__(
        self,
        objective: Objective,
        loader: Loader,
        config: LoopConfig,
        optim: OptimConfig,
        run_dir: Path,
        settings: dict[str, Any],
        world: World | None = None,
    ) -> None:
        self.world = world or join_world()
        self.objective, self.loader, self.config, self.optim = objective, loader, config, optim
        self.run_dir, self.settings = run_dir, settings
        self.module = on_device(objective.module, self.world.device)
        self.model = Forward(objective)
        is_dealt_out = uses_fsdp(config, self.world)
        # a share of the weights cannot be counted, nor can the first process compute without the others
        self.flops = FlopMeter(without_numbers(objective) if is_dealt_out else objective)
        if is_dealt_out:
            shard(self.model, self.world)
        self.parameters = trainable_parameters(self.module)
        self.passes = Passes(
            self.model, self.world, config, self.parameters, run_dir / "micro_batches.json"
        )
        self.optimizer = Optimizer(self.parameters, optim, config.steps)
        self.average = MovingAverage(self.parameters, config.ema) if config.ema else None
        self.meter = Meter()
        self.bad_steps = BadSteps(config, optim)
        self.step = self.failed_saves = 0
        self.best: dict[str, Any] | None = None
        self.num_passes = config.passes_per_step(self.world.num_ranks)
        self.clock = Clock(config.steps, self.world.num_ranks, config.usd_per_gpu_hour)
        self.example: Batch = {}
        self.last_save = time.monotonic()

    # --- one step

    def next_batches(self, stream: Iterator[Batch]) -> list[Batch]:
        """What this process gets of the next step's global batch, one batch for each pass.

        Raises:
            DataError: The loader ended.
        """
        with self.world.together():
            batches = [self.passes.counted(batch) for batch in islice(stream, self.num_passes)]
            if len(batches) < self.num_passes:
                raise DataError(
                    f"the data ended after {self.step} of {self.config.steps} steps; the loader must repeat it"
                )
        return batches

    def learn(self, batches: Sequence[Batch]) -> None:
        """One step: gradient, clipping, update, average; the update is left out if loss or gradient are not finite."""
        with others_may_end():
            means = self.passes.gradients(batches, self.step)
            norm = self.optimizer.clip()
        finite = torch.isfinite(norm + means["loss"])
        self.optimizer.step(self.step, finite)
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.step)  # once more with the same parameters if it was skipped
        self.meter.add(means | {"grad_norm": norm}, finite)
        self.example = batches[0]
        self.meter.images += sum(map(num_rows, batches)) * self.world.num_ranks
        self.bad_steps.add(self.step, finite)
        self.step += 1
        self.meter.seconds += self.clock.tick()
        self.journal.tick()

    def set_train_mode(self) -> None:
        """Dropout where it belongs."""
        set_train_mode(self.module, everything=self.config.train_mode == "all")

    # --- looking

    def log(self) -> None:
        """One line with the means since the last one."""
        lr = self.optim.lr * self.optimizer.factor(self.step - 1)
        self.bad_steps.settle()
        values = {**self.meter.means(), "lr": lr, "skipped_steps": self.bad_steps.skipped}
        values |= self._mfu(values["images_per_second"])
        if torch.cuda.is_available():
            values["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.journal.write("train", self.step, values | self.clock.figures(self.step))
        self.meter.reset()

    def _mfu(self, images_per_second: float) -> dict[str, float]:
        """The share of the devices' peak that the images took; nothing where the peak or the FLOPs are not known."""
        peak = peak_flops(self.world.device, self.config.peak_tflops)
        if peak is None or not self.world.is_main:
            return {}
        whole = {"step": self.step - 1, "target_weight": 1.0}  # as a pass has them
        flops = self.flops.per_image(self.example | whole)
        if flops is None:
            return {}
        return {"mfu": round(flops * images_per_second / (peak * self.world.num_ranks), 4)}

    def evaluate(self, evaluate: Evaluate) -> None:
        """One line with the figures of the evaluation."""
        with self._looking():
            values = self.world.on_main(lambda: evaluate(self.step))
        if values:
            self.journal.write("eval", self.step, values)
        self._judge(values)

    def _judge(self, values: Mapping[str, float]) -> None:
        """Remember this state if its figure is the best so far; it is to be saved then."""
        name = self.config.keep_best
        if name is None:
            return
        if name not in values:
            raise ConfigError(
                f"loop.keep_best names {name!r}, but the evaluation tells of {', '.join(sorted(values)) or 'nothing'}"
            )
        sign = 1 if self.config.best_is == "lowest" else -1
        if self.best is None or sign * values[name] < sign * self.best["value"]:
            self.best = {"step": self.step, "figure": name, "value": values[name]}

    @property
    def is_best(self) -> bool:
        """Whether the present state has the best figure so far."""
        return self.best is not None and self.best["step"] == self.step

    def sample(self, sample: Sample) -> None:
        """Pictures into samples/."""
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        with self._looking():
            self.world.on_main(lambda: sample(self.step, folder))
        self.journal.show(self.step, folder)

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Eval mode, no gradients, averaged weights; the random draws and the clock of training stand still."""
        swapped = self.average.swapped_in() if self.average is not None else nullcontext()
        with preserved_rng(), swapped, torch.no_grad(), whole_weights(self.model):
            self.module.eval()
            yield
        self.set_train_mode()
        self.clock.tick()

    # --- saving and resuming

    def agree(self, stop_reason: str) -> tuple[str, bool]:
        """Why all processes are to stop, or nothing; and whether a checkpoint is overdue by `save_every_seconds`."""
        limit = self.config.save_every_seconds
        overdue = limit is not None and time.monotonic() - self.last_save >= limit
        flags = self.world.exchange([bool(stop_reason), overdue])
        if any(stop for stop, _ in flags):
            stop_reason = next(filter(None, self.world.gather(stop_reason)))
        return stop_reason, bool(flags[0][1])

    def save(self, *, must_succeed: bool) -> None:
        """Write a checkpoint; a full disk is survived a few times, as the one before is still there."""
        self.last_save = time.monotonic()
        self.bad_steps.settle()
        tensors = {"trainable": self._weights(), "optimizer": self.optimizer.tensors()}
        if self.average is not None:
            tensors["ema"] = self.average.averages
        tensors = {name: put_together(ts, self.parameters) for name, ts in tensors.items()}
        state = self._state()
        self.failed_saves = self.world.on_main(lambda: self._write(tensors, state, must_succeed))

    def _write(
        self, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], must_succeed: bool
    ) -> int:
        """Write the checkpoint; how many have failed in a row."""
        try:
            self.journal.flush()
            save_checkpoint(
                self._checkpoints,
                tensors,
                state,
                keep_last=self.config.keep_last,
                keep=[self.best["step"]] if self.best else [],
            )
        except OSError as error:
            failed = self.failed_saves + 1
            logger.warning("step %d: the checkpoint could not be saved: %s", self.step, error)
            if must_succeed or failed >= self.config.max_failed_saves:
                raise OutputError(
                    f"the checkpoint of step {self.step} could not be saved in {self._checkpoints} ({error}); "
                    "make room and run the same command again"
                ) from error
            return failed
        return 0

    @property
    def _checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def _weights(self) -> dict[str, Tensor]:
        """Trained parameters, and the buffers that a module in train mode may change."""
        return {**self.parameters, **changing_buffers(self.module)}

    def _state(self) -> dict[str, Any]:
        """Everything but tensors. No generator is among it: what is drawn follows from seed, step and row."""
        return {
            "format": _FORMAT,
            "step": self.step,
            **self.bad_steps.state_dict(),
            **self.clock.state_dict(),
            "meter": self.meter.state_dict(),
            "loaders": self.world.gather(self.loader.state_dict()),
            "cut": self.passes.cut,
            "best": self.best,
            "num_ranks": self.world.num_ranks,
            "settings": self.settings,
        }

    def resume(self) -> None:
        """Go on from the newest good checkpoint, if there is one."""
        path = self.world.on_main(lambda: _path_of(latest_checkpoint(self._checkpoints)))
        if path is None:
            return
        with self.world.together():
            checkpoint = reopen_checkpoint(path)
            state = checkpoint.state
            if state.get("format") != _FORMAT:
                raise CheckpointError(
                    f"{path} was saved by another version of vlv; name another run folder to start a new run"
                )
            ranks = state["num_ranks"], self.world.num_ranks
            _refuse_other_settings(state["settings"], self.settings, self.run_dir, ranks)
            load_weights(
                self.module,
                checkpoint.tensors("trainable"),
                checkpoint,
                must_hold=set(self.parameters),
            )
            self.optimizer.load_tensors(checkpoint.tensors("optimizer"))
            if self.average is not None:
                self.average.load_tensors(checkpoint.tensors("ema"))
            self.step = state["step"]
            self.passes.cut = max(self.passes.cut, state["cut"])
            self.clock.load_state_dict(state, self.step)
            self.best = state["best"]
            self.bad_steps.load_state_dict(state)
            self.meter.load_state_dict(state["meter"], self.world.device)
            self.loader.load_state_dict(_place_of(self.world, state["loaders"]))

    def open_journal(self) -> Journal | SilentJournal:
        """The records of the run folder, cut to the present step; silent where another process writes them."""
        if not self.world.is_main:
            return SilentJournal()
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
        undo_sharding(self.model, self.parameters)
        self.module.eval()

    def result(self) -> FitResult:
        """How the run stands."""
        metrics = {
            key: value for key, value in self.journal.latest.items() if key not in {"step", "kind"}
        }
        return FitResult(self.step, self.step == self.config.steps, metrics)


def _path_of(checkpoint: Checkpoint | None) -> Path | None:
    return None if checkpoint is None else checkpoint.path


def _place_of(world: World, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Where a process goes on in the data; with another number of processes, from what all of them had seen."""
    if len(states) == world.num_ranks:
        return states[world.rank]
    return states[0] if all(state == states[0] for state in states) else merge_states(states)


def _refuse_other_settings(
    saved: dict[str, Any], now: dict[str, Any], run_dir: Path, ranks: tuple[int, int] = (1, 1)
) -> None:
    """Name the first setting that differs from the one the run was started with.

    A setting that did not exist then had what is its default now. The number of processes, then and now, may differ if
    together they still take as many rows at a time.
    """
    before, after = _flat(saved), _flat(now)
    for key in sorted((before.keys() | after.keys()) - FREE_ON_RESUME - FORMER_SETTINGS):
        old, new = (side[key] if key in side else default_of(key) for side in (before, after))
        if key == "loop.batch_size" and ranks[0] != ranks[1]:
            key, old, new = f"{key} x processes", old * ranks[0], new * ranks[1]
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
