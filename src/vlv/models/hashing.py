"""Hash the weights of a module, to tell which model something was computed with."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_hash(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of all parameters and persistent buffers, names included.

    Args:
        module: Whose weights.
        dtype: Round them to it first, so that the hash does not depend on how finely they are held at the moment.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        value = value.to(dtype) if dtype and value.is_floating_point() else value
        digest.update(
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
