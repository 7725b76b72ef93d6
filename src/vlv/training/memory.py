"""Memory before it is needed: the real step on tensors that have shapes and no numbers, with every byte counted.

Parts from the meta device become fake tensors (`hollow`); the run's own forward pass, backward pass and optimiser
work on them while `LiveBytes` follows which storages are alive. Of what is dealt out to several processes (FSDP) one
share counts, and what the exchanges put together at a time is added. What it cannot see are the workspaces inside a
kernel, the allocator's rounding, and what a GPU's driver takes for itself (half a gigabyte or so).
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlv.training.distributed import World
from vlv.training.microbatches import with_targets
from vlv.training.parallel import gathered_bytes, units, uses_fsdp
from vlv.training.step import TrainingStep
from vlv.training.weights import set_train_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vlv.config import LoopConfig, OptimConfig
    from vlv.training.objective import Batch, Objective


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
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Any, shares: int = 1) -> None:
        """Count a tensor's storage, or one of several shares of it, for as long as it lives."""
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() // shares
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key)

    def deal_out(self, tensor: Tensor, shares: int) -> None:
        """From now on count one of several shares of a tensor's storage, which counted whole."""
        key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes() // shares
        self.now += size - self._sizes[key]
        self._sizes[key] = size

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self.add(leaf)
        return result


def num_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers; shared ones count once."""
    return sum_of_bytes({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def sum_of_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, one by one."""
    return sum(t.numel() * t.element_size() for t in tensors)


def rehearse_training(
    objective: Objective,
    batch: Batch,
    loop: LoopConfig,
    optim: OptimConfig,
    *,
    num_ranks: int = 1,
) -> Footprint:
    """Memory of the training step in one process, at the end of the run, when nothing is frozen for the time being.

    It is a GPU's step: attention has the precision of all else, as it has not on a CPU.

    Args:
        objective: Its module holds real or fake tensors; real ones are changed.
        batch: `loop.batch_size` rows; fake ones for a fake module.
        loop: Precision, accumulation, moving average, and whether what trains is dealt out to the processes.
        optim: The optimiser.
        num_ranks: Processes that train together.
    """
    device = next(objective.module.parameters()).device
    shares = num_ranks if uses_fsdp(loop, World(0, num_ranks, device)) else 1
    loop_of_a_gpu = loop.model_copy(update={"cpu_tricks": False})
    step = TrainingStep(objective, loop_of_a_gpu, optim, World(0, 1, device))
    set_train_mode(step.module, everything=loop.train_mode == "all")
    _fill_optimizer(step)
    averages = step.average.averages if step.average is not None else {}
    states = (*averages.values(), *step.optimizer.tensors().values())
    trained = list(step.parameters.values())
    # gradients are there before the pass where another one went before, and in the buckets of DDP
    if loop.passes_per_step(num_ranks) > 1 or num_ranks > shares:
        _fill_gradients(step)
    with LiveBytes() as live, ExitStack() as hooks:
        for tensor in (*trained, *states, *(p.grad for p in trained)):
            live.add(tensor, shares)
        for tensor in (*step.module.parameters(), *step.module.buffers(), *batch.values()):
            live.add(tensor)
        if shares > 1:  # what lies in no block has whole gradients until the end of the pass
            for parameter in chain(*units(step.module)[:-1]):
                hook: Any = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda p: live.deal_out(p.grad, shares)
                )
                hooks.callback(hook.remove)
        step([with_targets(batch, objective, loop.batch_size)], loop.steps - 1)
    gradients = sum_of_bytes(trained) // shares
    weights = num_bytes(step.module) - sum_of_bytes(trained) + gradients
    optimizer = sum_of_bytes(states) // shares
    peak = live.peak + gathered_bytes(step.module, shares)
    return Footprint(weights, gradients, optimizer, max(0, peak - weights - gradients - optimizer))


def _fill_gradients(step: TrainingStep) -> None:
    """Gradients of zero, as a pass leaves them behind."""
    for parameter in step.parameters.values():
        parameter.grad = torch.zeros_like(parameter)


def _fill_optimizer(step: TrainingStep) -> None:
    """The state that the optimiser has from its first step on."""
    _fill_gradients(step)
    step.optimizer.step(0)
    step.optimizer.zero_grad()


def rehearse(module: nn.Module, inputs: Tensor, work: Callable[[Tensor], Any]) -> Footprint:
    """Memory of `work` on the inputs, without gradients; module and inputs hold real or fake tensors."""
    weights = num_bytes(module)
    with torch.no_grad(), LiveBytes() as live:
        for tensor in (*module.parameters(), *module.buffers(), inputs):
            live.add(tensor)
        work(inputs)
    return Footprint(weights, activations=live.peak - weights)


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
