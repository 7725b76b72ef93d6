"""The state of every random generator that a run uses, as JSON values."""

from __future__ import annotations

import base64
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def rng_state() -> dict[str, Any]:
    """State of the global generators of torch (CPU and every CUDA device), Python and numpy."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 (the global one)
    return {
        "torch": encode(torch.get_rng_state()),
        "cuda": [encode(state) for state in torch.cuda.get_rng_state_all()],
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Set what `rng_state` returned; CUDA states of devices that are absent here are left out."""
    torch.set_rng_state(decode(state["torch"]))
    for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(decode(value), device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002 (the global one)


def seed_everything(seed: int) -> None:
    """Seed the global generators: dropout layers draw from torch's."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the global one)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever is drawn within the context, the global generators go on as if it had not been."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def encode(state: torch.Tensor) -> str:
    """A generator state (uint8) as base64 text."""
    return base64.b64encode(state.numpy().tobytes()).decode()


def decode(text: str) -> torch.Tensor:
    """The inverse of `encode`."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
