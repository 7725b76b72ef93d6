"""Rows of JSONL and Parquet files: an image (by path, or its bytes), a caption, and the rest."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from vlv.data.locations import Location, Url
from vlv.errors import DataError

T = TypeVar("T")

_PATH_FIELDS = ("file_name", "path", "image", "file")
_CAPTION_FIELDS = ("caption", "text")
_ID_FIELDS = ("id", "key", "__key__")
_BYTES_COLUMNS = ("image", "image_bytes", "bytes", "jpg", "jpeg", "png", "webp")
_STREAMED_ROWS = 16


@dataclass(frozen=True, slots=True)
class Columns:
    """What the fields of an index are called; None leaves it to the usual names.

    Attributes:
        image: Of a table, the image: its bytes, or its path.
        caption: The caption; in tar shards a suffix, or a field of the `.json`.
        sha256: The SHA-256 of the image file, which is then checked at each read; None checks nothing.
    """

    image: str | None = None
    caption: str | None = None
    sha256: str | None = None


GUESSED = Columns()


@dataclass(frozen=True, slots=True)
class Cell:
    """Image bytes in one cell of a Parquet file.

    A read takes the whole row group, of which the last few are kept: fast in order, slow when
    shuffled. Train on such files with `data.streaming`.
    """

    path: Location
    column: str
    group: int
    row: int  # within the group

    def __str__(self) -> str:
        return f"{self.path}, row group {self.group}, row {self.row}"

    def read(self) -> bytes:
        """The bytes of the image.

        Raises:
            DataError: The cell holds none, or the file is damaged.
        """
        try:
            value = _read_group(self.path, self.column, self.group)[self.row].as_py()
        except (OSError, ValueError, IndexError) as error:
            raise DataError(f"{self}: cannot be read ({_first_line(error)})") from error
        return bytes_of(value, str(self))


@dataclass(frozen=True, slots=True)
class Held:
    """The bytes of an image that are in memory already."""

    path: str  # of the file that they come from
    data: bytes

    def __str__(self) -> str:
        return self.path

    def read(self) -> bytes:
        """The bytes."""
        return self.data


@dataclass(frozen=True, slots=True)
class Absent:
    """Stands for an image that an index should hold and does not."""

    path: str
    reason: str

    def __str__(self) -> str:
        return self.path

    def read(self) -> bytes:
        """Raise DataError: there is nothing to read."""
        raise DataError(self.reason)


@dataclass(frozen=True, slots=True)
class Row:
    """One row: the name of its image or what holds it, and what is known about it."""

    id: str
    image: str | Cell | Held | Absent
    caption: str | None
    meta_json: str | None
    sha256: str | None = None


def hold(value: Any, path: str, where: str) -> Held | Absent:
    """What a cell holds, for a record in memory."""
    try:
        return Held(path, bytes_of(value, where))
    except DataError as error:
        return Absent(path, str(error))


def bytes_of(value: Any, where: str) -> bytes:
    """The image bytes of a cell: plain, or in a struct {bytes, path} as `datasets` writes it.

    Raises:
        DataError: There are none.
    """
    if isinstance(value, Mapping):
        path = value.get("path")
        value = value.get("bytes")
        if value is None and path:
            try:
                value = Path(path).read_bytes()
            except OSError as error:
                raise DataError(f"{where}: {path} cannot be read ({error.strerror})") from error
    if not isinstance(value, bytes):
        raise DataError(f"{where}: the cell holds no image bytes")
    return value


def parse_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object from text.

    Raises:
        DataError: It is no JSON, or no object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: this is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON object is wanted here, not {type(value).__name__}")
    return value


def read_jsonl(path: Location, text: str, columns: Columns = GUESSED) -> Iterator[Row]:
    """Rows of a JSONL file: `file_name` (or `path`), and `caption` (or `text`).

    Raises:
        DataError: A line is no JSON object or names no image.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield make_row(parse_object(line, where), where, columns)


def read_parquet(path: Location, columns: Columns = GUESSED) -> Iterator[Row]:
    """Rows of a Parquet file: image bytes (plain, or as `datasets` stores them) or a path.

    Raises:
        DataError: pyarrow is absent, the file is damaged, or no column gives the images.
    """
    file = open_parquet(path)
    column = bytes_column(file.schema_arrow, columns, path)
    light = [field.name for field in file.schema_arrow if not _holds_bytes(field.type)]
    for group in range(file.num_row_groups):
        rows = _checked(path, partial(_rows_of_group, file, group, light))
        for number in range(file.metadata.row_group(group).num_rows):
            cell = None if column is None else Cell(path, column, group, number)
            values = rows[number] if light else {}
            where = f"{path}, row group {group}, row {number}"
            yield make_row(values, where, columns, cell, f"{group:05d}-{number:06d}")


