"""Finished batches on disk, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Shelf:
    """Arrays by name, kept in a folder for as long as an evaluation lasts.

    Args:
        folder: Where; None keeps nothing.
        about: What all arrays depend on beside their names and what `get` is given, as JSON values.
            Arrays of another evaluation in the same folder are never taken for those of this one.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self._folder = None if folder is None else folder / digest[:16]

    def get(
        self, name: str, given: Iterable[Tensor], make: Callable[[], NDArray[Any]]
    ) -> NDArray[Any]:
        """The array of that name, made from these tensors; where there is none, it is made and kept."""
        if self._folder is None:
            return make()
        digest = hashlib.sha256()
        for tensor in given:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        path = self._folder / f"{name.replace(' ', '-')}-{digest.hexdigest()[:16]}.npy"
        if path.is_file():
            kept: NDArray[Any] = np.load(path)
            return kept
        made = make()
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        with temporary.open("wb") as file:
            np.save(file, made)
        temporary.replace(path)
        return made
