"""Captions together with their images, in the forms that training tools read.

Everything is in the order of the inputs and depends on nothing but the rows, so that the same captions give the
same files, however they came about.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from vlv.data.records import Span
from vlv.data.shards import TarShardWriter, shard_path
from vlv.errors import DataError, OutputError
from vlv.jobs.formats import Columns, Row, arrow_schema, import_pyarrow
from vlv.storage import replacing, to_line, write_json

if TYPE_CHECKING:
    from vlv.data.records import Record

    Pair = tuple[Record, Row]

ROWS_PER_GROUP = 64  # stage 2 reads a group at a time
METADATA = "metadata.jsonl"
"""Where an imagefolder keeps its captions."""


class Shards(ABC):
    """Numbered files of images with their captions, each with ``NAME_stats.json``, the mark that it is whole.

    Args:
        folder: Where they go.
        kind: What they hold; shards of another kind are written again.
    """

    def __init__(self, folder: Path, kind: str = "") -> None:
        self.folder, self._kind = folder, kind

    @abstractmethod
    def path(self, number: int) -> Path:
        """File of a shard."""

    @abstractmethod
    def _write(self, number: int, pairs: Sequence[Pair]) -> None:
        """Write the file of a shard, which does not exist."""

    def write_all(self, pairs: Iterable[Pair], size: int) -> None:
        """Write all shards, of `size` images each, and remove those of an earlier, longer run."""
        pairs, number = iter(pairs), 0
        while shard := list(islice(pairs, size)):
            self.write(number, shard)
            number += 1
        self.remove_from(number)

    def write(self, number: int, pairs: Sequence[Pair]) -> None:
        """Write a shard, unless it is there with just these rows.

        Rows without the first caption are left out, so that training never meets them.

        Raises:
            DataError: An image has changed since it was captioned.
            OutputError: The disk is full, or the file cannot be written.
        """
        path, mark = self.path(number), self._mark(number)
        good = [(record, row) for record, row in pairs if row["caption"] is not None]
        stats = {
            "rows": len(good),
            "failed": len(pairs) - len(good),
            "kind": self._kind,
            "digest": _digest(row for _, row in pairs),
        }
        if _json(mark) == stats and path.exists() == bool(good):
            return
        mark.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        if good:
            self._write(number, good)
        write_json(mark, stats)

    def remove_from(self, number: int) -> None:
        """Remove shards of an earlier, longer run, from this number on."""
        while (mark := self._mark(number)).exists():
            mark.unlink()
            self.path(number).unlink(missing_ok=True)
            number += 1

    def _mark(self, number: int) -> Path:
        path = self.path(number)
        return path.with_name(f"{path.stem}_stats.json")


class ParquetShards(Shards):
    """Parquet files ``00000.parquet`` and so on.

    Args:
        folder: Where they go.
        columns: Their columns and types, besides the image.
        images: Whether they hold the bytes of the images, or the paths of their files.
    """

    def __init__(self, folder: Path, columns: Columns, images: Literal["bytes", "path"]) -> None:
        super().__init__(folder, images)
        self._images = images
        kinds: dict[str, type] = {"image": bytes if images == "bytes" else str, **columns}
        if images == "path":  # readers would take file_name, which is relative to somewhere else
            del kinds["file_name"]
        self._schema = arrow_schema(kinds)

    def path(self, number: int) -> Path:
        """File of a shard."""
        return self.folder / f"{number:05d}.parquet"

    def _write(self, number: int, pairs: Sequence[Pair]) -> None:
        arrow, parquet = import_pyarrow()
        with (
            replacing(self.path(number)) as temporary,
            parquet.ParquetWriter(temporary, self._schema, compression="zstd") as writer,
        ):
            for start in range(0, len(pairs), ROWS_PER_GROUP):
                group = pairs[start : start + ROWS_PER_GROUP]
                rows = [{**row, "image": self._image(record, row)} for record, row in group]
                writer.write_table(arrow.Table.from_pylist(rows, schema=self._schema))

    def _image(self, record: Record, row: Row) -> bytes | str:
        if self._images == "path":
            return relative_path(record, self.folder)
        return read_unchanged(record, row)


class TarShards(Shards):
    """Tar files in the naming of webdataset: the image as it is, its caption as .txt, its row as .json.

    The .json also keeps what the image's metadata held, such as captions in styles and questions.
    """

    def path(self, number: int) -> Path:
        """File of a shard."""
        return shard_path(self.folder, number)

    def _write(self, number: int, pairs: Sequence[Pair]) -> None:
        taken: set[str] = set()
        with TarShardWriter(self.folder, per_shard=len(pairs) + 1, index=number) as writer:
            for record, row in pairs:
                image = read_unchanged(record, row)
                key = _tar_key(record, taken)
                fields = {**(record.meta or {}), **row}
                parts = {_suffix(image): image, "txt": row["caption"], "json": fields}
                writer.write(key, parts)


def _suffix(image: bytes) -> str:
    with Image.open(BytesIO(image)) as opened:
        kind = str(opened.format).lower()
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(kind, kind)


def _tar_key(record: Record, taken: set[str]) -> str:
    """A key without dots that no other image of the shard has."""
    stem = os.path.splitext(record.id)[0].strip("/").replace(".", "_") or "image"  # noqa: PTH122
    key, number = stem, 2
    while key in taken:
        key, number = f"{stem}-{number}", number + 1
    taken.add(key)
    return key


def read_unchanged(record: Record, row: Row) -> bytes:
    """The image file that a row describes.

    Raises:
        DataError: It has changed since.
    """
    data = record.open()
    if row["sha256"] is not None and hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise DataError(
            f"{record.name} has changed since it was captioned; bring the old file back, or "
            "have it captioned again"
        )
    return data


def relative_path(record: Record, folder: Path) -> str:
    """Path of a record's file, seen from a folder.

    Raises:
        OutputError: It lies in an archive or table, and has none.
    """
    if not isinstance(record.source, Path):
        raise OutputError(
            f"{record.name} lies in an archive or table and has no path; have the images themselves written"
        )
    return os.path.relpath(record.source, folder)


def common_folder(records: Sequence[Record]) -> Path:
    """The folder that holds all images, for an imagefolder.

    Raises:
        OutputError: An image is no file.
    """
    for record in records:
        if not isinstance(record.source, Path):
            raise OutputError(f"{record.name} is no file; leave imagefolder out")
    return Path(os.path.commonpath([Path(str(r.source)).absolute().parent for r in records]))


def write_metadata(
    root: Path, pairs: Iterable[Pair], more: Mapping[str, str] | None = None
) -> None:
    """Write the ``metadata.jsonl`` that makes a folder of images an imagefolder.

    Args:
        root: The folder.
        pairs: Images below it, and their rows.
        more: Further fields, and the columns that they come from.
    """
    write_lines(
        root / METADATA,
        (
            {"file_name": relative_path(record, root), "text": row["caption"]}
            | {name: row[column] for name, column in (more or {}).items()}
            for record, row in pairs
            if row["caption"] is not None
        ),
    )


def beside_tars(records: Sequence[Record]) -> dict[Path, list[Record]]:
    """For every tar shard that records lie in, a file of JSON lines beside it, and its records.

    Raises:
        OutputError: A record lies in none.
    """
    members: dict[Path, list[Record]] = {}
    for record in records:
        shard = record.source.path if isinstance(record.source, Span) else None
        if not isinstance(shard, Path):
            raise OutputError(
                f"{record.name} lies in no tar shard on this machine; leave beside-tars out"
            )
        members.setdefault(shard.with_suffix(".captions.jsonl"), []).append(record)
    return members


def keyed(record: Record, row: Row) -> Row:
    """A row of a tar's image by the key within its shard, which is unique there."""
    assert isinstance(record.source, Span)
    key = record.id.removeprefix(f"{record.source.path.as_posix()}/")
    return {"__key__": key} | {name: value for name, value in row.items() if name != "id"}


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines, atomically."""
    with replacing(path) as temporary, temporary.open("wb") as out:
        out.writelines(map(to_line, rows))


def _digest(rows: Iterable[Row]) -> str:
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, ensure_ascii=False).encode())
    return found.hexdigest()


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
