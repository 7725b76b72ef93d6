"""The first stage: one pooled vector per image in a usearch graph on disk, which is read through memory.

``state.json`` names the graph's file and the parts that it holds, and is written after it: whoever reads an index while it grows sees
the graph before or the one after.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlv.errors import ConfigError, DataError, OutputError
from vlv.storage import read_settings, replacing, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from vlv.search.parts import Part

STATE_NAME = "state.json"
EXACT_BELOW = 20_000
"""Images among which all are compared; the graph pays beyond."""
_CONNECTIVITY, _EXPANSION_ADD = 16, 128


def load_usearch() -> Any:
    """The package usearch.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module("usearch.index")
    except ImportError:
        raise ConfigError('search needs the package usearch: pip install "vlv[search]"') from None


@dataclass(frozen=True)
class State:
    """What the graph of an index holds."""

    graph: str
    """Name of its file."""
    num_bytes: int
    """Size of its file."""
    parts: tuple[str, ...]
    """Names of the parts, in the order in which they were added."""
    num_images: int


def read_state(folder: Path) -> State | None:
    """The state of an index; None where it was never finished.

    Raises:
        OutputError: The file is damaged.
    """
    mend = "vlv index build, given again, makes it anew once it is removed"
    found = read_settings(folder / STATE_NAME, mend=mend)
    if found is None:
        return None
    try:
        parts = tuple(map(str, found["parts"]))
        return State(str(found["graph"]), int(found["bytes"]), parts, int(found["images"]))
    except (KeyError, TypeError, ValueError) as error:
        raise OutputError(f"{folder / STATE_NAME} is damaged ({error!r}); {mend}") from error


def update_graph(folder: Path, parts: Sequence[Part]) -> None:
    """Bring the graph up to all parts: only what is new is added, by one thread in the order of the parts, so that it is always the same.

    Raises:
        OutputError: The disk refuses.
    """
    names = tuple(part.path.name for part in parts)
    state = _usable_state(folder, parts[0].width)
    if state is not None and state.parts == names:
        return
    graph = _new_graph(parts[0].width)
    have = len(state.parts) if state is not None and names[: len(state.parts)] == state.parts else 0
    if state is not None and have:
        graph.load(folder / state.graph)
    for part in parts[have:]:
        graph.add(part.keys, part.pooled(), threads=1)
    path = folder / f"{names[-1].partition('.')[0]}-{len(graph)}.usearch"
    with replacing(path) as temporary:
        try:
            graph.save(temporary)
        except RuntimeError as error:
            raise OutputError(f"{path} cannot be written ({error})") from error
    about = {"graph": path.name, "bytes": path.stat().st_size, "parts": names, "images": len(graph)}
    write_json(folder / STATE_NAME, about)
    for old in folder.glob("*.usearch"):
        if old != path:
            old.unlink(missing_ok=True)


def _usable_state(folder: Path, width: int) -> State | None:
    """The state, where its graph can be used; otherwise it is made anew."""
    try:
        state = read_state(folder)
        if state is not None:
            Graph(folder, state, width)
    except (DataError, OutputError):
        return None
    return state


def _new_graph(width: int) -> Any:
    return load_usearch().Index(
        ndim=width,
        metric="cos",
        dtype="f16",
        connectivity=_CONNECTIVITY,
        expansion_add=_EXPANSION_ADD,
    )


class Graph:
    """The first stage of a finished index.

    Raises:
        DataError: The graph is damaged.
    """

    def __init__(self, folder: Path, state: State, width: int) -> None:
        path = folder / state.graph
        damaged = f"{path} is damaged; vlv index build, given again, makes it anew"
        if not path.is_file() or path.stat().st_size != state.num_bytes:
            raise DataError(damaged)
        self._graph = _new_graph(width)
        try:
            self._graph.view(path)
        except (RuntimeError, ValueError) as error:
            raise DataError(damaged) from error
        if len(self._graph) != state.num_images:
            raise DataError(damaged)

    def nearest(
        self, pooled: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
        """Keys of the images whose pooled vectors (d,) are nearest, and their cosines, best first."""
        self._graph.expansion_search = max(64, count)
        exact = len(self._graph) < EXACT_BELOW
        found = self._graph.search(pooled.astype(np.float16), count, exact=exact, threads=1)
        return np.asarray(found.keys), 1 - np.asarray(found.distances, np.float32)
