"""Rows of JSONL and Parquet files: an image (by path, or its bytes), a caption, and the rest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlv.errors import DataError

_PATH_FIELDS = ("file_name", "path", "image", "file")
_CAPTION_FIELDS = ("caption", "text")
_ID_FIELDS = ("id", "key", "__key__")
_BYTES_COLUMNS = ("image", "image_bytes", "bytes", "jpg", "jpeg", "png", "webp")


@dataclass(frozen=True, slots=True)
class Cell:
    """Image bytes in one cell of a Parquet file.

    A read takes the whole row group, of which the last few are kept: fast in order, slow when
    shuffled. Write tar shards for training.
    """

    path: Path
    column: str
    group: int
    row: int  # within the group

    def __str__(self) -> str:
        return f"{self.path}, row group {self.group}, row {self.row}"

    def read(self) -> bytes:
        """The bytes of the image.

        Raises:
            DataError: The cell holds none.
        """
        value = _read_group(self.path, self.column, self.group)[self.row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise DataError(f"{self}: the cell holds no image bytes")
        return data


@dataclass(frozen=True, slots=True)
class Row:
    """One row: the name of its image or the cell that holds it, and what is known about it."""

    id: str
    image: str | Cell
    caption: str | None
    meta_json: str | None


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


def read_jsonl(path: Path, text: str) -> Iterator[Row]:
    """Rows of a JSONL file: `file_name` (or `path`), and `caption` (or `text`).

    Raises:
        DataError: A line is no JSON object or names no image.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _row(parse_object(line, where), where)


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file: image bytes (plain, or as `datasets` stores them) or a path.

    Raises:
        DataError: pyarrow is absent, the file is damaged, or no column gives the images.
    """
    file = _open_parquet(path)
    column = _bytes_column(file.schema_arrow)
    light = [field.name for field in file.schema_arrow if not _holds_bytes(field.type)]
    for group in range(file.num_row_groups):
        rows = file.read_row_group(group, columns=light).to_pylist()
        for number in range(file.metadata.row_group(group).num_rows):
            cell = None if column is None else Cell(path, column, group, number)
            values = rows[number] if light else {}
            yield _row(values, f"{path}, row group {group}, row {number}", cell)


def _row(values: Mapping[str, Any], where: str, cell: Cell | None = None) -> Row:
    rest = {name: value for name, value in values.items() if value is not None}
    image = cell or _pop_text(rest, _PATH_FIELDS)
    if image is None:
        raise DataError(f"{where}: none of the fields {', '.join(_PATH_FIELDS)} names an image")
    caption = _pop_text(rest, _CAPTION_FIELDS)
    key = _pop_text(rest, _ID_FIELDS)
    if key is None:
        key = image if isinstance(image, str) else f"{image.group:05d}-{image.row:06d}"
    meta = json.dumps(rest, ensure_ascii=False, default=str) if rest else None
    return Row(key, image, caption, meta)


def _pop_text(values: dict[str, Any], fields: Iterable[str]) -> str | None:
    for field in fields:
        if isinstance(values.get(field), str | int):
            return str(values.pop(field))
    return None


def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: Parquet needs pyarrow; pip install 'vlv[data]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error})") from error


def _holds_bytes(kind: Any) -> bool:
    return "binary" in str(kind)  # binary, large_binary, struct<bytes: binary, path: string>


def _bytes_column(schema: Any) -> str | None:
    names = [field.name for field in schema if _holds_bytes(field.type)]
    return next((name for name in _BYTES_COLUMNS if name in names), None)


@lru_cache(maxsize=4)
def _read_group(path: Path, column: str, group: int) -> Any:
    return _open_parquet(path).read_row_group(group, columns=[column]).column(0)
