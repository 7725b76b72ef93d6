"""What torch.compile, memory layouts and autocast need to know, in training and in use."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

_RECOMPILE_LIMIT = 64
"""Compilations of one line of code before PyTorch gives up and runs it eagerly."""


def lay_out(parts: Iterable[nn.Module | None]) -> None:
    """Put convolutional modules into channels-last layout, in place; None entries are skipped."""
    for part in parts:
        if part is not None:
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def why_no_compiler(device: torch.device) -> str:
    """Why nothing can be compiled for a device here; empty where it can."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "Triton is not installed, or does not know this GPU"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:  # InvalidCxxCompiler
        return f"no C++ compiler was found ({str(error).splitlines()[0]})"
    return ""


def repeated_layers(module: nn.Module) -> list[nn.Module]:
    """Repeated layers; compiling one serves all, in seconds where the whole takes minutes.

    Args:
        module: One or several stacks of layers of one class, with whatever stands around them.
    """
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len({type(layer) for layer in child}) == 1:
            found += child
        else:
            found += repeated_layers(child)
    return found


def is_compiled(module: nn.Module) -> bool:
    """Whether any part of a module is compiled."""
    return any(part._compiled_call_impl is not None for part in module.modules())


def uncompiled(module: nn.Module) -> AbstractContextManager[object]:
    """Run compiled parts of a module eagerly within the context: a growing cache would recompile them at every step."""
    return torch.compiler.set_stance("force_eager") if is_compiled(module) else nullcontext()


def compile_layers(layers: Iterable[nn.Module], *, dynamic: bool | None) -> None:
    """Compile layers in place on first use; equal layers share one compilation.

    Args:
        layers: Changed in place.
        dynamic: Whether shapes change from call to call; None finds out.
    """
    import torch._dynamo.config as limits

    # transformers' layers share the line of code at which compilations are counted: with and without gradient, in other
    # shapes and classes, there are soon more than the default allows
    limits.recompile_limit = max(limits.recompile_limit, _RECOMPILE_LIMIT)
    for layer in layers:
        layer.compile(dynamic=dynamic)


def own_precision(module: nn.Module) -> AbstractContextManager[object]:
    """No autocast within a module whose weights are in a half type, as frozen ones are in bfloat16 training.

    Autocast would compute norms in float32 on a GPU and carry every residual sum on in float32, which doubles the memory
    traffic between the matrix products.

    Args:
        module: Its first parameter decides; one of float32 leaves autocast as it is.
    """
    first = next(module.parameters())
    if first.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(first.device.type, enabled=False)
