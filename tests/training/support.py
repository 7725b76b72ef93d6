"""A small objective and loader for tests of the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlv.config import LoopConfig, OptimConfig
from vlv.training.loop import fit
from vlv.training.objective import FitResult, Losses

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BATCH_SIZE = 4


class RepeatableLoader:
    """Endless batches that are a function of the position; `seen` lists the ids of what was handed out."""

    def __init__(self, batch_size: int = BATCH_SIZE, length: int | None = None) -> None:
        self.batch_size, self.length, self.position = batch_size, length, 0
        self.seen: list[str] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.length is None or self.position < self.length:
            x = torch.randn(
                self.batch_size, 6, generator=torch.Generator().manual_seed(self.position)
            )
            ids = [f"{self.position}-{row}" for row in range(self.batch_size)]
            self.position += 1
            self.seen += ids
            yield {"ids": ids, "x": x}

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Denoiser:
    """Removes noise with dropout, a batch norm and a frozen layer: everything that resuming can get wrong."""

    def __init__(self, dropout: float = 0.3) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.module: nn.Module = nn.ModuleDict(
                {
                    "frozen": nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5)),
                    "body": nn.Sequential(
                        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(dropout)
                    ),
                    "head": nn.Linear(8, 6),
                }
            )
        self.module["frozen"].requires_grad_(False)  # type: ignore[index]
        self.steps: list[int] = []

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Losses:
        self.steps.append(batch["step"])
        x = batch["x"]
        out = x + torch.randn(x.shape, generator=generator)
        for part in self.module.children():
            out = part(out)
        loss = (out - x).square().mean()
        return Losses(loss, {"error": loss})


def loop_config(**changes: Any) -> LoopConfig:
    values: dict[str, Any] = {
        "steps": 9,
        "batch_size": BATCH_SIZE,
        "log_every": 2,
        "eval_every": 4,
        "save_every": 3,
        "trackers": [],
    }
    return LoopConfig(**{**values, **changes})


def optim_config(**changes: Any) -> OptimConfig:
    values: dict[str, Any] = {"lr": 0.01, "warmup_steps": 2, "lr_scale": {"head": 2.0}}
    return OptimConfig(**{**values, **changes})


def train(run_dir: Path, objective: Denoiser | None = None, **kwargs: Any) -> FitResult:
    """`fit` with the defaults above; loop settings and arguments of `fit` by name."""
    arguments = {
        k: kwargs.pop(k) for k in ("evaluate", "sample", "max_seconds", "settings") if k in kwargs
    }
    loader = kwargs.pop("loader", None) or RepeatableLoader()
    optim = kwargs.pop("optim", None) or optim_config()
    return fit(objective or Denoiser(), loader, loop_config(**kwargs), optim, run_dir, **arguments)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
