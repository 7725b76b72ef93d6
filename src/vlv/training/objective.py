"""What the loop is given (an objective, a loader, looks) and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from vlv.storage import Json

Batch = Json
Evaluate = Callable[[int], dict[str, float]]
Sample = Callable[[int, Path], None]


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
        """Loss of one batch; every random draw comes from `generator` (on the CPU, see `vlv.models.draws`).

        Beside the loader's entries `batch["step"]` counts the optimiser steps done before this one. A batch is a part of
        the step's global batch, and the losses of the parts are averaged by rows. A loss that is a mean over something
        else, such as tokens, is to be multiplied by `batch["target_weight"]`: how much of it the rows of this part
        have on average, in units of the average over the global batch. The objective then has a method
        `num_targets(batch)` that counts it for each row, (B) integers.

        An objective may also have `prepare(batch, generator)`, which adds what all passes need, such as token ids or
        captions that the present model writes; `stand_in(batch)`, which adds the same without numbers, and
        `rehearse(batch)`, the passes that preparing takes, to predict memory and FLOPs;
        `phase(step)`, a name for the steps in which the same work is done; and `compile(config, device)`, which makes its
        parts as fast as the settings say before the first step.
        """


class Loader(Protocol):
    """An endless stream of batches that knows its position."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present position on."""

    def state_dict(self) -> Json:
        """Position after the last batch handed out, as JSON values."""

    def load_state_dict(self, state: Json) -> None:
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


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch with its tensors on a device; everything else as it is."""
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()
    }
