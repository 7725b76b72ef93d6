"""In which precision a module computes under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn


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
