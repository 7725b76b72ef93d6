"""Images that stay, written into tar shards with an index of what lies where."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlv.curation.inputs import SequentialReader, place_of, shown
from vlv.curation.tables import INDEX, Row, read_table, write_table, writing_table
from vlv.data.records import Span
from vlv.data.shards import TarShardWriter, shard_path
from vlv.data.tars import index_tar
from vlv.errors import DataError
from vlv.storage import Json

INDEX_NAME = "index.parquet"
_SUFFIXES = {"JPEG": "jpg", "TIFF": "tif"}
_UNLIMITED = 10**9


@dataclass(frozen=True)
class ShardLimits:
    """When a shard is full.

    Attributes:
        images: Most images of a shard.
        bytes: Most bytes of the images in a shard, of which there is at least one; None for no limit.
    """

    images: int = 1000
    bytes: int | None = None

    def cut(self, sizes: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Where the shards begin and end in a list of images with these sizes in bytes."""
        spans, start, total = [], 0, 0
        for place, size in enumerate(sizes.tolist()):
            too_many = place - start >= self.images
            too_large = self.bytes is not None and total + size > self.bytes
            if place > start and (too_many or too_large):
                spans.append((start, place))
                start, total = place, 0
            total += size
        return [*spans, (start, len(sizes))] if len(sizes) else spans


@dataclass(frozen=True)
class ShardTask:
    """One shard to write.

    Attributes:
        folder: Of the shard.
        number: Of the shard.
        rows: Tables of measurements, each with the rows that are taken from it, in order.
        index: The Parquet file of its part of the index.
        max_bytes: Of an image.
        image_root: Folder below which the images of a table may lie, beside its own.
    """

    folder: Path
    number: int
    rows: tuple[tuple[Path, NDArray[np.uint32]], ...]
    index: Path
    max_bytes: int
    image_root: str | None = None

    @property
    def is_done(self) -> bool:
        """Whether the shard and its part of the index are there."""
        return self.index.exists() and shard_path(self.folder, self.number).exists()


def write_shard(task: ShardTask) -> int:
    """Write a shard and its part of the index; returns the number of images.

    Raises:
        DataError: An image is gone, or is another than when it was measured.
        OutputError: The shard cannot be written.
    """
    path = shard_path(task.folder, task.number)
    path.unlink(missing_ok=True)  # complete, but without its index
    entries: list[Row] = []
    writer = TarShardWriter(task.folder, per_shard=_UNLIMITED, index=task.number)
    with writer, SequentialReader(task.max_bytes, task.image_root) as reader:
        for table, numbers in task.rows:
            rows = read_table(table)
            for number in numbers.tolist():
                key = f"{task.number:05d}-{len(entries):05d}"
                writer.write(key, _members(rows[number], reader))
                entries.append({**rows[number], "key": key})
    members = index_tar(path).keys
    for entry in entries:
        span = members[entry["key"]][_suffix(entry)]
        entry["offset"], entry["size"] = span.offset, span.size
    write_table(task.index, INDEX, [_entry(entry, path.name) for entry in entries])
    return len(entries)


def _suffix(row: Row) -> str:
    return _SUFFIXES.get(row["format"], str(row["format"]).lower())


def _members(row: Row, reader: SequentialReader) -> dict[str, bytes | str]:
    """The members of one record: image, caption, what is known, and whatever else the tar held."""
    place = place_of(row)
    data = reader.read(place)
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise DataError(
            f"{shown(place)}: the image has changed since it was measured; begin anew in an empty folder"
        )
    parts: dict[str, bytes | str] = {_suffix(row): data}
    if row["caption"] is not None:
        parts["txt"] = row["caption"]
    parts["json"] = json.dumps(_meta(row), ensure_ascii=False)
    if isinstance(place, Span):
        for suffix, (offset, size) in json.loads(row["extras"] or "{}").items():
            parts.setdefault(suffix, reader.read(Span(place.path, offset, size)))
    return parts


def _meta(row: Row) -> Json:
    """What is known of an image, with the hash of its bytes here, which training can check."""
    meta = {"id": row["id"], **json.loads(row["meta"] or "{}")}
    stated = meta.get("sha256")
    if stated not in (
        None,
        row["sha256"],
    ):  # img2dataset states that of the file before it resized it
        meta["source_sha256"] = stated
    return meta | {"sha256": row["sha256"]}


def _entry(row: Row, shard: str) -> Row:
    entry = {name: row.get(name) for name in INDEX}
    phash = row["phash"]
    return entry | {
        "shard": shard,
        "source": shown(place_of(row)),
        "phash": None if phash is None else f"{phash:016x}",
    }


def plan_shards(
    table: NDArray[np.void],
    places: NDArray[np.int64],
    tables: Sequence[Path],
    *,
    folder: Path,
    work: Path,
    limits: ShardLimits,
    max_bytes: int,
    image_root: str | None = None,
) -> list[ShardTask]:
    """The shards that hold some of the survivors, in their order."""
    tasks = []
    spans = limits.cut(table["bytes"][places].astype(np.int64))
    for number, (start, stop) in enumerate(spans):
        chosen = table[places[start:stop]]
        rows = tuple(
            (tables[part], chosen["row"][chosen["part"] == part])
            for part in np.unique(chosen["part"]).tolist()
        )
        index = work / f"index-{number:05d}.parquet"
        tasks.append(ShardTask(folder, number, rows, index, max_bytes, image_root))
    return tasks


def join_index(folder: Path, tasks: Sequence[ShardTask]) -> None:
    """Put the parts of the index together, one row group for each shard.

    Raises:
        OutputError: It cannot be written.
    """
    with writing_table(folder / INDEX_NAME, INDEX) as add:
        for task in tasks:
            add(read_table(task.index))
