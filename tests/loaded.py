"""A model folder is read once for all commands of the tests: reading it takes longer than what most do with the model."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vlv.models import folder as folders
from vlv.training import assemble
from vlv.training.parts import part_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest
    import torch

    from vlv.config import PartSource

Stamp = tuple[tuple[str, int, int, int], ...]


def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give copies of components that were read before, while no file of theirs has changed; all else is done anew."""
    read, read_part = folders._loaded, assemble.load_pretrained

    def loaded(name: str, folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
        return deepcopy(_read(read, (name, folder, dtype, variant), _stamp(folder)))

    def load_pretrained(kind: Any, source: PartSource, what: str) -> Any:
        stamp = _stamp(part_folder(source, None))
        return deepcopy(_read(read_part, (kind, source, what), stamp))

    monkeypatch.setattr(folders, "_loaded", loaded)
    monkeypatch.setattr(assemble, "load_pretrained", load_pretrained)


def _stamp(folder: Path) -> Stamp:
    """What changes with a folder: names, inodes, sizes and times of its files."""
    files = ((path.as_posix(), path.stat()) for path in sorted(folder.rglob("*")))
    return tuple((name, found.st_ino, found.st_size, found.st_mtime_ns) for name, found in files)


@lru_cache(maxsize=64)
def _read(read: Callable[..., Any], arguments: tuple[Any, ...], stamp: Stamp) -> Any:
    del stamp
    return read(*arguments)
