"""How much faster is a training step than the straightforward way?

    python benchmarks/training.py --json benchmarks/results/training-cpu.json

Both train the same weights on the same images and captions, in turn, in one run; see `benchmarks/baseline.py` for what the
straightforward way is. A step is forward and backward pass, clipping and AdamW. Where the arithmetic is the same, the first
losses have to agree to 1e-4, or the script stops.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from baseline import Baseline, BaselineStage1, BaselineStage2
from contest import Contest, compete, write
from torch import nn

from models import SIZES, Models, make_batch, make_models
from vlv.config import OptimConfig, Stage1Config, Stage2Config
from vlv.training.arithmetic import arithmetic
from vlv.training.optim import Optimizer, trainable_parameters
from vlv.training.stages import Stage1, Stage2
from vlv.training.weights import set_train_mode, store_frozen

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlv.training.objective import Batch, Objective

TOLERANCE = 1e-4


class Ours:
    """A step as the training loop does it.

    Args:
        objective: Stage 1 or stage 2.
        precision: fp32 or bf16.
        lr: Of AdamW.
    """

    def __init__(self, objective: Stage1 | Stage2, precision: str, lr: float = 1e-5) -> None:
        self.objective: Objective = objective
        self.precision = precision
        if precision == "bf16":
            store_frozen(objective.module, torch.bfloat16, keep=[objective.decoder.vae])
        set_train_mode(objective.module)
        self.parameters = trainable_parameters(objective.module)
        optim = OptimConfig(lr=lr, schedule="constant")
        self.optimizer = Optimizer(self.parameters, optim, 10**6)

    def step(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """Train on a batch; its loss, which nobody has to wait for."""
        with arithmetic(torch.device("cpu"), self.precision):
            loss = self.objective.loss(batch, generator).total
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step(0)
        self.optimizer.zero_grad()
        return loss.detach()


def seed() -> torch.Generator:
    """The draws of every first step are the same."""
    return torch.Generator().manual_seed(0)


def first_loss(contestant: Baseline | Ours, batch: Batch) -> float:
    """Loss of the first step."""
    return float(contestant.step(batch, seed()))


def agree(name: str, found: float, expected: float) -> None:
    """Stop unless two losses are the same."""
    if abs(found - expected) > TOLERANCE:
        raise SystemExit(
            f"{name}: the loss is {found:.6f}, the baseline's {expected:.6f}: not the same work"
        )


def stage1(models: Models, name: str, repeats: int, clock: Callable[[], float]) -> Contest:
    """The denoising step: live, with cached latents, and with the vision tower's features cached too."""
    batch = make_batch(SIZES[name], models.caption_decoder.tokenizer)
    with torch.no_grad():
        posterior = models.decoder.posterior(batch["pixels"])
    latents = batch | {"latents_mean": posterior.mean, "latents_std": posterior.std}
    settings = Stage1Config()

    def ours(precision: str) -> Ours:
        own = copy.deepcopy(models)
        return Ours(Stage1(own.encoder, own.decoder, settings), precision)

    full, half = ours("fp32"), ours("bf16")
    contestants: dict[str, tuple[Any, Batch]] = {
        "baseline": (BaselineStage1(models), batch),
        "fp32": (full, batch),
        "fp32, latents cached": (full, latents),
        "bf16": (half, batch),
        "bf16, latents cached": (half, latents),
    }
    return race("stage 1", contestants, SIZES[name].batch_size, repeats, clock)


def stage2(models: Models, name: str, repeats: int, clock: Callable[[], float]) -> Contest:
    """The caption step, padded as the baseline, bucketed, and packed."""
    batch = make_batch(SIZES[name], models.caption_decoder.tokenizer)

    def ours(precision: str, batching: Any) -> Ours:
        own = copy.deepcopy(models)
        own.decoder.unet = own.decoder.vae = None
        settings = Stage2Config(batching=batching)
        return Ours(Stage2(own.encoder, own.decoder, own.caption_decoder, settings), precision)

    contestants: dict[str, tuple[Any, Batch]] = {
        "baseline": (BaselineStage2(models), batch),
        "fp32, padded to the longest": (ours("fp32", "padded"), batch),
        "fp32, bucketed": (ours("fp32", "bucketed"), batch),
        "fp32, packed": (ours("fp32", "packed"), batch),
        "bf16, packed": (ours("bf16", "packed"), batch),
    }
    return race("stage 2", contestants, SIZES[name].batch_size, repeats, clock)


def race(
    title: str,
    contestants: dict[str, tuple[Any, Batch]],
    size: int,
    repeats: int,
    clock: Callable[[], float],
) -> Contest:
    """Check the losses of the first step, then time the following ones."""
    losses = {name: first_loss(who, batch) for name, (who, batch) in _first_of_each(contestants)}
    for name, loss in losses.items():
        if name.startswith("fp32"):
            agree(f"{title}, {name}", loss, losses["baseline"])
    actions = {
        name: lambda who=who, batch=batch: who.step(batch, seed())
        for name, (who, batch) in contestants.items()
    }
    notes = {name: {"loss": loss} for name, loss in losses.items()}
    unit = f"a step of {size} images"
    return compete(title, unit, actions, repeats=repeats, clock=clock, notes=notes)


def _first_of_each(
    contestants: dict[str, tuple[Any, Batch]],
) -> list[tuple[str, tuple[Any, Batch]]]:
    """Contestants that have not stepped yet: two may share one set of weights, which the first step changes."""
    seen: dict[int, str] = {}
    for name, (who, _) in contestants.items():
        seen.setdefault(id(who), name)
    return [(name, contestants[name]) for name in seen.values()]


def main() -> None:
    """Time, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", choices=sorted(SIZES), default="mid")
    parser.add_argument("--stage", choices=("1", "2"), help="only this one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch; all cores by default")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count processor time, on a machine that others use"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    clock = time.process_time if options.cpu_time else time.perf_counter
    models = make_models(options.models)
    contests = []
    for number, contest in (("1", stage1), ("2", stage2)):
        if options.stage in (None, number):
            contests.append(contest(models, options.models, options.repeats, clock))
            print(contests[-1], flush=True)
    if options.json is not None:
        write(options.json, options.models, contests)


if __name__ == "__main__":
    main()
