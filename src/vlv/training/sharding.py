"""What trains, dealt out to the processes (FSDP2): each holds a share of weights, gradients, moments and averages.

A block of layers is put together for the time of its forward and backward pass. Optimiser and average work on the
shares, which are plain tensors; checkpoints hold whole ones, so a run may go on with or without. What is frozen is not
dealt out: nothing but memory for the weights would be gained, and it is small in half precision.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vlv.config import LoopConfig
    from vlv.training.distributed import World
    from vlv.training.optim import Parameters


def uses_fsdp(config: LoopConfig, world: World) -> bool:
    """Whether what trains is dealt out: by `loop.parallel`, or else as `accelerate launch` was configured."""
    configured = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    wanted = configured if config.parallel is None else config.parallel == "fsdp"
    return wanted and world.is_shared


def shard(model: nn.Module, world: World) -> None:
    """Deal out what trains in a model, block by block, in place."""
    options: dict[str, Any] = {
        "mesh": init_device_mesh(world.device.type, (world.num_ranks,)),
        "ignored_params": {p for p in model.parameters() if not p.requires_grad},
    }
    for block in _dealt_out_by_itself(model):
        fully_shard(block, **options)


def units(model: nn.Module) -> list[list[nn.Parameter]]:
    """What is put together at a time: what trains in each block, and last what lies in none."""
    taken: set[nn.Parameter] = set()
    found = []
    for block in _dealt_out_by_itself(model):
        found.append([p for p in block.parameters() if p.requires_grad and p not in taken])
        taken.update(found[-1])
    return found


def bytes_put_together(model: nn.Module, shares: int) -> int:
    """Most bytes that a process holds beside its share while blocks are computed; 0 where nothing is dealt out.

    What lies in no block stays together from the forward pass to the end of the backward pass. Of the blocks, one is
    computed while the next is fetched, and the gradient of one is put in order and sent.
    """
    if shares == 1:
        return 0
    *blocks, rest = [sum(p.numel() * p.element_size() for p in unit) for unit in units(model)]
    largest = max(blocks, default=0)
    return (rest + 2 * largest) * (shares - 1) // shares + 2 * largest


def _dealt_out_by_itself(model: nn.Module) -> list[nn.Module]:
    """The blocks, inner ones first, and last the model."""
    return [*reversed(_blocks(model)), model]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers never splits, where something in them trains; outer ones first."""
    parts = list(model.modules())
    kinds = {kind for part in parts for kind in getattr(part, "_no_split_modules", None) or ()}
    return [
        part
        for part in parts
        if type(part).__name__ in kinds and any(p.requires_grad for p in part.parameters())
    ]


def share(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter or gradient: its storage, without history; all of a plain tensor."""
    own: Any = tensor.detach()
    return own.to_local() if isinstance(tensor, DTensor) else own  # type: ignore[no-any-return]


def share_of(whole: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor that is dealt out as another one is."""
    if not isinstance(like, DTensor):
        return whole
    whole = whole.to(like.device)
    return distribute_tensor(
        whole, like.device_mesh, like.placements, src_data_rank=None
    ).to_local()


def put_together(shares: Mapping[str, Tensor], parameters: Parameters) -> dict[str, Tensor]:
    """Whole tensors of shares, on the CPU where they were dealt out; all processes call this.

    Args:
        shares: By `<parameter name>` or `<parameter name>:<part>`; what belongs to no parameter stays as it is.
        parameters: What trains, by name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in shares.items():
        like: Tensor | None = parameters.get(name.split(":")[0])
        if isinstance(like, DTensor) and tensor.ndim:
            tensor = _whole(share(tensor), like).cpu()
        found[name] = tensor
    return found


def _whole(local: Tensor, like: DTensor) -> Tensor:
    spread = DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return spread.full_tensor()


def sum_of_shares(value: Tensor, parameters: Parameters) -> Tensor:
    """The sum of a value over the processes, where the parameters are dealt out to them."""
    if any(isinstance(p, DTensor) for p in parameters.values()):
        dist.all_reduce(value)
    return value


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Within the context every process holds all weights, and may compute without the others."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:  # the model itself comes first
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not parts[0], recurse=False)


def undo_sharding(model: nn.Module, parameters: Parameters) -> None:
    """Give every process a plain module with all weights; all processes call this."""
    if not isinstance(model, FSDPModule):
        return
    plain: dict[int, nn.Parameter] = {}
    for parameter in parameters.values():
        whole = _whole(share(parameter), cast("DTensor", parameter))
        plain[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    for part in model.modules():
        for name, own in part._parameters.items():
            if own is not None and id(own) in plain:
                part._parameters[name] = plain[id(own)]
        if isinstance(part, FSDPModule):
            state: Any = part._get_fsdp_state()
            state._pre_forward_hook_handle.remove()
            state._post_forward_hook_handle.remove()
