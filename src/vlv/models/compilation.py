"""What torch.compile, memory layouts and autocast need to know, in training and in use."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

_TRANSLATIONS = 64
"""Of one line of code, before it is run as written."""


def lay_out(parts: Iterable[Any]) -> None:
    """Channels last, in place, for parts made of convolutions; None among them is passed over."""
    for part in parts:
        if part is not None:
            part.to(memory_format=torch.channels_last)


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
    """The layers that a transformer is a row of: translated once, they serve all, in seconds where the whole takes minutes.

    Args:
        module: One or several rows of layers of one class, with whatever stands around them.
    """
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len({type(layer) for layer in child}) == 1:
            found += child
        else:
            found += repeated_layers(child)
    return found


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile is to translate any part of a module."""
    return any(part._compiled_call_impl is not None for part in module.modules())


def untranslated(module: nn.Module) -> AbstractContextManager[Any]:
    """Within the context compiled parts of a module run as written.

    For what would be translated anew all the time, such as layers that read a growing cache.
    """
    return torch.compiler.set_stance("force_eager") if is_compiled(module) else nullcontext()


def compile_layers(layers: Iterable[nn.Module], *, dynamic: bool | None) -> None:
    """Have layers translated, each when it is first used; layers that are alike share one translation.

    All layers of transformers share a line of code at which translations are counted: without a gradient, in other
    shapes and for other classes there are soon more than PyTorch allows by default before it gives up.

    Args:
        layers: Changed in place.
        dynamic: Whether shapes change from call to call; None finds out.
    """
    import torch._dynamo.config as limits

    limits.recompile_limit = max(limits.recompile_limit, _TRANSLATIONS)
    for layer in layers:
        layer.compile(dynamic=dynamic)


def own_precision(module: nn.Module) -> AbstractContextManager[Any]:
    """No autocast within a module whose weights are held in a half type, as frozen ones are in bfloat16 training.

    All of it computes in that type then, as it does when the model is used. Autocast would compute norms in float32 on a
    GPU and so carry every residual sum on in float32, which doubles the memory traffic between the products.

    Args:
        module: Its first parameter decides; one of float32 leaves autocast as it is.
    """
    first = next(module.parameters())
    if first.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(first.device.type, enabled=False)
