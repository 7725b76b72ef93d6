"""Modules and tensors that have shapes and no numbers."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vlv.training.objective import Objective

ObjectiveT = TypeVar("ObjectiveT", bound="Objective")


@contextmanager
def imagined() -> Iterator[None]:
    """Tensors made within have shapes and no numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def hollow(module: nn.Module, dtype_of: Callable[[str], torch.dtype] | None = None) -> None:
    """Give a module of the meta device fake tensors, within `imagined`; shared tensors stay shared.

    Args:
        module: Changed in place.
        dtype_of: Floating-point type of a parameter by its name; None keeps what it has.
    """
    made: dict[int, Tensor] = {}
    for prefix, part in module.named_modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _hollow_copy(tensor, f"{prefix}.{name}", dtype_of)
                tensors[name] = made[id(tensor)]


def _hollow_copy(
    tensor: Tensor, name: str, dtype_of: Callable[[str], torch.dtype] | None
) -> Tensor:
    cast_it = dtype_of is not None and isinstance(tensor, nn.Parameter)
    dtype = dtype_of(name) if cast_it and dtype_of is not None else tensor.dtype
    empty = torch.empty(tensor.shape, dtype=dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def without_numbers(objective: ObjectiveT) -> ObjectiveT:
    """A copy of an objective whose parameters and buffers are on the meta device, so that it takes no memory."""
    tensors = (*objective.module.parameters(), *objective.module.buffers())
    return copy.deepcopy(objective, {id(tensor): _on_meta(tensor) for tensor in tensors})


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty
