"""From the batches of one optimiser step to its gradient: forward and backward passes on one device or on many.

The global batch of a step has accumulate x processes x batch_size rows: row i of pass k of process r has the number
(k x processes + r) x batch_size + i. Every row draws its own random numbers, and every mean is that of the whole global
batch, so that the gradient is the same however the rows are cut into processes, passes and micro-batches.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from vlv.errors import ConfigError, DataError
from vlv.models.draws import RowGenerator, mixed_seed
from vlv.storage import write_text
from vlv.training.arithmetic import arithmetic, attention_of
from vlv.training.objective import Batch, Objective, to_device
from vlv.training.rng import seed_everything
from vlv.training.weights import changing_buffers

if TYPE_CHECKING:
    from pathlib import Path

    from vlv.config import LoopConfig
    from vlv.training.distributed import World
    from vlv.training.optim import Parameters

logger = logging.getLogger(__name__)


class Forward(nn.Module):
    """The objective's loss as the forward pass of a module, which is what can be spread over processes."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.module = objective.module
        self.objective = objective

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and its parts."""
        losses = self.objective.loss(batch, generator)
        return losses.total, {"loss": losses.total.detach(), **_detached(losses.parts)}


class Passes:
    """Forward and backward passes of this process.

    Where memory does not suffice, every batch is cut into twice as many micro-batches and the step is begun again; the
    gradient stays what it was. The gradients of the processes are averaged during the last backward pass, in which
    nobody can stand back; so a step that is larger than any before it averages them afterwards. Where the weights
    themselves are dealt out, every pass is an exchange, and a shortage of memory ends the run for this time.

    Args:
        model: The objective's loss; it may be dealt out to the processes.
        world: The processes.
        config: Batch size, precision, seed.
        parameters: What trains; an objective may freeze some of them for a while.
        notes: File for what the next start has to know, where this one cannot go on.

    Attributes:
        cut: Micro-batches into which each batch is cut.
        attention: Within this context forward and backward passes run, see `attention_of`.
    """

    def __init__(
        self,
        model: Forward,
        world: World,
        config: LoopConfig,
        parameters: Parameters,
        notes: Path,
    ) -> None:
        self.objective, self.world, self.config = model.objective, world, config
        self.is_sharded = isinstance(model, FSDPModule)
        self.parameters = list(parameters.values())
        self.notes = notes
        self.cut = int(json.loads(notes.read_text())["cut"]) if notes.exists() else 1
        self.attention = attention_of(world.device, config.precision)
        self._largest = 0.0  # the largest step so far
        self._model: nn.Module = model

    def counted(self, batch: Batch) -> Batch:
        """The batch with `targets`: what each row has to predict, tokens where the objective counts them, or else 1.

        Raises:
            DataError: The batch has not `batch_size` rows.
        """
        rows = num_rows(batch)
        if rows != self.config.batch_size:
            raise DataError(
                f"the loader hands out {rows} rows, but loop.batch_size is {self.config.batch_size}"
            )
        count = getattr(self.objective, "num_targets", None)
        return batch | {"targets": [1] * rows if count is None else list(count(batch))}

    def gradients(self, batches: Sequence[Batch], step: int) -> dict[str, Tensor]:
        """Leave the mean gradient of a step in the parameters.

        Args:
            batches: What this process gets of the global batch, one batch (see `counted`) for each pass.
            step: Optimiser steps done before.

        Returns:
            Means over the global batch: `loss`, and the parts by name; scalars on the device.

        Raises:
            ConfigError: Memory does not suffice for a single row.
            OtherProcessError: Another process ended.
        """
        targets = [batch["targets"] for batch in batches]
        rows = sum(map(len, targets))
        size = max(len(counts) * max(counts) for counts in targets)
        everyone = self.world.exchange([sum(map(sum, targets)), size, self.cut])
        mean_targets = sum(each[0] for each in everyone) / (rows * self.world.num_ranks)
        self._agree_on_cut(int(max(each[2] for each in everyone)))
        largest = max(each[1] for each in everyone)
        at_once = self.world.is_shared and (self.is_sharded or largest <= self._largest)
        sums = self._until_it_fits(batches, mean_targets, step, at_once)
        if self.world.is_shared and not at_once:
            self.world.average([p.grad for p in self.parameters if p.grad is not None])
            self._share()
        self._largest = max(self._largest, largest)
        means = self.world.mean(torch.stack([sums[name] for name in sorted(sums)]))
        return dict(zip(sorted(sums), means.unbind(), strict=True))

    def _share(self) -> None:
        """Spread the module over the processes, now that a step has shown whether parameters are left out."""
        if isinstance(self._model, DistributedDataParallel):
            return
        left_out = any(p.grad is None for p in self.parameters)
        frozen = [p for p in self.parameters if not p.requires_grad]
        for parameter in frozen:  # for a while; DDP would never hear of it again
            parameter.requires_grad_(True)
        module, buffers = self._model, [name for name, _ in self._model.named_buffers()]
        ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(module, buffers)
        self._model = DistributedDataParallel(
            module,
            init_sync=False,  # all processes load the same weights
            find_unused_parameters=left_out,
            gradient_as_bucket_view=True,
        )
        for parameter in frozen:
            parameter.requires_grad_(False)

    def _agree_on_cut(self, cut: int) -> None:
        if cut > self.cut:
            self.cut = cut
            self._report("memory did not suffice in another process")

    def _report(self, reason: str) -> None:
        size = -(-self.config.batch_size // self.cut)
        logger.warning(
            "%s: from now on a batch of %d is cut into micro-batches of %d; the effective batch stays",
            reason,
            self.config.batch_size,
            size,
        )

    def _until_it_fits(
        self,
        batches: Sequence[Batch],
        mean_targets: float,
        step: int,
        at_once: bool,
    ) -> dict[str, Tensor]:
        buffers = {name: b.clone() for name, b in changing_buffers(self.objective.module).items()}
        while True:
            try:
                return self._all(batches, mean_targets, step, at_once)
            except torch.OutOfMemoryError as error:
                self._cut_further(error, step, at_once)
            for name, buffer in changing_buffers(self.objective.module).items():
                buffer.copy_(buffers[name])
            for parameter in self.parameters:
                parameter.grad = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _cut_further(self, error: Exception, step: int, at_once: bool) -> None:
        """Halve the micro-batches, or say why that is impossible."""
        if self.cut >= self.config.batch_size:
            raise ConfigError(
                f"memory does not suffice for one image at step {step + 1}; use a smaller model or a larger GPU, or "
                "set loop.precision to bf16"
            ) from error
        self.cut *= 2
        if at_once:
            size = -(-self.config.batch_size // self.cut)
            write_text(self.notes, json.dumps({"cut": self.cut}))
            raise ConfigError(
                f"memory did not suffice at step {step + 1} in the middle of an exchange with the other processes; run "
                f"the same command again, and batches are cut into micro-batches of {size} (see {self.notes})"
            ) from error
        self._report(f"memory did not suffice at step {step + 1}")

    def _all(
        self,
        batches: Sequence[Batch],
        mean_targets: float,
        step: int,
        at_once: bool,
    ) -> dict[str, Tensor]:
        """Every pass of the step; the sums of the parts, weighted so that they are means over this process's rows."""
        world, size = self.world, self.config.batch_size
        pieces = [
            (number, span) for number in range(len(batches)) for span in spans(size, self.cut)
        ]
        sums: dict[str, Tensor] = {}
        for number, span in pieces:
            piece = rows_of(batches[number], span) | {"step": step}
            counts = piece["targets"]
            piece["target_weight"] = sum(counts) / len(counts) / mean_targets
            share = len(counts) / (size * len(batches))
            first = (number * world.num_ranks + world.rank) * size + span.start
            with self._averaging(at_once and (number, span) == pieces[-1]):
                parts = self._one(piece, range(first, first + len(counts)), share)
            for name, value in parts.items():
                sums[name] = sums[name] + share * value if name in sums else share * value
        return sums

    def _one(self, batch: Batch, rows: range, share: float) -> dict[str, Tensor]:
        """One forward and backward pass; the parts of its loss."""
        config, device = self.config, self.world.device
        seed_everything(mixed_seed(config.seed, batch["step"], "layers", rows.start))  # for dropout
        generator = RowGenerator(config.seed, batch["step"], rows)
        batch = to_device(batch, device)
        with self.attention:
            with arithmetic(device, config.precision):
                losses: tuple[Tensor, dict[str, Tensor]] = self._model(batch, generator)
            (losses[0] * share).backward()  # type: ignore[no-untyped-call]
        return losses[1]

    def _averaging(self, wanted: bool) -> AbstractContextManager[Any]:
        """Whether the backward pass averages the gradients over the processes."""
        if isinstance(self._model, DistributedDataParallel) and not wanted:
            return self._model.no_sync()
        return nullcontext()


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


def _has_rows(value: Any, rows: int) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) == rows
    return isinstance(value, list | tuple) and len(value) == rows


def _detached(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in parts.items()}
