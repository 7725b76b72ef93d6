"""What happens when memory runs out: smaller micro-batches, and the step once more. The gradient stays what it was."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from vlv.errors import ConfigError
from vlv.storage import read_settings, write_json
from vlv.training.weights import changing_buffers

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class MicroBatchSize:
    """Into how many micro-batches each batch is cut, which grows when memory runs out.

    Args:
        batch_size: Rows of a batch.
        notes: File in which the next start finds a larger cut, where this one cannot go on; None keeps none.

    Attributes:
        cut: Micro-batches into which each batch is cut.
    """

    def __init__(self, batch_size: int, notes: Path | None) -> None:
        self.batch_size, self.notes = batch_size, notes
        noted = read_settings(notes) if notes is not None else None
        self.cut = int(noted["cut"]) if noted else 1

    def agree(self, cut: int) -> None:
        """Follow a process that had to cut further."""
        if cut > self.cut:
            self.cut = cut
            self._report("memory did not suffice in another process")

    def until_it_fits(
        self, attempt: Callable[[int], Result], module: nn.Module, step: int, *, restartable: bool
    ) -> Result:
        """What `attempt` returns, called with a cut that is doubled for as long as memory runs out.

        Args:
            attempt: The forward and backward passes of a step.
            module: Gets its buffers back, and loses its gradients, before the next attempt.
            step: Optimiser steps done before.
            restartable: Whether the step may be begun again; if not, the larger cut is noted for the next start.

        Raises:
            ConfigError: Memory does not suffice for a single row, or the step cannot be begun again.
        """
        buffers = {name: b.clone() for name, b in changing_buffers(module).items()}
        while True:
            try:
                return attempt(self.cut)
            except torch.OutOfMemoryError as error:
                self._cut_further(error, step, restartable)
            for name, buffer in changing_buffers(module).items():
                buffer.copy_(buffers[name])
            module.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _cut_further(self, error: Exception, step: int, restartable: bool) -> None:
        if self.cut >= self.batch_size:
            raise ConfigError(
                f"memory does not suffice for one image at step {step + 1}; use a smaller model or a larger GPU, or "
                "set loop.precision to bf16"
            ) from error
        self.cut *= 2
        if restartable:
            self._report(f"memory did not suffice at step {step + 1}")
            return
        if self.notes is not None:
            write_json(self.notes, {"cut": self.cut})
        raise ConfigError(
            f"memory did not suffice at step {step + 1} in the middle of an exchange with the other processes; run "
            f"the same command again, and batches are cut into micro-batches of {self._rows} (see {self.notes})"
        ) from error

    @property
    def _rows(self) -> int:
        return -(-self.batch_size // self.cut)

    def _report(self, reason: str) -> None:
        logger.warning(
            "%s: from now on a batch of %d is cut into micro-batches of %d; the effective batch stays",
            reason,
            self.batch_size,
            self._rows,
        )
