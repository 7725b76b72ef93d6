"""Memory before it is needed: the real step on tensors that have shapes and no numbers, with every byte counted.

Parts from the meta device become fake tensors (`hollow`); the run's own forward pass, backward pass and optimiser
work on them while `LiveBytes` follows which storages are alive. What it cannot see are the workspaces inside a kernel,
the allocator's rounding, and what a GPU's driver takes for itself (half a gigabyte or so).
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlv.training.distributed import World
from vlv.training.run import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vlv.config import LoopConfig, OptimConfig
    from vlv.training.journal import Journal
    from vlv.training.objective import Batch, Loader, Objective


@dataclass(frozen=True)
class Footprint:
    """Bytes at the highest moment."""

    weights: int
    """Parameters and buffers."""
    gradients: int = 0
    """Of what trains."""
    optimizer: int = 0
    """Moments, and the moving average where there is one."""
    activations: int = 0
    """Everything else: activations, copies of weights in another dtype, inputs."""

    @property
    def peak(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.optimizer + self.activations


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that are alive; each counts once, however many tensors share it.

    A number that is read out of a tensor is taken as 1, as there may be none: a loss counts as finite.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def add(self, tensor: Any) -> None:
        """Count a tensor's storage for as long as it lives."""
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self.add(leaf)
        return result


def num_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers; shared ones count once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def rehearse_training(
    objective: Objective, batch: Batch, loop: LoopConfig, optim: OptimConfig
) -> Footprint:
    """Memory of the training step, at the end of the run, when nothing is frozen for the time being.

    It is a GPU's step: attention has the precision of all else, as it has not on a CPU.

    Args:
        objective: Its module holds real or fake tensors; real ones are changed.
        batch: `loop.batch_size` rows; fake ones for a fake module.
        loop: Precision, accumulation, moving average.
        optim: The optimiser.
    """
    device = next(objective.module.parameters()).device
    run = Run(objective, cast("Loader", None), loop, optim, Path(), {}, World(0, 1, device))
    run.journal = cast("Journal", _Silent())
    run.passes.attention = nullcontext()
    run.set_train_mode()
    weights = num_bytes(run.module)
    gradients = sum(p.numel() * p.element_size() for p in run.parameters.values())
    with LiveBytes() as live:
        for tensor in (*run.module.parameters(), *run.module.buffers()):
            live.add(tensor)
        averages = run.average.averages if run.average is not None else {}
        for tensor in (*averages.values(), *batch.values()):
            live.add(tensor)
        _fill_optimizer(run)
        if loop.passes_per_step() > 1:  # the pass meets the gradients of the one before
            _fill_gradients(run)
        run.step = loop.steps - 1
        run.learn([run.passes.counted(batch)])
    states = (*averages.values(), *run.optimizer.tensors().values())
    optimizer = sum(t.numel() * t.element_size() for t in states)
    rest = live.peak - weights - gradients - optimizer
    return Footprint(weights, gradients, optimizer, max(0, rest))


def _fill_gradients(run: Run) -> None:
    """Gradients of zero, as a pass leaves them behind."""
    for parameter in run.parameters.values():
        parameter.grad = torch.zeros_like(parameter)


def _fill_optimizer(run: Run) -> None:
    """The state that the optimiser has from its first step on."""
    _fill_gradients(run)
    run.optimizer.step(0)
    run.optimizer.zero_grad()


def rehearse(module: nn.Module, inputs: Tensor, work: Callable[[Tensor], Any]) -> Footprint:
    """Memory of `work` on the inputs, without gradients; module and inputs hold real or fake tensors."""
    weights = num_bytes(module)
    with torch.no_grad(), LiveBytes() as live:
        for tensor in (*module.parameters(), *module.buffers(), inputs):
            live.add(tensor)
        work(inputs)
    return Footprint(weights, activations=live.peak - weights)


class _Silent:
    """A journal that keeps nothing."""

    def tick(self) -> None:
        """Nothing to keep."""


def training_batch(pixels: Tensor) -> dict[str, Any]:
    """A batch with a caption for every image."""
    names = [str(row) for row in range(len(pixels))]
    return {"ids": names, "pixels": pixels, "captions": names}


class FullLength:
    """Stands for a tokenizer that makes every caption as long as it may be."""

    eos_token_id = 0

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, texts: Sequence[str], **_: Any) -> Any:
        """Token ids, one short of the length, as the end token comes behind them."""
        return SimpleNamespace(input_ids=[[0] * (self._length - 1) for _ in texts])
