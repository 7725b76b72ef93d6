"""What reading a Parquet file will cost in memory, known from its page headers before a page is decoded.

The footer of a file is only what its writer says; the headers of the pages are what a reader goes by. A value is no longer than its
page or dictionary, however it is encoded, so that a number of rows takes at most that number times the largest page. Pages that are
large on the disk are read whatever their size, for only small files pretend.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO

from vlv.data.foreign import open_regular, read_up_to

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


@dataclass(frozen=True)
class Chunk:
    """A column of a row group.

    Attributes:
        name: With those of the structs and lists that it is in.
        start: Its first byte in the file.
        stored: Bytes in the file.
    """

    name: str
    start: int
    stored: int


def read_footer(path: Path) -> list[list[Chunk]]:
    """The columns of every row group of a local file, which pyarrow has opened; its own readers of them end the process on damage.

    Raises:
        ValueError: They cannot be read, or claim more data than there is.
        OSError: The file cannot be read.
    """
    with open_regular(path) as file:
        about = os.fstat(file.fileno())
    return _footer(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=8)
def _footer(path: Path, num_bytes: int, _changed: int) -> list[list[Chunk]]:
    with open_regular(path) as file:
        file.seek(max(0, num_bytes - 8))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, num_bytes - 8 - length))
        data = read_up_to(file, length)
    try:
        fields = _Compact(data).read_struct()
        groups = [[_chunk(chunk) for chunk in group[1]] for group in fields[4]]
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise ValueError("its footer cannot be read") from None
    if sum(stored_bytes(group) for group in groups) > num_bytes:
        raise ValueError("it claims more data than it holds")
    return groups


def _chunk(fields: dict[int, Any]) -> Chunk:
    about = fields[3]
    name = ".".join(part.decode() for part in about[3])
    first = about.get(11) or about[9]  # of the dictionary, which comes before the pages
    return Chunk(name, min(first, about[9]), max(0, about[7]))


def check_rows(rows: int, num_bytes: int) -> None:
    """Refuse a file that claims more rows than it has bytes.

    Raises:
        ValueError: It does.
    """
    if rows > max(_FEW_ROWS, num_bytes):
        raise ValueError(f"it claims {rows} rows, more than {num_bytes} bytes can hold")


def stored_bytes(group: Sequence[Chunk]) -> int:
    """Bytes of a row group in the file, by its footer."""
    return sum(chunk.stored for chunk in group)


def largest_page(
    path: Path, group: Sequence[Chunk], names: Sequence[str], lists: Sequence[bool]
) -> int:
    """Bytes of the largest page of some columns, with all that is in them, in one row group of a local file.

    Args:
        path: The file.
        group: The columns of the row group.
        names: Those that count.
        lists: Whether each column is one of lists.

    Raises:
        ValueError: A page is above the limit, there are too many of them, or they cannot be read.
        OSError: The file cannot be read.
    """
    largest = 0
    with open_regular(path) as file:
        for chunk, is_list in zip(group, lists, strict=True):
            if any(f"{chunk.name}.".startswith(f"{name}.") for name in names):
                largest = max(largest, _largest_of(file, chunk, is_list))
    return largest


def _largest_of(file: BinaryIO, chunk: Chunk, is_list: bool) -> int:
    largest = values = 0
    for page in _pages(file, chunk):
        if page.size > MAX_BYTES and page.size > _COMPRESSION * page.stored:
            raise ValueError(
                f"{chunk.name} has a page of {page.size} bytes, above the limit of {MAX_BYTES}"
            )
        largest, values = max(largest, page.size), values + page.values
        if is_list and values > MAX_LISTED:
            raise ValueError(f"{chunk.name} has lists of more than {MAX_LISTED} values")
    return largest


@dataclass(frozen=True)
class _Page:
    size: int
    stored: int
    values: int


def _pages(file: BinaryIO, chunk: Chunk) -> Iterator[_Page]:
    """The headers of a column chunk, one after the other."""
    place, end = chunk.start, chunk.start + chunk.stored
    number = 0
    while place < end:
        number += 1
        if number > MAX_PAGES:
            raise ValueError(f"{chunk.name} is in more than {MAX_PAGES} pages")
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
                length = self._varint()
                self._skip(length)
                return self.data[self.place - length : self.place]
            case 9 | 10:
                return self._read_list(depth)
            case 12:
                return self.read_struct(depth)
        raise ValueError("its pages cannot be read")  # there are no maps

    def _read_list(self, depth: int) -> list[Any]:
        head = self._byte()
        count = self._varint() if head >> 4 == 15 else head >> 4
        if count > len(self.data):
            raise IndexError
        kind = head & 15
        return [self._byte() if kind < 3 else self._read(kind, depth + 1) for _ in range(count)]

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
