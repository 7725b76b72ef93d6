"""Rows of JSONL and Parquet files: an image (by path, or its bytes), a caption, and the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from vlv.data.foreign import (
    MAX_TEXT_BYTES,
    decode_text,
    parse_object,
    path_below,
    printable,
    read_file,
    shown_name,
    unreadable,
)
from vlv.data.images import DEFAULT_LIMITS
from vlv.data.img2dataset import failure_of, is_failure
from vlv.data.locations import Location, Url, open_location
from vlv.data.parquet import Parquet, cells_of
from vlv.data.parts import Detail, Part, Unreadable, stated_hash
from vlv.data.records import (
    DAMAGED,
    GUESSED,
    MISSING_IMAGE,
    NOT_DOWNLOADED,
    REFUSED,
    Absent,
    BadRecord,
    Columns,
    Entry,
    Held,
    ImagePlace,
    Record,
    Stored,
)
from vlv.errors import DataError
from vlv.storage import Json

RECORDS = 1000
"""Records of a part, where its size can be chosen."""

_PATH_FIELDS = ("file_name", "path", "image", "file")
_CAPTION_FIELDS = ("caption", "text")
_ID_FIELDS = ("id", "key", "__key__")
_BYTES_COLUMNS = ("image", "image_bytes", "bytes", "jpg", "jpeg", "png", "webp")
_STREAMED_ROWS = 16  # with images
_LISTED_ROWS = 256  # without


@dataclass(frozen=True, slots=True)
class Cell:
    """Image bytes in one cell of a Parquet file.

    A read takes the row group up to there, of which the last few are kept in part: fast in order, slow when shuffled.
    Train on such files with `data.streaming`.
    """

    raw_pixels: ClassVar[bool] = True

    path: Location
    column: str
    group: int
    row: int  # within the group
    image_root: str | None = None  # as in Columns

    def __str__(self) -> str:
        return f"{printable(str(self.path))}, row group {self.group}, row {self.row}"

    def read(self) -> bytes:
        """The bytes of the image.

        Raises:
            DataError: The cell holds none, or the file is damaged.
        """
        try:
            value = cells_of(self.path, self.group, self.column).at(self.row)
        except DataError:
            raise
        except Exception as error:  # pyarrow raises a dozen types on damaged files
            raise unreadable(self, error) from error
        return image_bytes(value, str(self), folder_of(self.path), self.image_root)


def folder_of(path: Location) -> Path | None:
    """The folder of a table; None where it is remote."""
    return None if isinstance(path, Url) else path.parent


def image_bytes(value: Any, where: str, base: Path | None, root: str | None) -> bytes:
    """The image bytes of a cell: plain, or in a struct {bytes, path} as `datasets` writes it.

    Args:
        value: Content of the cell.
        where: Name of the cell in an error.
        base: Folder that a path begins at, and must lie in; None allows none.
        root: Another folder in which it may lie.

    Raises:
        DataError: There are none, or they lie elsewhere.
    """
    if isinstance(value, Mapping):
        path = value.get("path")
        value = value.get("bytes")
        if value is None and path:
            if base is None:
                raise DataError(f"{where}: a remote table must hold the images, not their paths")
            file = path_below(str(path), base, root, where)
            real = os.path.realpath(file)  # nor may a link lead elsewhere
            return read_file(path_below(real, base, root, where), DEFAULT_LIMITS.max_bytes)
    if not isinstance(value, bytes):
        raise DataError(f"{where}: the cell holds no image bytes")
    return value


def hold(
    value: Any, path: Location | str, where: str, base: Path | None, root: str | None
) -> Held | Absent:
    """The content of a cell, for a record in memory; see `image_bytes`."""
    name = printable(str(path))
    try:
        return Held(name, image_bytes(value, where, base, root), raw_pixels=True)
    except DataError as error:
        return Absent(name, str(error))


# Rows --------------------------------------------------------------------------------------------


def make_entry(
    values: Mapping[str, object],
    where: str,
    columns: Columns,
    image: Stored | Location,
    key: str = "",
) -> Entry:
    """The record of a row, its fields sorted by what they mean.

    Args:
        values: Name to value, without image bytes.
        where: Name of the row in an error.
        columns: Names of the fields.
        image: What holds the image; or the file of the table, where a field has the path of the image.
        key: Id of a row that has image bytes and no field for an id.

    Raises:
        DataError: The table is remote and names images by their paths.
    """
    rest = {name: value for name, value in values.items() if value is not None}
    if isinstance(image, Path | Url):
        fields = (columns.image,) if columns.image else _PATH_FIELDS
        path = _pop_text(rest, fields)
        if path is None:
            reason = f"{where}: none of the fields {', '.join(fields)} names an image"
            return BadRecord(where, where, reason, MISSING_IMAGE)
        if isinstance(image, Url):
            raise DataError(f"{image}: a remote table must hold the images, not their paths")
        key = path
        try:
            place: ImagePlace = path_below(path, image.parent, columns.image_root, where)
        except DataError as error:
            return BadRecord(shown_name(path), where, str(error), REFUSED)
    else:
        place = image
    caption = _pop_text(rest, (columns.caption,) if columns.caption else _CAPTION_FIELDS)
    id = printable(_pop_text(rest, _ID_FIELDS) or key)
    if is_failure(values):
        return BadRecord(id, where, failure_of(values), NOT_DOWNLOADED)
    meta = json.dumps(rest, ensure_ascii=False, default=str) if rest else None
    return Record(id, place, caption, meta_json=meta, sha256=stated_hash(rest, columns))


def _pop_text(values: Json, fields: Iterable[str]) -> str | None:
    for name in fields:
        if isinstance(values.get(name), str | int):
            return str(values.pop(name))
    return None


# JSONL -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JsonLines(Part):
    """Some lines of a JSONL file: `file_name` (or `path`), and `caption` (or `text`).

    Attributes:
        start: First byte.
        stop: The byte after the last; None goes on to the end.
        line: Number of the first line.
    """

    source: Path
    start: int = 0
    stop: int | None = None
    line: int = 1

    def split(self, size: int | None = None) -> Iterator[JsonLines]:
        """Parts of `size` lines; `RECORDS` by default.

        Raises:
            DataError: The file cannot be read.
        """
        start = stop = 0
        first = 1
        for number, line in enumerate(self._lines(), 1):
            stop += len(line)
            if number % (size or RECORDS) == 0:
                yield replace(self, start=start, stop=stop, line=first)
                start, first = stop, number + 1
        if stop > start:
            yield replace(self, start=start, stop=stop, line=first)

    def _lines(self) -> Iterator[bytes]:
        """The lines with their line feeds, which alone end a line; a longer one than the limit comes in pieces."""
        left = self.stop - self.start if self.stop is not None else None
        try:
            with open_location(self.source) as file:
                file.seek(self.start)
                while (left is None or left > 0) and (line := file.readline(MAX_TEXT_BYTES)):
                    left = None if left is None else left - len(line)
                    yield line
        except OSError as error:
            raise unreadable(self.source, error) from error

    def scan(self, detail: Detail) -> Iterator[Entry]:
        """The rows; a line that is no JSON object is named.

        Raises:
            DataError: The file cannot be read.
        """
        number = self.line
        for line in self._lines():
            where = f"{self}, line {number}"
            number += line.endswith(b"\n")
            if not line.strip():
                continue
            try:
                values = parse_object(decode_text(line, where), where)
            except DataError as error:
                yield BadRecord(where, str(self), str(error), DAMAGED)
                continue
            yield make_entry(values, where, self.columns, self.source)


# Parquet -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetRows(Part):
    """Some row groups of a Parquet file: image bytes (plain, or as `datasets` stores them) or a path.

    Attributes:
        start: First row group.
        stop: The one after the last; None goes on to the end.
    """

    source: Location
    start: int = 0
    stop: int | None = None

    def split(self, size: int | None = None) -> Iterator[Part]:
        """Parts of at least `size` rows, `RECORDS` by default; for a file that cannot be opened, a part that says so."""
        try:
            file = Parquet(self.source)
        except DataError as error:
            yield Unreadable(self.source, self.columns, str(error))
            return
        start = rows = 0
        for group in range(file.num_groups):
            rows += file.num_rows(group)
            if rows >= (size or RECORDS) or group == file.num_groups - 1:
                yield replace(self, start=start, stop=group + 1)
                start, rows = group + 1, 0

    def scan(self, detail: Detail) -> Iterator[Entry]:
        """The rows, without their images.

        Raises:
            DataError: pyarrow is absent, the file is damaged, or there is no column of the name that was given.
        """
        file = Parquet(self.source)
        column = bytes_column(file.schema, self.columns, self)
        names = light_columns(file.schema)
        stop = file.num_groups if self.stop is None else self.stop
        for group in range(self.start, stop):
            for number, values in enumerate(_light_rows(file, group, names)):
                where = f"{self}, row group {group}, row {number}"
                if column is None:
                    yield make_entry(values, where, self.columns, self.source)
                else:
                    root = self.columns.image_root
                    cell = Cell(self.source, column, group, number, root)
                    key = f"{group:05d}-{number:06d}"
                    yield make_entry(values, where, self.columns, cell, key)

    def stream(self, start: int) -> Iterator[Entry]:
        """The rows with their images, a few of them in memory at a time.

        Raises:
            DataError: As `scan`.
        """
        file = Parquet(self.source)
        column = bytes_column(file.schema, self.columns, self)
        wanted = [*light_columns(file.schema), *([column] if column else [])]
        first = 0
        for group in range(file.num_groups):
            size = file.num_rows(group)
            if first + size > start:
                rows = file.rows(group, wanted, _STREAMED_ROWS)
                for number, values in enumerate(rows):
                    if first + number >= start:
                        yield self._streamed(values, column, group, number)
            first += size

    def _streamed(self, values: Json, column: str | None, group: int, number: int) -> Entry:
        where = f"{self}, row group {group}, row {number}"
        if column is None:
            entry = make_entry(values, where, self.columns, self.source)
        else:
            base, root = folder_of(self.source), self.columns.image_root
            image = hold(values.pop(column, None), self.source, where, base, root)
            key = f"{group:05d}-{number:06d}"
            entry = make_entry(values, where, self.columns, image, key)
        return replace(entry, id=f"{self}/{entry.id}")


def _light_rows(file: Parquet, group: int, names: list[str]) -> Iterable[Json]:
    """The rows of a row group without images."""
    if not names:
        return ({} for _ in range(file.num_rows(group)))
    return file.values(group, names, _LISTED_ROWS)


def _holds_bytes(kind: Any) -> bool:
    return "binary" in str(kind)  # binary, large_binary, struct<bytes: binary, path: string>


def light_columns(schema: Any) -> list[str]:
    """The columns that hold no bytes."""
    return [field.name for field in schema if not _holds_bytes(field.type)]


def bytes_column(schema: Any, columns: Columns, path: object) -> str | None:
    """The column of image bytes; None where the images are named by their paths.

    Raises:
        DataError: There is no column of the name that was given.
    """
    if columns.image is not None and columns.image not in schema.names:
        raise DataError(
            f"{path}: there is no column {columns.image}; it has {', '.join(schema.names)}"
        )
    names = [field.name for field in schema if _holds_bytes(field.type)]
    wanted = _BYTES_COLUMNS if columns.image is None else (columns.image,)
    return next((name for name in wanted if name in names), None)


def names_images(path: Location) -> bool:
    """Whether a Parquet file has a column of images, or of their paths, under one of the usual names.

    Raises:
        DataError: The file cannot be read.
    """
    schema = Parquet(path).schema
    found = bytes_column(schema, GUESSED, path) is not None
    return found or not set(_PATH_FIELDS).isdisjoint(schema.names)
