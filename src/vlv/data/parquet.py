"""Parquet files, through pyarrow: opened safely, and read within limits of memory."""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from vlv.data.foreign import open_regular, printable
from vlv.data.locations import Location, Url
from vlv.data.parquet_costs import MAX_BYTES, check_rows, largest_page, read_footer, stored_bytes
from vlv.errors import DataError
from vlv.storage import Json

_CELLS_AT_A_TIME = 16
_KEPT_BYTES = 2**26  # cells of a row group
_EXPANSION = 64  # texts and numbers may take this many times what their row group takes in the file, images included
_SMALL = 2**14


class Parquet:
    """A Parquet file, of which some rows at a time are read.

    Args:
        path: A regular file, or a URL; what a command prints goes through a temporary file.

    Raises:
        DataError: pyarrow is absent, or the file cannot be read, or it claims to hold more than it can.
    """

    def __init__(self, path: Location) -> None:
        self.path = path
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(f"{path}: Parquet needs pyarrow; pip install 'vlv[data]'") from error
        try:
            if isinstance(path, Url):
                self._file = pyarrow.parquet.ParquetFile(_seekable(path))
            else:
                open_regular(path).close()  # pyarrow would wait for a FIFO
                self._file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
                self._groups = read_footer(path)
                check_rows(self._file.metadata.num_rows, path.stat().st_size)
        except DataError:
            raise
        except Exception as error:  # pyarrow raises a dozen types on damaged files
            raise self._damaged(error) from error
        self.schema = self._file.schema_arrow
        self.num_groups = int(self._file.metadata.num_row_groups)

    def num_rows(self, group: int) -> int:
        """Rows of a row group."""
        return int(self._file.metadata.row_group(group).num_rows)

    def batches(self, groups: Sequence[int], names: Sequence[str], at_a_time: int) -> Iterator[Any]:
        """Record batches of some columns of row groups; fewer rows at a time where they could be large.

        Raises:
            DataError: It is damaged, or a page is above the limit.
        """
        try:
            yield from self._file.iter_batches(
                self._rows_at_a_time(groups, names, at_a_time),
                row_groups=list(groups),
                columns=list(names),
                use_threads=False,
            )
        except Exception as error:  # as above
            raise self._damaged(error) from error

    def _rows_at_a_time(self, groups: Sequence[int], names: Sequence[str], wanted: int) -> int:
        if isinstance(self.path, Url):
            return wanted
        schema = self._file.metadata.schema
        lists = [schema.column(n).max_repetition_level > 0 for n in range(len(schema.names))]
        sizes = [largest_page(self.path, self._groups[group], names, lists) for group in groups]
        return max(1, min(wanted, MAX_BYTES // max(1, *sizes, 1)))

    def rows(self, group: int, names: Sequence[str], at_a_time: int) -> Iterator[Json]:
        """The rows of some columns of a row group, so many in memory at a time.

        Raises:
            DataError: As `batches`, or a text is no UTF-8.
        """
        for batch in self.batches([group], names, at_a_time):
            yield from self._listed(batch)

    def values(self, group: int, names: Sequence[str], at_a_time: int) -> Iterator[Json]:
        """The rows of some columns without images, which may be kept in memory.

        Raises:
            DataError: As `batches`, or they are far larger than the row group is in the file.
        """
        is_remote = isinstance(self.path, Url)
        stored = math.inf if is_remote else stored_bytes(self._groups[group])
        left = _EXPANSION * stored + _SMALL
        for batch in self.batches([group], names, at_a_time):
            left -= batch.nbytes
            if left < 0:
                raise self._damaged(ValueError(f"the texts of row group {group} are too large"))
            yield from self._listed(batch)

    def _listed(self, batch: Any) -> list[Json]:
        try:
            rows: list[Json] = batch.to_pylist()
        except Exception as error:  # as above
            raise self._damaged(error) from error
        return rows

    def _damaged(self, error: BaseException) -> DataError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return DataError(f"{printable(str(self.path))}: cannot be read as Parquet ({reason})")


class Cells:
    """One column of a row group, for which some memory is kept: fast forwards, slow backwards where it is large.

    Args:
        path: The file.
        group: The row group.
        column: Its name.
    """

    def __init__(self, path: Location, group: int, column: str) -> None:
        self._file, self._group, self._column = Parquet(path), group, column
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._kept: deque[tuple[int, Any]] = deque()  # the first row, and some cells
        self._next, self._bytes = 0, 0
        self._batches = self._file.batches([self._group], [self._column], _CELLS_AT_A_TIME)

    def at(self, row: int) -> object:
        """The content of a cell; safe from any thread.

        Raises:
            DataError: There is no such row, or the file is damaged.
        """
        with self._lock:
            if row < (self._kept[0][0] if self._kept else 0):
                self._begin()
            while row >= self._next:
                self._read_on()
            for first, cells in reversed(self._kept):
                if row >= first:
                    return cells[row - first].as_py()
        raise AssertionError("rows before the first that is kept are read again")

    def _read_on(self) -> None:
        batch = next(self._batches, None)
        if batch is None:
            raise DataError(
                f"{printable(str(self._file.path))}: row group {self._group} has no row {self._next}"
            )
        self._kept.append((self._next, batch.column(0)))
        self._next += batch.num_rows
        self._bytes += batch.nbytes
        while self._bytes > _KEPT_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popleft()[1].nbytes


@lru_cache(maxsize=4)
def cells_of(path: Location, group: int, column: str) -> Cells:
    """The cells of a column of a row group; the last few are kept.

    Raises:
        DataError: As `Parquet`.
    """
    return Cells(path, group, column)


def _seekable(url: Url) -> Any:
    if not url.is_command:
        return url.open()
    import pyarrow

    with tempfile.NamedTemporaryFile(prefix="vlv-") as copy, url.open() as source:
        shutil.copyfileobj(source, copy)
        copy.flush()
        return pyarrow.OSFile(
            copy.name
        )  # which closes itself; the file lasts as long, without a name
