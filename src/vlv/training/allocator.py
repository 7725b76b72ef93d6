"""The memory of a CPU that a step frees stays with the process, so that the next step finds it.

The C library gives large blocks back to the system at once. Every step then asks for them anew, and the system has to
fill each page with zeros before it is written.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of malloc.h
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
_RELEASE = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}
"""What glibc arrives at by itself where blocks are large; it stops adjusting once anything is set."""


@contextmanager
def kept_memory(device: torch.device) -> Iterator[bool]:
    """Within it the process keeps what is freed; afterwards that is given back, and so is later memory.

    The settings are glibc's. Under another C library, or where the environment sets malloc up (`MALLOC_*`,
    `GLIBC_TUNABLES`), nothing happens.

    Args:
        device: Where the work is done; only a CPU's memory is the C library's.

    Yields:
        Whether it is so.
    """
    library = _glibc() if device.type == "cpu" and not _is_set_up() else None
    if library is None:
        yield False
        return
    for option, value in _KEEP.items():
        library.mallopt(option, value)
    try:
        yield True
    finally:
        for option, value in _RELEASE.items():
            library.mallopt(option, value)
        library.malloc_trim(0)


def _is_set_up() -> bool:
    """Whether the user has taken the matter in hand."""
    return any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)


def _glibc() -> Any:
    """The C library of this process, if it is glibc."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no such handle
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None
