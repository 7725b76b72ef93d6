"""Parts of a source: pieces that any process can read alone, without image bytes or with them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from vlv.data.foreign import (
    decode_text,
    has_control,
    parse_json,
    parse_object,
    printable,
    read_file,
    shown_name,
)
from vlv.data.images import IMAGE_SUFFIXES
from vlv.data.locations import Location
from vlv.data.records import (
    DAMAGED,
    GUESSED,
    REFUSED,
    BadRecord,
    Columns,
    Entry,
    ImagePlace,
    Record,
    Span,
)
from vlv.errors import DataError
from vlv.storage import Json

logger = logging.getLogger(__name__)

Detail = Literal["images", "texts", "all"]
"""What is read of a record beside the place of its image: nothing, its caption and metadata, or also the other members
of its tar and what img2dataset's tables say."""

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """One file, some rows of one, or some images of a folder.

    Attributes:
        source: Path, URL, or name of the dataset; of images the folder that their names begin at.
        columns: What the image, its caption and its hash are called.
    """

    source: Location | str
    columns: Columns = GUESSED

    def __str__(self) -> str:
        return printable(str(self.source))

    @property
    def name(self) -> str:
        """The last part of its path: what tells it from other parts wherever the data lie."""
        return str(self).rstrip("/").rpartition("/")[2]

    @property
    def num_bytes(self) -> int:
        """Size of the file or files; 0 where they are remote."""
        is_file = isinstance(self.source, Path) and self.source.is_file()
        return self.source.stat().st_size if is_file else 0  # type: ignore[union-attr]

    def entries(self, detail: Detail = "texts") -> Iterator[Entry]:
        """The records in order, without image bytes, and in their place what is wrong; a damaged file gives what is whole."""
        try:
            yield from map(_named, self.scan(detail))
        except (DataError, OSError, ValueError) as error:
            yield self.damaged(str(error))

    def scan(self, detail: Detail) -> Iterator[Entry]:
        """As `entries`, but a damaged file ends with an error.

        Raises:
            DataError: The file cannot be read.
        """
        raise NotImplementedError

    def read(self, start: int = 0) -> Iterator[Entry]:
        """The records in order with their image bytes in memory, one at a time; what is wrong is told in its place.

        Ids begin with the name of the source. A damaged file ends with a `BadRecord` in its name.

        Args:
            start: Records at the beginning to leave out.
        """
        try:
            yield from map(_named, self.stream(start))
        except DataError as error:
            yield self.damaged(str(error))

    def stream(self, start: int) -> Iterator[Entry]:
        """As `read`, but a damaged file ends with an error.

        Raises:
            DataError: The file cannot be read.
        """
        raise NotImplementedError

    def damaged(self, reason: str) -> BadRecord:
        """What stands for the file, or for the rest of it."""
        return BadRecord(str(self), str(self), reason, DAMAGED, is_file=True)


def _named(entry: Entry) -> Entry:
    """A record, or why its id is no name: it would be written into file names, tars and tables."""
    if isinstance(entry, BadRecord):
        return replace(entry, id=shown_name(entry.id), reason=shown_name(entry.reason))
    if not has_control(entry.id):
        return entry
    id = shown_name(entry.id)
    return BadRecord(
        id, entry.name, f"{id}: the name holds a control character; rename it", REFUSED
    )


@dataclass(frozen=True)
class Unreadable(Part):
    """A file that could not be opened, in the place of its parts."""

    reason: str = ""

    def scan(self, detail: Detail) -> Iterator[Entry]:
        """The reason."""
        yield self.damaged(self.reason)


@dataclass(frozen=True)
class ImageFiles(Part):
    """Images of a folder, each with `.txt` and `.json` of the same stem as caption and metadata.

    Attributes:
        names: Paths relative to the folder.
        table: Parquet that img2dataset has put beside the folder; None where there is none.
    """

    names: tuple[str, ...] = ()
    table: Path | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the images."""
        paths = [Path(str(self.source), name) for name in self.names]
        return sum(path.stat().st_size for path in paths if path.exists())

    def scan(self, detail: Detail) -> Iterator[Entry]:
        """The images, whether they can be opened or not."""
        from vlv.data.img2dataset import Downloads

        folder = Path(str(self.source))
        downloads = Downloads(self.table if detail == "all" else None)
        for name in self.names:
            path = folder / name
            texts: dict[str, str | None] = {}
            if detail != "images":
                texts = {
                    suffix: _sidecar(path.with_suffix(f".{suffix}")) for suffix in ("txt", "json")
                }
            record = record_of_texts(printable(name), path, texts)
            yield downloads.join(record, path.stem)
        yield from downloads.failures(str(folder))


def _sidecar(path: Path) -> str | None:
    """The text of a file beside an image; without a readable one the image is taken all the same."""
    try:
        return decode_text(read_file(path), printable(path)).strip()
    except DataError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            logger.warning("%s; its image is listed without it", error)
        return None


def image_of(members: Mapping[str, T]) -> tuple[str, T] | None:
    """The first member of a sample that is an image, with its suffix."""
    return next(((s, members[s]) for s in sorted(members) if f".{s}" in IMAGE_SUFFIXES), None)


def record_of_texts(
    id: str,
    image: ImagePlace,
    texts: Mapping[str, str | None],
    columns: Columns = GUESSED,
    extras: Mapping[str, Span] | None = None,
) -> Record:
    """A record whose caption is a text of its own, or a field of the metadata.

    Args:
        id: Of the record.
        image: Where the image lies.
        texts: Suffix to text.
        columns: Which suffix or field is the caption, and which field the hash.
        extras: As in `Record`.

    Raises:
        DataError: A column was named, and the metadata are no JSON object.
    """
    caption, meta_json = texts.get(columns.caption or "txt"), texts.get("json")
    sha256 = None
    if columns != GUESSED:
        fields = parse_object(meta_json, id) if meta_json is not None else {}
        if caption is None and columns.caption in fields:
            caption = str(fields[columns.caption])
        sha256 = stated_hash(fields, columns)
    elif not caption and meta_json is not None and '"caption"' in meta_json:
        found = metadata(meta_json, id).get("caption")
        caption = found if isinstance(found, str) else None
    return Record(id, image, caption or None, meta_json=meta_json, sha256=sha256, extras=extras)


def metadata(text: str | None, where: object) -> Json:
    """The metadata of a record as far as they can be read; what is no object stands under `value`."""
    if text is None:
        return {}
    try:
        value = parse_json(text, where)
    except DataError as error:
        logger.warning("%s; its image is taken without it", error)
        return {}
    return value if isinstance(value, dict) else {"value": value}


def stated_hash(values: Mapping[str, object], columns: Columns) -> str | None:
    """The SHA-256 that an index states of an image; empty, and so that of no image, where it should and does not."""
    return None if columns.sha256 is None else str(values.get(columns.sha256) or "")
