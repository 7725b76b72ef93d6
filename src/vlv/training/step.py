"""One optimiser step on one screen, in the order in which things happen.

What wraps around it is readable alone: cutting the global batch into `microbatches`, beginning again when `out_of_memory`,
sharing the work between processes (`parallel`), `precision`, and on a CPU `cpu`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlv.config import LoopConfig, OptimConfig
from vlv.models.draws import RowGenerator, mixed_seed
from vlv.training.distributed import World, lost_process_in_words
from vlv.training.microbatches import MicroBatch, micro_batches
from vlv.training.objective import Batch, Objective, to_device
from vlv.training.optim import MovingAverage, Optimizer
from vlv.training.out_of_memory import MicroBatchSize
from vlv.training.parallel import Parallel
from vlv.training.rng import seed_everything


@dataclass(frozen=True)
class StepResult:
    """What a step tells; scalars on the device, for which nobody has to wait."""

    values: dict[str, Tensor]
    """Means over the global batch: `loss` and its parts by name; and `grad_norm` before clipping."""
    finite: Tensor
    """Whether loss and gradient are finite; otherwise nothing was updated."""


class TrainingStep:
    """Everything that one optimiser step needs; call it to take one.

    Args:
        objective: What trains, and which loss; on the device.
        config: Batch size, precision, seed, moving average.
        optim: The optimiser.
        world: The processes.
        notes: File for what the next start has to know after a shortage of memory.
    """

    def __init__(
        self,
        objective: Objective,
        config: LoopConfig,
        optim: OptimConfig,
        world: World,
        notes: Path | None = None,
    ) -> None:
        self.config, self.world = config, world
        self.parallel = Parallel(objective, config, world)
        self.module, self.parameters = self.parallel.module, self.parallel.parameters
        self.optimizer = Optimizer(self.parameters, optim, config.steps)
        self.average = MovingAverage(self.parameters, config.ema) if config.ema else None
        self.micro_batch_size = MicroBatchSize(config.batch_size, notes)
        self.bf16 = config.precision == "bf16"

    def __call__(self, batches: Sequence[Batch], step: int) -> StepResult:
        """Update the weights once.

        Args:
            batches: What this process gets of the global batch, one batch (see `with_targets`) for each pass.
            step: Optimiser steps done before.

        Raises:
            ConfigError: Memory does not suffice for a single row.
            OtherProcessError: Another process ended.
        """
        with lost_process_in_words():
            values = self._forward_and_backward(batches, step)
            norm = self.optimizer.clip()
        finite = torch.isfinite(norm + values["loss"])
        self.optimizer.step(
            step, finite
        )  # at the learning rate of this step; not at all unless finite
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(step)
        return StepResult(values | {"grad_norm": norm}, finite)

    def _forward_and_backward(self, batches: Sequence[Batch], step: int) -> dict[str, Tensor]:
        """Leave the mean gradient of the global batch in the parameters; the means of the losses."""
        mean_targets, largest, cut = self._agree(batches)
        self.micro_batch_size.agree(cut)
        self.parallel.begin_step(largest)
        sums = self.micro_batch_size.until_it_fits(
            lambda cut: self._accumulate(
                micro_batches(batches, step, cut, mean_targets, self.world)
            ),
            self.module,
            step,
            restartable=self.parallel.restartable,
        )
        self.parallel.end_step()
        names = sorted(sums)
        means = self.world.mean(torch.stack([sums[name] for name in names]))
        return dict(zip(names, means.unbind(), strict=True))

    def _accumulate(self, micro_batches: Iterable[MicroBatch]) -> dict[str, Tensor]:
        """Forward and backward pass of each micro-batch; sums that are means over the rows of this process."""
        sums: dict[str, Tensor] = {}
        seed, device = self.config.seed, self.world.device
        for micro in micro_batches:
            step = micro.batch["step"]
            seed_everything(mixed_seed(seed, step, "layers", micro.rows.start))  # for dropout
            generator = RowGenerator(seed, step, micro.rows)
            batch = to_device(micro.batch, device)
            with self.parallel.averaging(is_last=micro.is_last):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                    loss, parts = self.parallel.model(batch, generator)
                (loss * micro.share).backward()
            for name, value in parts.items():
                sums[name] = (
                    sums[name] + micro.share * value if name in sums else micro.share * value
                )
        return sums

    def _agree(self, batches: Sequence[Batch]) -> tuple[float, float, int]:
        """Of all processes: mean targets of a row, the largest batch in targets, and the largest cut."""
        targets = [batch["targets"] for batch in batches]
        size = max(len(counts) * max(counts) for counts in targets)
        everyone = self.world.exchange([sum(map(sum, targets)), size, self.micro_batch_size.cut])
        rows = sum(map(len, targets)) * self.world.num_ranks
        sums, sizes, cuts = zip(*everyone, strict=True)
        return sum(sums) / rows, max(sizes), int(max(cuts))
