"""The training loop, for every objective of the project.

An `Objective` says what trains and which loss; a loader hands out batches for ever and knows its position; `fit`
does the rest: arithmetic precision, accumulation, clipping, schedule, log, evaluation, checkpoints, resuming.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from vlv.errors import ConfigError
from vlv.training.allocator import kept_memory
from vlv.training.distributed import join_world
from vlv.training.interrupt import Interrupted, StopRequests, lock
from vlv.training.objective import Evaluate, FitResult, Loader, Losses, Objective, Sample
from vlv.training.rng import preserved_rng
from vlv.training.run import Run
from vlv.training.weights import load_trained

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from vlv.config import LoopConfig, OptimConfig

__all__ = ["FitResult", "Interrupted", "Loader", "Losses", "Objective", "fit", "load_trained"]


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
    world = join_world()
    with ExitStack() as stack:
        with world.together():
            if world.is_main:
                stack.enter_context(lock(run_dir))
        stack.enter_context(preserved_rng())
        stack.enter_context(kept_memory(world.device))
        stop = stack.enter_context(StopRequests(max_seconds))
        with world.together():
            run = Run(objective, loader, config, optim, run_dir, resolved, world)
        run.resume()
        with world.together():
            run.journal = run.open_journal()
            stack.push(run.journal)
        if run.step < config.steps:
            with _enough_memory():
                _train(run, stop, evaluate, sample)
        run.hand_over_weights()
        return run.result()


def _train(run: Run, stop: StopRequests, evaluate: Evaluate | None, sample: Sample | None) -> None:
    """The loop: a step, and then everything that is due."""
    run.set_train_mode()
    config, stream = run.config, iter(run.loader)
    while run.step < config.steps:
        run.learn(run.next_batches(stream))
        last = run.step == config.steps
        if last or _due(run.step, config.log_every):
            run.log()
        if evaluate is not None and (last or _due(run.step, config.eval_every)):
            run.evaluate(evaluate)
        if sample is not None and (last or _due(run.step, config.sample_every)):
            run.sample(sample)
        reason, overdue = run.agree(stop.reason)
        if last or reason or overdue or run.is_best or _due(run.step, config.save_every):
            run.save(must_succeed=last or bool(reason))
        if reason and not last:
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
