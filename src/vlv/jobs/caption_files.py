"""Captions that anybody wrote, joined to their images: a table of any tool, or what stands beside the images."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlv.data.foreign import decode_text, parse_object, printable, read_file
from vlv.data.parquet import Parquet
from vlv.data.tables import light_columns
from vlv.errors import DataError
from vlv.storage import Json

if TYPE_CHECKING:
    from vlv.data.records import Record

CAPTION_COLUMNS = ("caption", "text")
ID_COLUMNS = ("id", "key", "__key__", "file_name", "filename", "path", "image_path", "image", "file", "image_id")  # fmt: skip
_MAX_BYTES = 2**31  # of a text file
_ROWS = 256  # at a time


@dataclass(frozen=True)
class Captioned:
    """An image and its caption, or what is wrong with the two.

    Attributes:
        id: Of the image, or what the table calls it; unique.
        record: The image; None where there is none.
        caption: The text; None where there is none.
        error: Why they cannot be used together; None when they can.
    """

    id: str
    record: Record | None = None
    caption: str | None = None
    error: str | None = None


def names_of(id: str) -> Iterator[str]:
    """The names under which a file may be listed elsewhere: as it is, without folder, and without suffix."""
    path = Path(id)
    yield from dict.fromkeys(
        (id, path.name, str(path.with_suffix("")) if path.name else id, path.stem)
    )


def own_captions(records: Sequence[Record]) -> list[Captioned]:
    """Images with the captions that they came with: sidecars, tars, tables."""
    return [_checked(record.id, record, record.caption, "it has no caption") for record in records]


def join_captions(
    records: Sequence[Record],
    path: Path,
    *,
    caption_column: str | None = None,
    id_column: str | None = None,
) -> list[Captioned]:
    """Images with the captions that a table has for them; what has no partner follows with its error.

    Args:
        records: The images.
        path: A .jsonl, .csv or .parquet file.
        caption_column: Name of its caption; None takes `CAPTION_COLUMNS`.
        id_column: Name of what tells the image: its id, its path, or its name with or without suffix; None takes
            `ID_COLUMNS`.

    Raises:
        DataError: The table cannot be read, or has no such columns.
    """
    places = _Places(records)
    names = _Names(path, caption_column, id_column)
    found: dict[str, Captioned] = {}
    others: list[Captioned] = []
    times: Counter[str] = Counter()
    for where, row in read_table(path):
        if isinstance(row, str):
            others.append(Captioned(where, error=row))
            continue
        key, caption = names.read(row, where)
        record, error = places.find(key)
        id = record.id if record is not None else key
        times[id] += 1
        if error is not None:
            others.append(Captioned(_numbered(id, times[id]), None, caption, f"{where}: {error}"))
        elif times[id] > 1:
            why = f"{where}: {id} has a caption before; the first one counts"
            others.append(Captioned(_numbered(id, times[id]), None, caption, why))
        else:
            found[id] = _checked(id, record, caption, f"its caption in {path} is missing")
    missing = f"{path} has no caption for it"
    return [
        found.get(r.id) or Captioned(r.id, r, error=f"{r.name}: {missing}") for r in records
    ] + others


def _checked(id: str, record: Record | None, caption: str | None, missing: str) -> Captioned:
    name = id if record is None else record.name
    if caption is None:
        return Captioned(id, record, error=f"{name}: {missing}")
    if not caption.strip():
        return Captioned(id, record, caption, f"{name}: the caption is empty")
    return Captioned(id, record, caption)


def _numbered(id: str, time: int) -> str:
    return id if time == 1 else f"{id}#{time}"


class _Places:
    """Finds images by whatever a table calls them."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._exact = {r.name: r for r in records} | {r.id: r for r in records}
        self._alike: defaultdict[str, list[Record]] = defaultdict(list)
        for record in records:
            for name in names_of(record.id):
                self._alike[name].append(record)

    def find(self, key: str) -> tuple[Record | None, str | None]:
        """The image, or why there is none."""
        if key in self._exact:
            return self._exact[key], None
        for name in names_of(key):
            if alike := self._alike.get(name):
                if len(alike) == 1:
                    return alike[0], None
                return (
                    None,
                    f"{key} may be {alike[0].id} or {alike[1].id}; name the images by their ids",
                )
        return None, f"there is no image {key or 'without a name'} among the inputs"


class _Names:
    """The columns of a table, which its first row decides."""

    def __init__(self, path: Path, caption: str | None, id: str | None) -> None:
        self._path = path
        self._wanted = {
            "--id-column": (id,) if id else ID_COLUMNS,
            "--caption-column": (caption,) if caption else CAPTION_COLUMNS,
        }
        self._chosen: list[str] | None = None

    def read(self, row: Mapping[str, object], where: str) -> tuple[str, str | None]:
        """Name of the image, and its caption."""
        if self._chosen is None:
            self._chosen = [self._choose(option, row) for option in self._wanted]
        key, caption = (row.get(name) for name in self._chosen)
        return "" if key is None else printable(str(key)), None if caption is None else str(caption)

    def _choose(self, option: str, row: Mapping[str, object]) -> str:
        for name in self._wanted[option]:
            if isinstance(row.get(name), str | int) or (
                name in row and len(self._wanted[option]) == 1
            ):
                return name
        wanted, known = (", ".join(map(str, names)) for names in (self._wanted[option], row))
        raise DataError(
            f"{self._path}: there is no column {wanted} (columns: {known}); name it with {option}"
        )


def read_table(path: Path) -> Iterator[tuple[str, Json | str]]:
    """Every row of a table, with words that name it; in the place of a damaged row what is wrong with it.

    Raises:
        DataError: The file cannot be read, or is of another type.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        for number, row in enumerate(_parquet_rows(path), 1):
            yield f"{path}, row {number}", row
    elif suffix == ".csv":
        text = decode_text(read_file(path, _MAX_BYTES), path)
        try:
            for number, row in enumerate(
                csv.DictReader(io.StringIO(text, newline=""), strict=True), 1
            ):
                yield f"{path}, row {number}", {k: v for k, v in row.items() if k is not None}
        except csv.Error as error:
            raise DataError(f"{path} is no readable CSV table ({error})") from error
    elif suffix == ".jsonl":
        for number, line in enumerate(
            decode_text(read_file(path, _MAX_BYTES), path).split("\n"), 1
        ):
            where = f"{path}, line {number}"
            if line.strip():
                try:
                    yield where, parse_object(line, where)
                except DataError as error:
                    yield where, str(error)
    else:
        raise DataError(f"{path}: captions are read from .jsonl, .csv and .parquet")


def _parquet_rows(path: Path) -> Iterator[Json]:
    file = Parquet(path)
    names = light_columns(file.schema)
    for group in range(file.num_groups if names else 0):
        yield from file.values(group, names, _ROWS)
