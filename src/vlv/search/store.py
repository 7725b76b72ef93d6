"""What a finished index holds, read without its model."""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlv.errors import DataError
from vlv.models.search_space import SPACE_NAME, Space
from vlv.search.build import read_about
from vlv.search.engine import Graph, State, load_usearch, read_state
from vlv.search.parts import ROW_BITS, Part

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from vlv.storage import Json

    Keys = NDArray[np.uint64]

_KEPT_PARTS = 1024
"""Whose images are held in memory by name: about 100 MB."""
_ROW = (1 << ROW_BITS) - 1


class Store:
    """The files of an index; an image is known by its key.

    Args:
        folder: What `vlv index build` wrote.

    Raises:
        DataError: The folder is no index, is not finished, or is damaged.
        ConfigError: The package usearch is missing.
    """

    def __init__(self, folder: Path) -> None:
        load_usearch()
        self.folder, self.about = folder, check_finished(folder)
        self._state = _finished(folder)
        self.space = Space.load(folder / SPACE_NAME)
        if self.space.hash() != self.about["space"]:
            raise DataError(f"{folder / SPACE_NAME} was replaced; build the index anew")
        self._graph = Graph(folder, self._state, self.space.width)
        paths = [folder / "parts" / name for name in self._state.parts]
        self._parts = {part.number: part for part in map(Part, paths)}
        self._images = lru_cache(_KEPT_PARTS)(lambda number: self._parts[number].images())

    def __len__(self) -> int:
        return self._state.num_images

    def nearest(self, pooled: NDArray[np.float32], count: int) -> tuple[Keys, NDArray[np.float32]]:
        """Keys and cosines of the images whose pooled vectors (d,) are nearest, best first; all where there are fewer."""
        return self._graph.nearest(pooled, min(len(self), count))

    def tokens(self, keys: Keys) -> Tensor:
        """Tokens (K, L, d) of images; neighbours on the disk are read together where their keys follow one another."""
        rows = []
        for number, group in groupby(keys.tolist(), key=lambda key: key >> ROW_BITS):
            rows.append(self._parts[number].tokens([key & _ROW for key in group]))
        return torch.from_numpy(np.concatenate(rows)).float()

    def image(self, key: int) -> Json:
        """What is known of an image: id, file_name, sha256."""
        return self._images(key >> ROW_BITS)[key & _ROW]

    def picture(self, key: int) -> bytes:
        """A small JPEG of an image; empty where only its embedding was indexed."""
        return self._parts[key >> ROW_BITS].picture(key & _ROW)

    def pooled(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Key and pooled vector (d,) of every image, in order."""
        for part in self._parts.values():
            yield from zip(part.keys.tolist(), part.pooled().astype(np.float32), strict=True)


def check_finished(folder: Path) -> Json:
    """What an index says of itself, before anything else is loaded.

    Raises:
        DataError: It is none, holds no images, or its building was never finished.
    """
    about = read_about(folder)
    _finished(folder)
    return about


def _finished(folder: Path) -> State:
    state = read_state(folder)
    if state is not None:
        return state
    if any((folder / "parts").glob("*.safetensors")):
        raise DataError(
            f"{folder} is not finished; give its vlv index build again, which goes on where it stopped"
        )
    raise DataError(
        f"{folder} holds no images yet; add some with vlv index build INPUT --output {folder}"
    )
