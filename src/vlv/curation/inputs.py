"""Parts of the inputs, and their images in the order of the files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Self

from vlv.data.foreign import printable, read_at_most, read_up_to, unreadable
from vlv.data.hub_sets import HubCell
from vlv.data.images import pixels_as_png
from vlv.data.locations import Location, Url, is_remote, open_seekable
from vlv.data.parquet import cells_of
from vlv.data.parts import Part
from vlv.data.records import Columns, EmbeddingRow, Entry, ImagePlace, Record, Span
from vlv.data.source import Source
from vlv.data.tables import Cell, ParquetRows, folder_of, image_bytes, names_images
from vlv.errors import DataError, ImageError, VLVError
from vlv.storage import Json


def image_parts(inputs: Sequence[str], image_root: str | None = None) -> list[Part]:
    """The parts of inputs that hold images; those that a table names lie below its folder, or below `image_root`.

    Raises:
        DataError: As `Source.parts`, or a table has addresses instead of images.
    """
    parts = Source(inputs, Columns(image_root=image_root), detail="all").parts()
    for path in dict.fromkeys(part.source for part in parts if isinstance(part, ParquetRows)):
        if not names_images(path):
            raise DataError(
                f"{path}: no column holds or names images; filter a table of addresses with --table, "
                "and fetch the images with img2dataset"
            )
    return parts


class SequentialReader:
    """Reads images one after the other; in the order of a file it reads on, instead of from the start again.

    Args:
        max_bytes: Of an image.
        image_root: Folder below which the images of a table may lie, beside its own.
    """

    def __init__(self, max_bytes: int, image_root: str | None = None) -> None:
        self.max_bytes, self.image_root = max_bytes, image_root
        self._open: tuple[Location, BinaryIO] | None = None

    def read(self, place: ImagePlace) -> bytes:
        """The bytes of an image file; pixels in a table become a PNG.

        Raises:
            DataError: They are not there, or cannot be read.
            ImageError: They are more than the limit.
        """
        if isinstance(place, Span) and place.size > self.max_bytes:
            raise self._too_large(place)
        try:
            data = self._read(place)
        except VLVError:
            raise
        except Exception as error:  # pyarrow raises a dozen types on damaged files
            raise unreadable(shown(place), error) from error
        if len(data) > self.max_bytes:
            raise self._too_large(place)
        return data

    def _too_large(self, place: ImagePlace) -> ImageError:
        return ImageError(f"{shown(place)}: larger than the limit of {self.max_bytes} bytes")

    def _read(self, place: ImagePlace) -> bytes:
        if isinstance(place, Path):
            return read_at_most(place, self.max_bytes + 1)
        if isinstance(place, Span):
            return self._read_span(place)
        data = self._read_cell(place) if isinstance(place, Cell) else place.read()
        return pixels_as_png(data, str(place)) if place.raw_pixels else data

    def _read_span(self, place: Span) -> bytes:
        if self._open is None or self._open[0] != place.path:
            self.close()
            self._open = place.path, open_seekable(place.path)
        file = self._open[1]
        file.seek(place.offset)
        data = read_up_to(file, place.size, place.size)
        if len(data) != place.size:
            raise DataError(f"{place}: the file is shorter than when it was listed")
        return data

    def _read_cell(self, place: Cell) -> bytes:
        value = cells_of(place.path, place.group, place.column).at(place.row)
        root = place.image_root or self.image_root
        return image_bytes(value, str(place), folder_of(place.path), root)

    def close(self) -> None:
        """Close what is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# Places in tables --------------------------------------------------------------------------------

PLACE = {
    "kind": "string",
    "path": "binary",
    "first": "int64",
    "second": "int64",
    "column": "string",
}
"""The columns that say where an image lies."""


def shown(place: ImagePlace) -> str:
    """How messages and tables name a place."""
    return printable(str(place))


def place_columns(entry: Entry) -> Json:
    """Where an image lies, as values of `PLACE`; of what is no record, where it was met."""
    if not isinstance(entry, Record):
        return _columns("none", entry.source)
    match entry.source:
        case Path() as path:
            return _columns("file", path)
        case Span(path, offset, size):
            return _columns("span", path, offset, size)
        case Cell(path, column, group, row):
            return _columns("cell", path, group, row, column)
        case HubCell(path, column, row):
            return _columns("row", path, row, 0, column)
        case EmbeddingRow(path, row):
            return _columns("embedding", path, row)
    raise AssertionError(f"{entry.source} is not listed by any part")


def _columns(
    kind: str, path: Location | str, first: int = 0, second: int = 0, column: str = ""
) -> Json:
    name = os.fsencode(str(path))
    return {"kind": kind, "path": name, "first": first, "second": second, "column": column}


def place_of(row: Json) -> ImagePlace:
    """The place that `place_columns` wrote."""
    kind, text = row["kind"], os.fsdecode(row["path"])
    path: Location = Url(text) if is_remote(text) else Path(text)
    match kind:
        case "span":
            return Span(path, row["first"], row["second"])
        case "cell":
            return Cell(path, row["column"], row["first"], row["second"])
        case "row":
            return HubCell(text, row["column"], row["first"])
        case "embedding":
            return EmbeddingRow(Path(text), row["first"])
    return Path(text)
