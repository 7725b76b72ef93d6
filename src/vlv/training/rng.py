"""The global random generators, from which dropout layers draw."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch (all devices), Python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the global one)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever is drawn within the context, the global generators go on as if it had not been."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global one)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002 (the global one)
