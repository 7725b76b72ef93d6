"""The tables that the data commands write: their columns, and Parquet that is whole or absent."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from vlv.curation.inputs import PLACE
from vlv.errors import OutputError
from vlv.storage import replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

_VALUES = {
    "width": "int32",
    "height": "int32",
    "bytes_per_pixel": "float64",
    "contrast": "float64",
    "watermark": "float64",
    "nsfw": "float64",
    "aesthetic": "float64",
    "language": "string",
}

MEASURED = {
    "id": "string",
    "reason": "string",  # empty when no rule has dropped it
    "value": "string",
    "detail": "string",
    "is_image": "bool_",
    **PLACE,
    "num_bytes": "int64",
    "sha256": "string",
    "format": "string",
    **_VALUES,
    "phash": "uint64",
    "caption": "string",
    "meta": "string",
    "extras": "string",
    "embedding": "embedding",
}
"""One row for every record of a part, kept while the job runs."""

INDEX = {
    "key": "string",
    "shard": "string",
    "offset": "int64",
    "size": "int64",
    "sha256": "string",
    **_VALUES,
    "phash": "string",
    "caption": "string",
    "id": "string",
    "source": "string",
}
"""One row for every image in the shards, in their order: `size` bytes lie at `offset` of the shard."""

DROPPED = {
    "id": "string",
    "source": "string",
    "reason": "string",
    "value": "string",
    "detail": "string",
    "width": "int32",
    "height": "int32",
}
"""One row for every image that was dropped, and every file that is damaged."""

Row = dict[str, Any]


def arrow() -> Any:
    """The package pyarrow.

    Raises:
        OutputError: It is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise OutputError('the data commands need pyarrow; pip install "vlv[data]"') from None
    return pyarrow


def schema(columns: Mapping[str, str]) -> Any:
    """Names and types of the columns."""
    pyarrow = arrow()

    def kind(name: str) -> Any:
        return pyarrow.list_(pyarrow.float32()) if name == "embedding" else getattr(pyarrow, name)()

    return pyarrow.schema([(column, kind(name)) for column, name in columns.items()])


class TableWriter:
    """Adds rows to a Parquet file, one row group for each call of `add`."""

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        self._pyarrow = arrow()
        self._schema = schema(columns)
        self._writer = self._pyarrow.parquet.ParquetWriter(path, self._schema, compression="zstd")

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows; columns that a row lacks are empty."""
        if rows:
            self._writer.write_table(self._pyarrow.Table.from_pylist(list(rows), self._schema))

    def close(self) -> None:
        """Write the footer."""
        self._writer.close()


@contextlib.contextmanager
def writing_table(path: Path, columns: Mapping[str, str]) -> Iterator[TableWriter]:
    """Write a Parquet table that takes its name when the block ends well.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        with replacing(path) as temporary:
            table = TableWriter(temporary, columns)
            try:
                yield table
            finally:
                table.close()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_table(path: Path, columns: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Write a small table at once; see `writing_table`."""
    with writing_table(path, columns) as table:
        table.add(rows)


def read_table(path: Path, columns: Sequence[str] | None = None) -> list[Row]:
    """The rows of a table that was written here.

    Raises:
        OutputError: It is gone or damaged.
    """
    return [row for rows in read_groups(path, columns) for row in rows]


def read_groups(path: Path, columns: Sequence[str] | None = None) -> Iterable[list[Row]]:
    """The rows of each row group in turn; see `read_table`."""
    pyarrow = arrow()
    try:
        file = pyarrow.parquet.ParquetFile(path)
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=columns, use_threads=False).to_pylist()
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read ({error}); remove it") from error
