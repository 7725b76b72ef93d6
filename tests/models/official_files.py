"""The recorded files of the authors' code, and how they are read."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "official"
COMPONENTS = FOLDER / "components"
STAGE1 = FOLDER / "stage1.safetensors"
STAGE2 = FOLDER / "stage2.safetensors"


@cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    """Tensors of one recorded file; do not change them."""
    return load_file(FOLDER / f"{name}.safetensors")


@cache
def values(name: str) -> Any:
    """A recorded JSON file."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 1e-4) -> bool:
    """Whether tensors agree in shape and value."""
    return ours.shape == theirs.shape and bool((ours.detach() - theirs).abs().max() <= atol)
