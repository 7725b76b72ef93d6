"""Where the bytes of an image lie, and one reader for all such places that keeps the last file open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from vlv.errors import DataError, ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROWS_AT_A_TIME = 16


class Place(NamedTuple):
    """Where bytes lie.

    Attributes:
        kind: "file"; "span" of a tar: `first` and `second` are offset and size; "cell" of a Parquet file: they are
            row group and row within it; "row" of a Hugging Face dataset: `first` is its number.
        path: Of the file; or the name of the dataset.
        first: See kind.
        second: See kind.
        column: Of a cell or row.
    """

    kind: str
    path: str
    first: int = 0
    second: int = 0
    column: str = ""

    def __str__(self) -> str:
        """How messages and tables name the place."""
        match self.kind:
            case "span":
                return f"{self.path} at byte {self.first}"
            case "cell":
                return f"{self.path}, row group {self.first}, row {self.second}"
            case "row":
                return f"{self.path}, row {self.first}"
            case _:
                return self.path


class PlaceReader:
    """Reads places; in the order of a file it reads on, instead of from the start again.

    Args:
        max_bytes: Larger images are refused.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._open: tuple[str, BinaryIO] | None = None
        self._cells: _Cells | None = None

    def read(self, place: Place) -> bytes:
        """The bytes at a place.

        Raises:
            DataError: They are not there, or cannot be read.
            ImageError: They are more than the limit.
        """
        try:
            data = self._read(place)
        except (OSError, ValueError) as error:  # pyarrow raises both
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{place}: cannot be read ({reason})") from error
        if len(data) > self.max_bytes:
            raise self._too_large(place)
        return data

    def _too_large(self, place: Place) -> ImageError:
        return ImageError(f"{place}: larger than the limit of {self.max_bytes} bytes")

    def _read(self, place: Place) -> bytes:
        match place.kind:
            case "file":
                with Path(place.path).open("rb", buffering=0) as file:
                    return _read_all(file, self.max_bytes + 1)
            case "span":
                if place.second > self.max_bytes:
                    raise self._too_large(place)
                return self._read_span(place.path, place.first, place.second)
            case "cell":
                return self._read_cell(place)
            case _:
                from vlv.curation.hf import read_row

                return read_row(place)

    def _read_span(self, path: str, offset: int, size: int) -> bytes:
        if self._open is None or self._open[0] != path:
            self.close()
            self._open = path, Path(path).open("rb", buffering=0)  # noqa: SIM115 - kept open
        file = self._open[1]
        file.seek(offset)
        data = _read_all(file, size)
        if len(data) != size:
            raise DataError(f"{path} at byte {offset}: the file is shorter than when it was listed")
        return data

    def _read_cell(self, place: Place) -> bytes:
        wanted = place.path, place.first, place.column
        if self._cells is None or self._cells.name != wanted or self._cells.start > place.second:
            self._cells = _Cells(*wanted)
        return image_bytes(self._cells.at(place.second), place)

    def close(self) -> None:
        """Close what is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def __enter__(self) -> PlaceReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _read_all(file: BinaryIO, count: int) -> bytes:
    """Up to `count` bytes; an unbuffered file may give fewer at a time."""
    parts: list[bytes] = []
    while count > 0 and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _Cells:
    """One column of a row group, some rows in memory at a time."""

    def __init__(self, path: str, group: int, column: str) -> None:
        self.name = path, group, column
        self.start = 0
        self._rows: list[Any] = []
        file = open_parquet(path)
        self._batches: Iterator[Any] = file.iter_batches(
            _ROWS_AT_A_TIME, row_groups=[group], columns=[column], use_threads=False
        )

    def at(self, row: int) -> Any:
        while row >= self.start + len(self._rows):
            self.start += len(self._rows)
            try:
                self._rows = next(self._batches).column(0).to_pylist()
            except StopIteration:
                path, group, _ = self.name
                raise DataError(f"{path}: row group {group} has no row {row}") from None
        return self._rows[row - self.start]


def image_bytes(value: Any, where: object) -> bytes:
    """The bytes in a cell, plain or as `datasets` stores them.

    Raises:
        DataError: It holds none.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise DataError(f"{where}: the cell holds no image bytes")
    return data


def open_parquet(path: str | Path) -> Any:
    """A Parquet file, to be read in portions.

    Raises:
        DataError: pyarrow is absent, or the file is damaged.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f'{path}: Parquet needs pyarrow; pip install "vlv[data]"') from error
    try:
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error})") from error
