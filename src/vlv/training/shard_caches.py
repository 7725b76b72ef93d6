"""What was computed of shards that are streamed: found by the hash of each image, checked when it is read.

When a run begins, the manifest of every shard is compared: weights, image size, framing, and of a local shard its size
in bytes. When a record is read, the SHA-256 of its image, which is in memory anyhow, finds the row that belongs to it; an
image that the cache does not have ends the run. So a row can only be that of the very image, whatever its id, its place
in the shard, or where the shard lies.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from vlv.data.framing import DEFAULT_FRAMING, Framing
from vlv.data.loader import finite_row
from vlv.data.records import find_records
from vlv.data.tables import Absent, Held
from vlv.errors import CacheError
from vlv.training.cache_parts import (
    BESIDE,
    hash_of,
    open_part,
    part_folders,
    read_manifest,
    refuse_difference,
)
from vlv.training.latents import Cache, fill_cache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vlv.data.records import Record
    from vlv.data.streams import Shard

_OPEN_PARTS = 64  # a few for each partition; each holds some files and 100 bytes per record


def fill_shards(
    cache: Cache, shards: Sequence[Shard], image_size: int, where: str | Path, **options: Any
) -> int:
    """Compute the cache of shards one after the other; the records of one of them are in memory at a time.

    Args:
        cache: What to compute.
        shards: What `list_shards` returns.
        image_size: Side of the images in pixels.
        where: Folder of the cache, or `BESIDE`.
        options: As for `fill_part`.

    Returns:
        The number of records.

    Raises:
        CacheError: A shard is a Hugging Face dataset, or two have the same name.
        DataError: As `find_records` and `fill_part`.
    """
    _folders_of(cache, shards, where)
    num_records = 0
    for shard in tqdm(shards, desc=f"{cache.kind} of shards", unit="shard"):
        records = find_records([str(shard.source)], columns=shard.columns)
        fill_cache(cache, records, image_size, where, **options)
        num_records += len(records)
    return num_records


class ShardRows:
    """For `Streamed`: record to its rows in the caches.

    Args:
        caches: What was computed, each with its folder or `BESIDE`.
        shards: All that the run reads.
        image_size: Side of the images in pixels.
        framing: How an image becomes a square, see `frame`.

    Raises:
        CacheError: A shard has no cache, or one of another model, image size, framing or shard.
    """

    def __init__(
        self,
        caches: Sequence[tuple[Cache, str]],
        shards: Sequence[Shard],
        image_size: int,
        framing: Framing = DEFAULT_FRAMING,
    ) -> None:
        self._open = lru_cache(_OPEN_PARTS)(_open)
        self._parts: dict[str, list[tuple[Cache, Path]]] = {}
        for cache, where in caches:
            wanted = cache.depends_on(image_size, framing)
            for file, folder in _folders_of(cache, shards, where).items():
                _check_shard(cache, file, folder, where, wanted)
                self._parts.setdefault(file, []).append((cache, folder))

    def __call__(self, index: int, record: Record) -> dict[str, NDArray[Any]]:
        """The rows of a record whose image is in memory; safe to call from several threads.

        Raises:
            DataError: Its image could not be read, now or when the cache was made.
            CacheError: The image is none of those of which the cache was made.
        """
        digest = hash_of(record.open())
        if not isinstance(record.source, Held | Absent):
            raise CacheError(
                f"{record.source}: a table that names images by their paths has no cache for streaming; set "
                "data.streaming to false, or pack the images into shards"
            )
        rows: dict[str, NDArray[Any]] = {}
        for cache, folder in self._parts[record.source.path]:
            places, arrays = self._open(folder, cache.names)
            place = places.get(digest)
            if place is None:
                raise CacheError(
                    f"{record.name}: the {cache.kind} in {folder} are not those of this image, so the shard has changed; "
                    f"delete the folder and run vlv data cache-{cache.kind} again"
                )
            for name, array in arrays.items():
                rows[name] = finite_row(np.array(array[place]), name, record)
        return rows


def _folders_of(cache: Cache, shards: Sequence[Shard], where: str | Path) -> dict[str, Path]:
    """Shard to the folder of what was computed of it."""
    for shard in shards:
        if isinstance(shard.source, str):
            raise CacheError(
                f"{shard}: the {cache.kind} of a Hugging Face dataset cannot be streamed; set data.{cache.kind} to null, "
                "or data.streaming to false"
            )
    return part_folders(where, cache.kind, [str(shard.source) for shard in shards])


def _check_shard(
    cache: Cache, file: str, folder: Path, where: str | Path, wanted: dict[str, Any]
) -> None:
    found = read_manifest(folder)
    if found is None:
        output = "" if where == BESIDE else f" -o {where}"
        raise CacheError(
            f"{file}: its {cache.kind} are not in {folder}; run vlv data cache-{cache.kind} {file}{output} with the "
            "--config of this run"
        )
    if found.get("bytes") is not None and Path(file).is_file():
        wanted = wanted | {"bytes": Path(file).stat().st_size}
    refuse_difference(cache.kind, folder, found, wanted)


def _open(
    folder: Path, names: tuple[str, ...]
) -> tuple[dict[bytes, int], dict[str, NDArray[np.float16]]]:
    """Hash of an image to its row, and the arrays of a part, memory-mapped."""
    arrays = open_part(folder, (*names, "hashes"))
    hashes = np.array(arrays.pop("hashes"))  # (N, 32)
    return {row.tobytes(): place for place, row in enumerate(hashes)}, arrays
