"""The training loop, for every objective: a step, and then everything that is due (log, evaluation, samples, checkpoint).

An `Objective` says what trains and which loss; a loader hands out batches for ever and knows its position; `TrainingStep`
takes the step; `fit` does the rest.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vlv.config import LoopConfig, OptimConfig, defaults, free_on_resume
from vlv.data.positions import merge_states
from vlv.errors import CheckpointError, ConfigError, DataError, OutputError
from vlv.models.draws import RowGenerator
from vlv.storage import Json, check_settings, lock
from vlv.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    reopen_checkpoint,
    save_checkpoint,
)
from vlv.training.distributed import World, join_world
from vlv.training.interrupt import Interrupted, StopRequests
from vlv.training.journal import Clock, Journal, Meter
from vlv.training.microbatches import num_rows, with_targets
from vlv.training.objective import Batch, Evaluate, FitResult, Loader, Objective, Sample
from vlv.training.optim import BadSteps
from vlv.training.prediction import FlopMeter, peak_flops
from vlv.training.rng import preserved_rng
from vlv.training.step import TrainingStep
from vlv.training.weights import changing_buffers, gathered, load_weights, on_device, set_train_mode

logger = logging.getLogger(__name__)

_FORMAT = 2


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
    settings: Mapping[str, object] | None = None,
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
        sample: Called with the step and the folder for images.
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
    world = join_world()
    with ExitStack() as stack:
        with world.together():
            if world.is_main:
                stack.enter_context(lock(run_dir / ".lock", f"the run folder {run_dir}"))
        stack.enter_context(preserved_rng())
        stop = stack.enter_context(StopRequests(max_seconds))
        with world.together():
            run = Run(objective, loader, config, optim, run_dir, resolved, world)
        run.resume()
        with world.together():
            if world.is_main:
                run.journal = stack.enter_context(run.open_journal())
        if run.step < config.steps or run.pending:
            with _enough_memory():
                _train(run, stop, evaluate, sample)
        run.hand_over_weights()
        return run.result()


def _train(run: Run, stop: StopRequests, evaluate: Evaluate | None, sample: Sample | None) -> None:
    """A step, and then everything that is due."""
    run.set_train_mode()
    config, stream = run.config, iter(run.loader)
    looks = {}
    if evaluate is not None:
        looks["eval"] = config.eval_every, lambda: run.evaluate(evaluate, stop)
    if sample is not None:
        looks["sample"] = config.sample_every, lambda: run.sample(sample, stop)
    run.pending = [name for name in run.pending if name in looks]  # what a signal had cut short
    while run.step < config.steps or run.pending:
        last = run.step + (not run.pending) == config.steps
        if not run.pending:
            run.take_step(run.next_batches(stream))
            if last or _due(run.step, config.log_every):
                run.log()
            run.pending = [n for n, (every, _) in looks.items() if last or _due(run.step, every)]
        run.pending = [name for name in run.pending if not looks[name][1]()]
        reason, overdue = run.agree(stop.reason)
        if last or reason or overdue or run.is_best or _due(run.step, config.save_every):
            run.save(must_succeed=last or bool(reason))
        if reason and (run.pending or not last):
            raise Interrupted(
                f"{reason} at step {run.step} of {config.steps}; the state is saved in {run.run_dir}, "
                "and the same command goes on from there",
                run.result(),
                preempted=reason.startswith(("SIGTERM", "SIGUSR1")),
            )


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Say in words where memory does not suffice and no smaller micro-batch would help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "memory does not suffice beside the forward and backward passes: for the optimiser, the evaluation or the "
            "samples; use a smaller model, a larger GPU, or more of them"
        ) from error


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class Run:
    """The state of a run, and each thing that the loop does to it."""

    journal: Journal | None = None
    """None where another process writes it."""

    def __init__(
        self,
        objective: Objective,
        loader: Loader,
        config: LoopConfig,
        optim: OptimConfig,
        run_dir: Path,
        settings: Json,
        world: World,
    ) -> None:
        self.world, self.objective, self.loader, self.config = world, objective, loader, config
        self.run_dir, self.settings = run_dir, settings
        on_device(objective.module, world.device)
        self.peak_flops = peak_flops(
            world.device, config.peak_tflops, precision=config.precision, tf32=config.tf32
        )
        # copied before it is sharded: a shard of the weights cannot be counted
        self.flops = FlopMeter(objective) if self.peak_flops and world.is_main else None
        notes = run_dir / "micro_batches.json"
        self.training_step = TrainingStep(objective, config, optim, world, notes)
        self.meter = Meter()
        self.bad_steps = BadSteps(config, optim)
        self.step = self.failed_saves = 0
        self.best: Json | None = None
        self.pending: list[str] = []
        """What is still to be looked at in this step."""
        self.num_passes = config.passes_per_step(world.num_ranks)
        self.clock = Clock(config.steps, world.num_ranks, config.usd_per_gpu_hour)
        self.example: Batch = {}
        self.last_save = time.monotonic()

    # --- one step

    def next_batches(self, stream: Iterator[Batch]) -> list[Batch]:
        """What this process gets of the next step's global batch, one batch for each pass.

        Raises:
            DataError: The loader ended.
        """
        with self.world.together():
            batches = [
                with_targets(batch, self.objective, self.config.batch_size, self._draws(number))
                for number, batch in enumerate(islice(stream, self.num_passes))
            ]
            if len(batches) < self.num_passes:
                raise DataError(
                    f"the data ended after {self.step} of {self.config.steps} steps; the loader must repeat it"
                )
        return batches

    def _draws(self, number: int) -> RowGenerator:
        """The random numbers of the rows of one pass of the next step."""
        size = self.config.batch_size
        first = (number * self.world.num_ranks + self.world.rank) * size
        return RowGenerator(self.config.seed, self.step, range(first, first + size))

    def take_step(self, batches: Sequence[Batch]) -> None:
        """Update the weights, and take note of it."""
        result = self.training_step(batches, self.step)
        self.meter.add(result.values, result.finite)
        self.example = batches[0]
        self.meter.images += sum(map(num_rows, batches)) * self.world.num_ranks
        self.bad_steps.add(self.step, result.finite)
        self.step += 1
        self.meter.seconds += self.clock.tick()
        if self.journal is not None:
            self.journal.tick()

    def set_train_mode(self) -> None:
        """Dropout where it belongs."""
        set_train_mode(self.training_step.module, everything=self.config.train_mode == "all")

    # --- log, evaluation, samples

    def log(self) -> None:
        """One line with the means since the last one."""
        self.bad_steps.settle()
        lr = self.training_step.optimizer.learning_rate(self.step - 1)
        values = {**self.meter.means(), "lr": lr, "skipped_steps": self.bad_steps.skipped}
        values |= self._mfu(values["images_per_second"])
        if torch.cuda.is_available():
            values["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self._note("train", values | self.clock.figures(self.step))
        self.meter.reset()

    def _note(self, kind: str, values: Mapping[str, float]) -> None:
        if self.journal is not None:
            self.journal.write(kind, self.step, values)

    def _mfu(self, images_per_second: float) -> dict[str, float]:
        """The share of the devices' peak that the images took; nothing where the peak or the FLOPs are not known."""
        if self.flops is None or self.peak_flops is None:
            return {}
        whole = {"step": self.step - 1, "target_weight": 1.0}  # as a pass has them
        flops = self.flops.per_image(self.example | whole)
        if flops is None:
            return {}
        return {
            "mfu": round(flops * images_per_second / (self.peak_flops * self.world.num_ranks), 4)
        }

    def evaluate(self, evaluate: Evaluate, stop: StopRequests) -> bool:
        """One line with the figures of the evaluation; whether no signal cut it short."""
        with self._looking():
            values = self.world.on_main(lambda: stop.cut_short(lambda: evaluate(self.step)))
        if values is None:
            return False
        if values:
            self._note("eval", values)
        self._compare_with_best(values)
        return True

    def _compare_with_best(self, values: Mapping[str, float]) -> None:
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

    def sample(self, sample: Sample, stop: StopRequests) -> bool:
        """Pictures into samples/; whether no signal cut them short."""
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)

        def draw() -> bool:
            sample(self.step, folder)
            return True

        with self._looking():
            drawn = self.world.on_main(lambda: stop.cut_short(draw))
        if drawn is not None and self.journal is not None:
            self.journal.show(self.step, folder)
        return drawn is not None

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Eval mode, no gradients, averaged weights; the random draws and the clock of training stand still."""
        swapped = self.training_step.parallel.swapped_in(self._averages())
        with preserved_rng(), swapped, torch.no_grad():
            self.objective.module.eval()
            yield
        self.set_train_mode()
        self.clock.tick()

    def _averages(self) -> dict[str, Tensor] | None:
        average = self.training_step.average
        return None if average is None else average.averages

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
        step = self.training_step
        weights = {**step.parameters, **changing_buffers(step.module)}
        tensors = {"trainable": weights, "optimizer": step.optimizer.tensors()}
        if step.average is not None:
            tensors["ema"] = step.average.averages
        whole = {kind: _gathered(named) for kind, named in tensors.items()}
        state = self._state()
        self.failed_saves = self.world.on_main(lambda: self._write(whole, state, must_succeed))

    def _write(
        self, tensors: Mapping[str, Mapping[str, Tensor]], state: Json, must_succeed: bool
    ) -> int:
        """Write the checkpoint; how many have failed in a row."""
        try:
            if self.journal is not None:
                self.journal.flush()
            save_checkpoint(
                self._checkpoints,
                tensors,
                state,
                keep_last=self.config.keep_last,
                keep=[self.best["step"]] if self.best else [],
            )
        except (OSError, OutputError) as error:
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

    def _state(self) -> Json:
        """Everything but tensors. No generator is among it: what is drawn follows from seed, step and row."""
        return {
            "format": _FORMAT,
            "step": self.step,
            **self.bad_steps.state_dict(),
            **self.clock.state_dict(),
            "meter": self.meter.state_dict(),
            "loaders": self.world.gather(self.loader.state_dict()),
            "cut": self.training_step.micro_batch_size.cut,
            "best": self.best,
            "pending": self.pending,
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
            _check_settings(state["settings"], self.settings, self.run_dir, ranks)
            self._load_tensors(checkpoint)
            self._load_state(state)

    def _load_tensors(self, checkpoint: Checkpoint) -> None:
        step = self.training_step
        weights = checkpoint.tensors("trainable")
        load_weights(step.module, weights, checkpoint, must_hold=set(step.parameters))
        step.optimizer.load_tensors(checkpoint.tensors("optimizer"))
        if step.average is not None:
            step.average.load_tensors(checkpoint.tensors("ema"))

    def _load_state(self, state: Json) -> None:
        size = self.training_step.micro_batch_size
        size.cut = max(size.cut, state["cut"])
        self.step, self.best, self.pending = state["step"], state["best"], state["pending"]
        self.clock.load_state_dict(state, self.step)
        self.bad_steps.load_state_dict(state)
        self.meter.load_state_dict(state["meter"], self.world.device)
        self.loader.load_state_dict(_position_of(self.world, state["loaders"]))

    def open_journal(self) -> Journal:
        """The records of the run folder, cut to the present step."""
        journal = Journal(
            self.run_dir,
            self.settings,
            total_steps=self.config.steps,
            step=self.step,
            trackers=self.config.trackers,
            pending=self.pending,
        )
        self.clock.was_paid(journal.device_hours)
        return journal

    def hand_over_weights(self) -> None:
        """Leave the module as it should be used."""
        self.training_step.parallel.hand_over(self._averages())
        self.objective.module.eval()

    def result(self) -> FitResult:
        """How the run stands."""
        latest = {} if self.journal is None else self.journal.latest
        metrics = {key: value for key, value in latest.items() if key not in {"step", "kind"}}
        return FitResult(self.step, self.step == self.config.steps, metrics)


def _gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, on the CPU where they were sharded; all processes call this."""
    found = {}
    for name, tensor in tensors.items():
        whole = gathered(tensor)
        found[name] = whole.cpu() if isinstance(tensor, DTensor) else whole
    return found


def _path_of(checkpoint: Checkpoint | None) -> Path | None:
    return None if checkpoint is None else checkpoint.path


def _position_of(world: World, states: Sequence[Json]) -> Json:
    """Where a process goes on in the data; with another number of processes, from what all of them had seen."""
    if len(states) == world.num_ranks:
        return states[world.rank]
    return states[0] if all(state == states[0] for state in states) else merge_states(states)


def _check_settings(old: Json, new: Json, run_dir: Path, ranks: tuple[int, int] = (1, 1)) -> None:
    """Refuse to go on with other settings than the run was started with, but for those that touch nothing learnt.

    A setting that did not exist then had what is its default now. The number of processes, then and now, may differ if
    together they still take as many rows at a time.
    """
    old, new = copy.deepcopy(old), copy.deepcopy(new)
    if ranks[0] != ranks[1]:
        for settings, num_ranks in zip((old, new), ranks, strict=True):
            rows = settings["loop"].pop("batch_size") * num_ranks
            settings["loop"]["batch_size x processes"] = rows
    check_settings(
        f"the run in {run_dir}",
        old,
        new,
        mend="put them back to go on, or name another run folder to start a new run",
        free=free_on_resume(),
        defaults=defaults(),
        error=CheckpointError,
    )
