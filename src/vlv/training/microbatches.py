"""How the global batch of a step is cut into micro-batches, each of which goes through the model in one pass.

The global batch has passes x processes x batch_size rows: row i of pass k of process r has the number
(k x processes + r) x batch_size + i. Every row draws its own random numbers, and every mean is that of the whole global
batch, so that the gradient is the same however the rows are cut into processes, passes and micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from vlv.errors import DataError
from vlv.models.draws import RowGenerator
from vlv.training.distributed import World
from vlv.training.objective import Batch, Objective


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together."""

    batch: Batch
    """With `step`, `targets` and `target_weight`, see `Objective.loss`."""
    rows: range
    """Their numbers within the global batch."""
    share: float
    """What their mean weighs in the mean over the rows of this process."""
    is_last: bool
    """Whether it is the last one of the step."""


def with_targets(
    batch: Batch, objective: Objective, batch_size: int, generator: RowGenerator
) -> Batch:
    """The batch with `targets`: what each row has to predict, tokens where the objective counts them, or else 1.

    Args:
        batch: As the loader hands it out.
        objective: It may prepare the batch.
        batch_size: Rows that it must have.
        generator: For what preparing draws.

    Raises:
        DataError: The batch has not `batch_size` rows.
    """
    rows = num_rows(batch)
    if rows != batch_size:
        raise DataError(f"the loader hands out {rows} rows, but loop.batch_size is {batch_size}")
    prepare = getattr(objective, "prepare", None)
    batch = batch if prepare is None else prepare(batch, generator)
    count = getattr(objective, "num_targets", None)
    return batch | {"targets": [1] * rows if count is None else list(count(batch))}


def micro_batches(
    batches: Sequence[Batch], step: int, cut: int, mean_targets: float, world: World
) -> Iterator[MicroBatch]:
    """Cut the batches of this process.

    Args:
        batches: See `with_targets`; one for each pass of the step.
        step: Optimiser steps done before.
        cut: Micro-batches for each batch.
        mean_targets: Mean over the rows of the global batch.
        world: The processes.
    """
    size = num_rows(batches[0])
    pieces = [(number, span) for number in range(len(batches)) for span in spans(size, cut)]
    for number, span in pieces:
        batch = rows_of(batches[number], span) | {"step": step}
        counts = batch["targets"]
        batch["target_weight"] = sum(counts) / len(counts) / mean_targets
        first = (number * world.num_ranks + world.rank) * size + span.start
        share = len(counts) / (size * len(batches))
        is_last = (number, span) == pieces[-1]
        yield MicroBatch(batch, range(first, first + len(counts)), share, is_last)


def num_rows(batch: Batch) -> int:
    """Rows of a batch."""
    return len(next(iter(batch.values())))


def rows_of(batch: Batch, span: slice) -> Batch:
    """Some rows of a batch: of every list and tensor that has one entry for each row."""
    rows = num_rows(batch)
    return {name: value[span] if _has_rows(value, rows) else value for name, value in batch.items()}


def spans(rows: int, cut: int) -> list[slice]:
    """Rows in `cut` runs of nearly equal length, or as many as there are rows.

    >>> spans(5, 2)
    [slice(0, 3, None), slice(3, 5, None)]
    """
    size = -(-rows // cut)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _has_rows(value: object, rows: int) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) == rows
    return isinstance(value, list | tuple) and len(value) == rows
