"""How several processes share the model that trains: replicated (DDP) or sharded (FSDP2). A single process needs neither.

DDP: every process holds all weights, and gradients are averaged during the last backward pass of a step.
FSDP2: every process holds a shard of weights, gradients, moments and averages, as DTensors; a block of layers is gathered
for the time of its forward and backward pass. Frozen weights are replicated: nothing but their memory would be saved, and
they are small in half precision. Checkpoints hold whole tensors, so a run may go on with or without sharding.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from vlv.config import LoopConfig, RunConfig
from vlv.errors import ConfigError
from vlv.training.distributed import World
from vlv.training.objective import Batch, Objective
from vlv.training.weights import Parameters, gathered, trainable_parameters


class LossModule(nn.Module):
    """The objective's loss as the forward pass of a module, which DDP and FSDP can wrap."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.module = objective.module
        self.objective = objective

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and its parts for the log."""
        losses = self.objective.loss(batch, generator)
        parts = {name: value.detach() for name, value in losses.parts.items()}
        return losses.total, {"loss": losses.total.detach(), **parts}


class Parallel:
    """The model that trains, shared by the processes as `loop.parallel` says.

    Averaging gradients during the backward pass is fast, but a process that runs out of memory then cannot begin again
    without the others. So a step larger than all before it averages them afterwards. Under FSDP every pass is an
    exchange, and a shortage of memory always ends the run for this time.

    Args:
        objective: Its module stays plain; under FSDP a copy of it trains, and the original is empty meanwhile.
        config: Which of the two.
        world: The processes.

    Attributes:
        model: Called with a batch and a generator; returns the loss and its parts.
        module: The modules that train.
        parameters: What trains, by name; DTensors under FSDP.
        is_sharded: Whether it is FSDP.
        restartable: Whether the present step may be begun again by this process alone.
    """

    def __init__(self, objective: Objective, config: LoopConfig, world: World) -> None:
        self.world = world
        self.is_sharded = uses_fsdp(config, world)
        self._plain = trainable_parameters(objective.module)
        trained = _copy_to_shard(objective) if self.is_sharded else objective
        compile_parts = getattr(trained, "compile", None)
        if compile_parts is not None:
            compile_parts(config, world.device)
        self.model: nn.Module = LossModule(trained)
        self.module = trained.module
        if self.is_sharded:
            shard(self.model, world)
            self._empty()
        self.parameters: Parameters = trainable_parameters(self.module)
        self.restartable = True
        self._largest = 0.0

    # --- gradients

    def begin_step(self, size: float) -> None:
        """Choose when the gradients of a step are averaged."""
        known = size <= self._largest
        self.restartable = not self.world.is_shared or not (self.is_sharded or known)
        self._largest = max(self._largest, size)

    def averaging(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Around each pass: the last backward pass averages the gradients, unless that is left to `end_step`."""
        if isinstance(self.model, DistributedDataParallel) and (self.restartable or not is_last):
            return self.model.no_sync()
        return nullcontext()

    def end_step(self) -> None:
        """Average the gradients that no backward pass has averaged."""
        if self.world.is_shared and self.restartable:
            self.world.average([p.grad for p in self.parameters.values() if p.grad is not None])
            self._replicate()

    def _replicate(self) -> None:
        """Wrap the model in DDP, now that a step has shown whether some parameters get no gradient."""
        if isinstance(self.model, DistributedDataParallel):
            return
        unused = any(p.grad is None for p in self.parameters.values())
        frozen = [p for p in self.parameters.values() if not p.requires_grad]
        for parameter in frozen:  # for a while; DDP would never hear of it again
            parameter.requires_grad_(True)
        self.model = DistributedDataParallel(
            self.model,
            init_sync=False,  # all processes load the same weights
            find_unused_parameters=unused,
            gradient_as_bucket_view=True,
        )
        self.model.broadcast_buffers = False  # torch 2.13 calls the argument otherwise
        for parameter in frozen:
            parameter.requires_grad_(False)

    # --- weights

    @contextmanager
    def swapped_in(self, average: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Within the context the objective's module holds the average of the weights, or the weights if there is none.

        It holds them whole, in every process: each may compute without the others.
        """
        if not self.is_sharded and average is None:
            yield
            return
        before = {} if self.is_sharded else {n: p.detach().clone() for n, p in self._plain.items()}
        self.hand_over(average)
        try:
            yield
        finally:
            if self.is_sharded:
                self._empty()
            else:
                self.hand_over(before)

    @torch.no_grad()
    def hand_over(self, average: Mapping[str, Tensor] | None) -> None:
        """Leave the average of the weights, or the weights, in the objective's module; all processes call this."""
        for name, parameter in self._plain.items():
            if self.is_sharded:
                parameter.data = gathered((average or self.parameters)[name])
            elif average is not None:
                parameter.copy_(average[name])

    def _empty(self) -> None:
        for parameter in self._plain.values():
            parameter.data = parameter.data.new_empty(0)


def uses_fsdp(config: LoopConfig, world: World) -> bool:
    """Whether what trains is sharded: by `loop.parallel`, or else as `accelerate launch` was configured."""
    configured = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    wanted = configured if config.parallel is None else config.parallel == "fsdp"
    return wanted and world.is_shared


def check_sharding(config: RunConfig, world: World) -> None:
    """Refuse what sharded weights cannot do.

    Raises:
        ConfigError: Weights are frozen for a while, or write captions.
    """
    if not uses_fsdp(config.loop, world):
        return
    if config.stage2 and config.stage2.frozen_llm_steps:
        raise ConfigError(
            f"stage2.frozen_llm_steps is {config.stage2.frozen_llm_steps}, but sharded weights cannot be "
            "frozen for a while; set loop.parallel to ddp, or frozen_llm_steps to 0"
        )
    if config.stage3:
        raise ConfigError(
            "stage3 writes captions with whole weights, but this launcher shards them; set loop.parallel to ddp"
        )


def _copy_to_shard(objective: Objective) -> Objective:
    """A copy with parameters of its own where they train; frozen ones and buffers are shared with the original."""
    tensors = (*objective.module.parameters(), *objective.module.buffers())
    known = {id(t): nn.Parameter(t.detach()) if t.requires_grad else t for t in tensors}
    return copy.deepcopy(objective, known)


def shard(model: nn.Module, world: World) -> None:
    """Shard what trains in a model, block by block, in place."""
    mesh = init_device_mesh(world.device.type, (world.num_ranks,))
    frozen = {p for p in model.parameters() if not p.requires_grad}
    for block in (*reversed(_blocks(model)), model):  # inner ones first
        fully_shard(block, mesh=mesh, ignored_params=frozen)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers never splits, where something in them trains; outer ones first."""
    parts = list(model.modules())
    kinds = {kind for part in parts for kind in getattr(part, "_no_split_modules", None) or ()}
    return [
        part
        for part in parts
        if type(part).__name__ in kinds and any(p.requires_grad for p in part.parameters())
    ]


def units(model: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters that are gathered together: what trains in each block, and last what lies in none."""
    taken: set[nn.Parameter] = set()
    found = []
    for block in (*reversed(_blocks(model)), model):
        found.append([p for p in block.parameters() if p.requires_grad and p not in taken])
        taken.update(found[-1])
    return found


def gathered_bytes(model: nn.Module, shards: int) -> int:
    """Most bytes that a process holds beside its shard while blocks are computed; 0 without sharding.

    What lies in no block stays gathered from the forward pass to the end of the backward pass. Of the blocks, one is
    computed while the next is fetched, and the gradient of one is put in order and sent.
    """
    if shards == 1:
        return 0
    *blocks, rest = [sum(p.numel() * p.element_size() for p in unit) for unit in units(model)]
    largest = max(blocks, default=0)
    return (rest + 2 * largest) * (shards - 1) // shards + 2 * largest
