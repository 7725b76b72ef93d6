"""Random draws of training that belong to a row, not to the batch that the row happens to lie in.

Shapes: N rows, n draws (n / N for each row).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import Self

import torch
from torch import Tensor


class RowGenerator(torch.Generator):
    """A generator for some rows of a training step, on the CPU.

    `rand` and `randn_like` draw each row's numbers from a generator of its own, whose seed is made of (seed, step, row):
    the same row gets the same numbers however the step's rows are cut into processes, passes and micro-batches. Used as
    the plain generator that it also is, its numbers depend on the first of its rows.

    Args:
        seed: Of the run.
        step: Optimiser steps done before this one.
        rows: Numbers of the rows within the step's global batch.
    """

    def __new__(cls, seed: int, step: int, rows: range) -> Self:
        """Make a generator on the CPU."""
        del seed, step, rows
        return super().__new__(cls)

    def __init__(self, seed: int, step: int, rows: range) -> None:
        super().__init__()
        self.manual_seed(mixed_seed(seed, step, "rows from", rows.start))
        self._seed, self._step, self._rows = seed, step, rows

    @property
    def shared_seed(self) -> int:
        """A seed that all rows of the step have in common."""
        return mixed_seed(self._seed, self._step, "step")

    @property
    def row_seeds(self) -> list[int]:
        """A seed for each row."""
        return [mixed_seed(self._seed, self._step, "row", row) for row in self._rows]

    @cached_property
    def rows(self) -> list[torch.Generator]:
        """A generator for each row, made when first asked for: some objectives draw on the device alone."""
        return [torch.Generator().manual_seed(seed) for seed in self.row_seeds]

    def by_row(self, count: int, draw: Callable[[torch.Generator, int], Tensor]) -> Tensor:
        """Join what `draw` gives each row's generator, in the order of the rows.

        Args:
            count: n, a multiple of the number of rows; consecutive draws belong to one row.
            draw: From generator and number of draws to a tensor (number, ...).
        """
        each, rest = divmod(count, len(self.rows))
        if rest:
            raise ValueError(f"{count} draws cannot be split over {len(self.rows)} rows")
        return torch.cat([draw(generator, each) for generator in self.rows])


def mixed_seed(*parts: object) -> int:
    """A seed in [0, 2^63) that depends on all the parts.

    >>> mixed_seed(0, 1) == mixed_seed(0, 1), mixed_seed(0, 1) == mixed_seed(1, 0)
    (True, False)
    """
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def rand(count: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1), (n,), on the generator's device."""
    if isinstance(generator, RowGenerator):
        return generator.by_row(count, lambda row, each: torch.rand(each, generator=row))
    return torch.rand(count, generator=generator, device=generator.device)


def randn_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of a tensor's shape (n, ...), dtype and device, drawn on the generator's device."""
    return _moved(_filled(tensor, generator, torch.Tensor.normal_), tensor)


def gumbel_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise of a tensor's shape (n, ...), dtype and device, drawn on the generator's device."""
    return _moved(-_filled(tensor, generator, torch.Tensor.exponential_).log(), tensor)


def _filled(tensor: Tensor, generator: torch.Generator, fill: Callable[..., Tensor]) -> Tensor:
    """Float32 numbers of a tensor's shape (n, ...) from an in-place draw."""
    shape = tensor.shape[1:]
    if isinstance(generator, RowGenerator):
        return generator.by_row(
            len(tensor), lambda row, each: fill(torch.empty(each, *shape), generator=row)
        )
    return fill(torch.empty(tensor.shape, device=generator.device), generator=generator)


def _moved(noise: Tensor, like: Tensor) -> Tensor:
    """On the device and in the dtype of another tensor; to a GPU without waiting for it."""
    if like.device.type == "cuda" and noise.device.type == "cpu":
        noise = noise.pin_memory().to(like.device, non_blocking=True)
    return noise.to(like.device, like.dtype)
