"""What reading a Parquet file will cost in memory, known from its page headers before a page is decoded.

The footer of a file is only what its writer says; the headers of the pages are what a reader goes by. A value is no longer than its
page or dictionary, however it is encoded, so that a number of rows takes at most that number times the largest page. Pages that are
large on the disk are read whatever their size, for only small files pretend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from vlv.data.foreign import open_regular

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 2**26
"""Of a page, unless it is as large in the file, and of the rows that are in memory at a time."""
MAX_PAGES = 100_000
"""Of one column in a row group."""
MAX_LISTED = 2**22
"""Values of a column of lists in a row group."""

_COMPRESSION = 4  # at most, of a page above the limit
_FEW_ROWS = 10_000
_WINDOW = 2**14  # bytes that nearly every page header fits in
_MAX_HEADER = 2**24  # as pyarrow's own limit
_MAX_DEPTH = 16
_SIZE, _STORED, _DATA, _DATA_V2 = 2, 3, 5, 8  # fields of a page header
_COUNT = 1  # field of those two


def check_footer(metadata: Any, num_bytes: int) -> None:
    """Refuse a file that claims more rows or data than it has bytes.

    Raises:
        ValueError: It does.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    rows = sum(group.num_rows for group in groups)
    if rows > max(_FEW_ROWS, num_bytes):
        raise ValueError(f"it claims {rows} rows, more than {num_bytes} bytes can hold")
    if sum(stored_bytes(group) for group in groups) > num_bytes:
        raise ValueError("it claims more data than it holds")


def stored_bytes(group: Any) -> int:
    """Bytes of a row group in the file, by its footer."""
    return sum(group.column(n).total_compressed_size for n in range(group.num_columns))


def largest_page(path: Path, metadata: Any, group: int, names: Sequence[str]) -> int:
    """Bytes of the largest page of some columns, with all that is in them, in one row group of a local file.

    Raises:
        ValueError: A page is above the limit, there are too many of them, or they cannot be read.
        OSError: The file cannot be read.
    """
    found = metadata.row_group(group)
    largest = 0
    with open_regular(path) as file:
        for number in range(found.num_columns):
            chunk = found.column(number)
            place = f"{chunk.path_in_schema}."
            if any(place.startswith(f"{name}.") for name in names):
                is_list = metadata.schema.column(number).max_repetition_level > 0
                largest = max(largest, _largest_of(file, chunk, is_list))
    return largest


def _largest_of(file: BinaryIO, chunk: Any, is_list: bool) -> int:
    largest = values = 0
    for page in _pages(file, chunk):
        if page.size > MAX_BYTES and page.size > _COMPRESSION * page.stored:
            raise ValueError(
                f"{chunk.path_in_schema} has a page of {page.size} bytes, above the limit of {MAX_BYTES}"
            )
        largest, values = max(largest, page.size), values + page.values
        if is_list and values > MAX_LISTED:
            raise ValueError(f"{chunk.path_in_schema} has lists of more than {MAX_LISTED} values")
    return largest


@dataclass(frozen=True)
class _Page:
    size: int
    stored: int
    values: int


def _pages(file: BinaryIO, chunk: Any) -> Iterator[_Page]:
    """The headers of a column chunk, one after the other."""
    first = chunk.dictionary_page_offset if chunk.has_dictionary_page else None
    place = min(chunk.data_page_offset, first or chunk.data_page_offset)
    end = place + chunk.total_compressed_size
    number = 0
    while place < end:
        number += 1
        if number > MAX_PAGES:
            raise ValueError(f"{chunk.path_in_schema} is in more than {MAX_PAGES} pages")
        page, length = _read_header(file, place)
        place += length + page.stored
        yield page


def _read_header(file: BinaryIO, place: int) -> tuple[_Page, int]:
    """The page header at a place, and its length.

    Raises:
        ValueError: There is none.
    """
    window = _WINDOW
    while True:
        file.seek(place)
        data = file.read(window)
        header = _Compact(data)
        try:
            return _page_of(header.read_struct()), header.place
        except IndexError:
            if len(data) < window or window >= _MAX_HEADER:
                raise ValueError("its pages cannot be read") from None
            window *= 32


def _page_of(fields: dict[int, Any]) -> _Page:
    size, stored = fields.get(_SIZE), fields.get(_STORED)
    if not (isinstance(size, int) and isinstance(stored, int) and min(size, stored) >= 0):
        raise ValueError("its pages cannot be read")
    inner = fields.get(_DATA) or fields.get(_DATA_V2)
    count = inner.get(_COUNT) if isinstance(inner, dict) else None
    return _Page(size, stored, count if isinstance(count, int) else 0)


class _Compact:
    """A reader of Thrift's compact protocol, in which page headers are written."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def read_struct(self, depth: int = 0) -> dict[int, Any]:
        """The fields of a struct by number."""
        fields: dict[int, Any] = {}
        number = 0
        while kind := self._byte():
            step = kind >> 4
            number = number + step if step else self._zigzag()
            fields[number] = self._read(kind & 15, depth + 1)
        return fields

    def _read(self, kind: int, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("its pages cannot be read")
        match kind:
            case 1 | 2:
                return kind == 1
            case 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._zigzag()
            case 7:
                return self._skip(8)
            case 8:
                return self._skip(self._varint())
            case 12:
                return self.read_struct(depth)
        raise ValueError("its pages cannot be read")  # page headers have no lists

    def _byte(self) -> int:
        value = self.data[self.place]
        self.place += 1
        return value

    def _skip(self, count: int) -> None:
        self.place += count
        if self.place > len(self.data):
            raise IndexError

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("its pages cannot be read")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
