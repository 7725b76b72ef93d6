"""Rows to files and back, one at a time: JSON lines, Parquet and CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

from vlv.errors import OutputError
from vlv.storage import Json, replacing

Row = Json
Columns = Mapping[str, type]

TABLE_SUFFIXES = (".jsonl", ".parquet", ".csv")
ROWS_PER_GROUP = 10_000


def scan_lines(file: IO[bytes], path: Path, key: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    """Yield every row of JSON lines with the offset that it begins at; a last line torn by a kill is left out.

    Raises:
        OutputError: A line before the last is no row, or lacks a column of the key.
    """
    offset = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or not row.keys() >= set(key):
                    raise ValueError(f"no row with {' and '.join(key)}")
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    return
                raise OutputError(
                    f"line {number} of {path} is damaged ({error}); remove it, or use --on-existing overwrite"
                ) from error
            yield offset, row
        offset += len(line)


def read_rows(
    path: Path, columns: Columns | None = None, key: tuple[str, ...] = ("id", "file_name")
) -> Iterator[Row]:
    """Yield the rows of a table.

    Args:
        path: A .jsonl, .parquet or .csv file.
        columns: Types of the columns, which a CSV file does not tell.
        key: Columns that every row of JSON lines must have.

    Raises:
        OutputError: The file is no such table.
    """
    if path.suffix == ".parquet":
        lists = [name for name, kind in (columns or {}).items() if kind is list]
        for row in _read_parquet(path):
            yield row | {x: json.loads(row[x]) for x in lists if row.get(x) is not None}
    elif path.suffix == ".csv":
        yield from _read_csv(path, columns or {})
    else:
        with path.open("rb") as file:
            yield from (row for _, row in scan_lines(file, path, key))


def write_rows(path: Path, columns: Columns, rows: Iterable[Row]) -> None:
    """Write rows as a .parquet or .csv table, atomically.

    Args:
        path: The file.
        columns: Names and types (``str``, ``int``, ``float``) of its columns; a ``list`` is written as JSON text.
        rows: What it holds, taken one after the other.
    """
    lists = [name for name, kind in columns.items() if kind is list]
    if lists:
        rows = (row | {x: _json(row[x]) for x in lists} for row in rows)
    with replacing(path) as temporary:
        if path.suffix == ".parquet":
            _write_parquet(temporary, columns, rows)
        else:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(columns), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


def _json(value: object) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def import_pyarrow() -> tuple[Any, Any]:
    """The modules ``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        OutputError: They are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise OutputError('Parquet needs pyarrow: pip install "vlv[data]"') from None
    return pyarrow, pyarrow.parquet


def arrow_schema(columns: Columns) -> Any:
    """The Arrow schema of columns of ``str``, ``int``, ``float``, ``bytes``, and ``list`` as JSON text."""
    arrow, _ = import_pyarrow()
    text = arrow.string()
    types = {
        str: text,
        list: text,
        int: arrow.int64(),
        float: arrow.float64(),
        bytes: arrow.binary(),
    }
    return arrow.schema([(name, types[kind]) for name, kind in columns.items()])


def _read_parquet(path: Path) -> Iterator[Row]:
    _, parquet = import_pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except Exception as error:  # pyarrow raises a dozen types on damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OutputError(f"{path} is no readable Parquet table ({reason})") from error


def _write_parquet(path: Path, columns: Columns, rows: Iterable[Row]) -> None:
    arrow, parquet = import_pyarrow()
    schema, rows = arrow_schema(columns), iter(rows)
    with parquet.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, ROWS_PER_GROUP)):
            writer.write_table(arrow.Table.from_pylist(group, schema=schema))


def _read_csv(path: Path, columns: Columns) -> Iterator[Row]:
    parsers = {name: json.loads if kind is list else kind for name, kind in columns.items()}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, strict=True):
                if None in row:
                    raise ValueError("a row has more cells than the header")
                yield {
                    name: None if text in {"", None} else parsers.get(name, str)(text)
                    for name, text in row.items()
                }
    except (OSError, ValueError, csv.Error) as error:
        raise OutputError(f"{path} is no readable CSV table ({error})") from error