def stream_parquet(path: Location, columns: Columns = GUESSED, start: int = 0) -> Iterator[Row]:
    """Rows of a Parquet file one after the other, image bytes included.

    Args:
        path: The file; a few of its rows are in memory at a time.
        columns: Names of the columns.
        start: Rows to leave out.

    Raises:
        DataError: As `read_parquet`.
    """
    file = open_parquet(path)
    column = bytes_column(file.schema_arrow, columns, path)
    names = [f.name for f in file.schema_arrow if f.name == column or not _holds_bytes(f.type)]
    first = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if first + size <= start:
            first += size
            continue
        batches = file.iter_batches(_STREAMED_ROWS, row_groups=[group], columns=names)
        number = 0
        while rows := _checked(path, partial(_next_rows, batches)):
            for values in rows:
                where = f"{path}, row group {group}, row {number}"
                if first + number >= start:
                    value = values.pop(column, None) if column is not None else None
                    held = None if column is None else hold(value, str(path), where)
                    yield make_row(values, where, columns, held, f"{group:05d}-{number:06d}")
                number += 1
        first += size


def make_row(
    values: Mapping[str, Any],
    where: str,
    columns: Columns = GUESSED,
    image: Cell | Held | Absent | None = None,
    key: str = "",
) -> Row:
    """The fields of an object or row, sorted by what they mean.

    Args:
        values: Name to value, without image bytes.
        where: Names the row in an error.
        columns: Names of the fields.
        image: What holds the image; None where a field has its path.
        key: Id of a row that has image bytes and no field for an id.

    Raises:
        DataError: No field names an image.
    """
    rest = {name: value for name, value in values.items() if value is not None}
    fields = (columns.image,) if columns.image else _PATH_FIELDS
    found = image or _pop_text(rest, fields)
    if found is None:
        raise DataError(f"{where}: none of the fields {', '.join(fields)} names an image")
    caption = _pop_text(rest, (columns.caption,) if columns.caption else _CAPTION_FIELDS)
    name = _pop_text(rest, _ID_FIELDS)
    if name is None:
        name = found if isinstance(found, str) else key
    sha256 = stated_hash(rest, columns)
    meta = json.dumps(rest, ensure_ascii=False, default=str) if rest else None
    return Row(name, found, caption, meta, sha256)


def stated_hash(values: Mapping[str, Any], columns: Columns) -> str | None:
    """The SHA-256 that an index states of an image; empty, and so that of no image, where it should and does not."""
    return None if columns.sha256 is None else str(values.get(columns.sha256) or "")


def _pop_text(values: dict[str, Any], fields: Iterable[str]) -> str | None:
    for field in fields:
        if isinstance(values.get(field), str | int):
            return str(values.pop(field))
    return None


def open_parquet(path: Location) -> Any:
    """The file for pyarrow; what a command prints goes through a temporary file.

    Raises:
        DataError: pyarrow is absent, or the file cannot be read.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: Parquet needs pyarrow; pip install 'vlv[data]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path if isinstance(path, Path) else _seekable(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({_first_line(error)})") from error


def _seekable(url: Url) -> Any:
    if not url.is_command:
        return url.open()
    copy = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by the reader
    with url.open() as source:
        shutil.copyfileobj(source, copy)
    copy.seek(0)
    return copy


def _checked(path: Location, read: Callable[[], T]) -> T:
    try:
        return read()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({_first_line(error)})") from error


def _holds_bytes(kind: Any) -> bool:
    return "binary" in str(kind)  # binary, large_binary, struct<bytes: binary, path: string>


def bytes_column(schema: Any, columns: Columns, path: Location) -> str | None:
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _rows_of_group(file: Any, group: int, names: list[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = file.read_row_group(group, columns=names).to_pylist()
    return rows


def _next_rows(batches: Iterator[Any]) -> list[dict[str, Any]]:
    """The next few rows; none at the end."""
    batch = next(batches, None)
    return [] if batch is None else batch.to_pylist()


@lru_cache(maxsize=4)
def _read_group(path: Location, column: str, group: int) -> Any:
    return open_parquet(path).read_row_group(group, columns=[column]).column(0)
