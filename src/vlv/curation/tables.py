"""The tables that the data commands write: their columns, and Parquet that is whole or absent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from vlv.curation.inputs import PLACE
from vlv.errors import OutputError
from vlv.jobs.formats import import_pyarrow
from vlv.storage import Json, replacing

_VECTOR = "vector of float32"
_VALUES = {
    "width": "int32",
    "height": "int32",
    "bytes_per_pixel": "float64",
    "contrast": "float64",
    "watermark": "float64",
    "nsfw": "float64",
    "aesthetic": "float64",
    "language": "string",
    "caption_score": "float64",
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
    "embedding": _VECTOR,
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

Row = Json


@contextlib.contextmanager
def writing_table(
    path: Path, columns: Mapping[str, str]
) -> Iterator[Callable[[Sequence[Row]], None]]:
    """Write a Parquet table that takes its name when the block ends well.

    Yields:
        A function that adds rows as one row group; columns that a row lacks are empty.

    Raises:
        OutputError: It cannot be written.
    """
    pyarrow, parquet = import_pyarrow()
    kinds = {name: getattr(pyarrow, kind)() for name, kind in columns.items() if kind != _VECTOR}
    vectors = {
        name: pyarrow.list_(pyarrow.float32()) for name, k in columns.items() if k == _VECTOR
    }
    schema = pyarrow.schema([(name, (kinds | vectors)[name]) for name in columns])
    with (
        replacing(path) as temporary,
        parquet.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):

        def add(rows: Sequence[Row]) -> None:
            if rows:
                writer.write_table(pyarrow.Table.from_pylist(list(rows), schema))

        yield add


def write_table(path: Path, columns: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Write a small table at once; see `writing_table`."""
    with writing_table(path, columns) as add:
        add(rows)


def read_table(path: Path, columns: Sequence[str] | None = None) -> list[Row]:
    """The rows of a table that was written here.

    Raises:
        OutputError: It is gone or damaged.
    """
    return [row for rows in read_groups(path, columns) for row in rows]


def read_groups(path: Path, columns: Sequence[str] | None = None) -> Iterable[list[Row]]:
    """The rows of each row group in turn; see `read_table`."""
    _, parquet = import_pyarrow()
    try:
        file = parquet.ParquetFile(path)
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=columns, use_threads=False).to_pylist()
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read ({error}); remove it") from error
