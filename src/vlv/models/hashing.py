"""Hash the weights of a module, to tell which model something was computed with."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

_SAMPLE = 1024
"""Values of each tensor that `sample_hash` looks at."""


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


def sample_hash(folder: Path) -> str:
    """SHA-256 of a sample of a component's weights, to tell in a moment which component an adapter belongs to.

    Names, shapes and up to 1,024 evenly spaced values of each tensor count, rounded to bfloat16, so that a copy in half
    precision is the same component. Training moves weights everywhere, so that no other is.

    Args:
        folder: With safetensors files.
    """
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: _sample(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    return hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()


def _sample(name: str, tensor: Tensor) -> bytes:
    """Name, shape and some values of a tensor."""
    values = tensor.flatten()[:: max(1, tensor.numel() // _SAMPLE)][:_SAMPLE]
    digits: bytes = values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
    return f"{name}{list(tensor.shape)}".encode() + digits
