"""The records of a chunk, one after the other, and in their place whatever is wrong with it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlv.curation import hf
from vlv.curation.places import Place, open_parquet
from vlv.curation.tars import Member, list_tar
from vlv.data.images import IMAGE_SUFFIXES
from vlv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from vlv.curation.chunks import Chunk

logger = logging.getLogger(__name__)

DAMAGED_FILE = "damaged_file"
MISSING_IMAGE = "missing_image"
DUPLICATE_KEY = "duplicate_key"
NOT_DOWNLOADED = "not_downloaded"
UNREADABLE = "unreadable"

PATH_FIELDS = ("file_name", "path", "image", "file")
CAPTION_FIELDS = ("caption", "text")
ID_FIELDS = ("id", "key", "__key__")
BYTES_COLUMNS = ("image", "image_bytes", "bytes", "jpg", "jpeg", "png", "webp")
_ROWS_AT_A_TIME = 256


@dataclass(slots=True)
class Item:
    """One record, or what stands in its place.

    Attributes:
        id: The path relative to the folder that was named, the key in the tar, or that of the table.
        place: Where the image lies; of a fault, where it occurred.
        caption: Its text, if any.
        meta: Everything else that is known.
        extras: Other members of a tar: suffix to offset and size.
        fault: Why there is no image here; empty for a record.
        detail: The fault in words.
        is_image: False for a fault of a whole file.
    """

    id: str
    place: Place
    caption: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Member] = field(default_factory=dict)
    fault: str = ""
    detail: str = ""
    is_image: bool = True


def read_items(chunk: Chunk) -> Iterator[Item]:
    """Every record of a chunk in order; a damaged file gives what is whole, and a fault for the rest."""
    place = Place("file", chunk.path)
    if chunk.kind == "unreadable":
        yield _broken(place, chunk.problem)
        return
    try:
        match chunk.kind:
            case "files":
                yield from _read_files(chunk)
            case "tar":
                yield from _read_tar(chunk)
            case "parquet":
                yield from _read_parquet(chunk)
            case "jsonl":
                yield from _read_jsonl(chunk)
            case _:
                yield from _read_dataset(chunk)
    except (DataError, OSError, ValueError) as error:  # pyarrow raises the last two
        yield _broken(place, str(error))


def _broken(place: Place, detail: str) -> Item:
    return Item(place.path, place, fault=DAMAGED_FILE, detail=detail, is_image=False)


# Folders -----------------------------------------------------------------------------------------


def _read_files(chunk: Chunk) -> Iterator[Item]:
    folder = Path(chunk.path)
    table = _Downloads(chunk.table)
    for name in chunk.names:
        path = folder / name
        caption, meta = _text(path.with_suffix(".txt")), _text(path.with_suffix(".json"))
        known = table.take(path.stem) | _object(meta, str(path.with_suffix(".json")))
        yield Item(name, Place("file", str(path)), _caption(caption, known), known)
    yield from table.failures(chunk.path)


def _text(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8-sig").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("%s: cannot be read (%s); its image is taken without it", path, error)
        return None


def _object(text: str | None, where: str) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        logger.warning("%s: this is not JSON (%s); its image is taken without it", where, error)
        return {}
    return value if isinstance(value, dict) else {"value": value}


def _caption(text: str | None, meta: Mapping[str, Any]) -> str | None:
    """The text of the sidecar, or else what the JSON calls the caption."""
    known = meta.get("caption")
    return text or (known if isinstance(known, str) else None)


# Tar shards --------------------------------------------------------------------------------------


def _read_tar(chunk: Chunk) -> Iterator[Item]:
    contents = list_tar(chunk.path)
    table = _Downloads(chunk.table)
    place = Place("file", chunk.path)
    with Path(chunk.path).open("rb") as file:

        def text(member: Member | None, name: str) -> str | None:
            if member is None:
                return None
            file.seek(member[0])
            try:
                return file.read(member[1]).decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                logger.warning("%s/%s: the text is not UTF-8 (%s)", chunk.path, name, error)
                return None

        images = 0
        for key, members in contents.keys.items():
            extras = dict(members)
            caption = text(extras.pop("txt", None), f"{key}.txt")
            meta = table.take(key) | _object(
                text(extras.pop("json", None), f"{key}.json"), f"{chunk.path}/{key}.json"
            )
            suffix = next((name for name in sorted(extras) if f".{name}" in IMAGE_SUFFIXES), None)
            if suffix is None:
                detail = f"{chunk.path}: {key} has {', '.join(sorted(members))}, but no image"
                yield Item(key, place, caption, meta, {}, MISSING_IMAGE, detail)
                continue
            images += 1
            offset, size = extras.pop(suffix)
            place_of = Place("span", chunk.path, offset, size)
            yield Item(key, place_of, _caption(caption, meta), meta, extras)
    for name in contents.repeated:
        detail = f"{chunk.path}: the member {name} occurs again; the first counts"
        yield Item(name, place, fault=DUPLICATE_KEY, detail=detail)
    if contents.damage:
        cut = f"; {', '.join(contents.cut)} is cut off" if contents.cut else ""
        yield _broken(place, f"{chunk.path}: {contents.damage}{cut}")
    yield from table.failures(chunk.path)
    yield from _against_stats(Path(chunk.path), images)


# img2dataset -------------------------------------------------------------------------------------


class _Downloads:
    """The table that img2dataset writes beside a shard: what is known of each address, fetched or not."""

    def __init__(self, path: str | None) -> None:
        self._rows: dict[str, dict[str, Any]] = {}
        self._damage = ""
        self._path = path or ""
        if path is None:
            return
        try:
            file = open_parquet(path)
            light = [field.name for field in file.schema_arrow if not _holds_bytes(field)]
            rows = file.read(columns=light).to_pylist()
        except (DataError, OSError, ValueError) as error:
            self._damage = str(error)
            return
        if all({"key", "status"} <= row.keys() for row in rows):
            self._rows = {str(row["key"]): row for row in rows}

    def take(self, key: str) -> dict[str, Any]:
        """What is known of an image, without the columns that are empty."""
        row = self._rows.pop(key, {})
        return {name: value for name, value in row.items() if value is not None}

    def failures(self, shard: str) -> Iterator[Item]:
        """The addresses that gave no image, and the damage of the table itself."""
        if self._damage:
            yield _broken(Place("file", self._path), self._damage)
        for key, row in self._rows.items():
            if row["status"] != "success":
                detail = f"{row.get('url', '')}: {row.get('error_message') or row['status']}"
                yield Item(key, Place("file", shard), fault=NOT_DOWNLOADED, detail=detail)


def _against_stats(tar: Path, images: int) -> Iterator[Item]:
    """A shard of img2dataset is complete when its statistics lie beside it and count the same images."""
    stats = tar.with_name(f"{tar.stem}_stats.json")
    others = not stats.exists() and next(tar.parent.glob("*_stats.json"), None) is not None
    if others:
        detail = f"{tar}: img2dataset has not finished this shard ({stats.name} is missing)"
        yield _broken(Place("file", str(tar)), detail)
    if not stats.exists():
        return
    successes = _object(_text(stats), str(stats)).get("successes")
    if isinstance(successes, int) and successes != images:
        detail = f"{tar}: {images} images, but {stats.name} says {successes}"
        yield _broken(Place("file", str(tar)), detail)


# Tables and datasets -----------------------------------------------------------------------------


def _read_jsonl(chunk: Chunk) -> Iterator[Item]:
    folder = Path(chunk.path).parent
    with Path(chunk.path).open("rb") as file:
        file.seek(chunk.start)
        while file.tell() < chunk.stop:
            start = file.tell()
            line = file.readline()
            if not line.strip():
                continue
            where = f"{chunk.path}, at byte {start}"
            try:
                values = json.loads(line.decode("utf-8-sig"))
                if not isinstance(values, dict):
                    raise ValueError("a JSON object is wanted here")  # noqa: TRY004
            except ValueError as error:  # text that is not UTF-8 too
                place = Place("file", chunk.path)
                yield Item(where, place, fault=DAMAGED_FILE, detail=f"{where}: {error}")
                continue
            yield _row(values, folder, where)


def _read_parquet(chunk: Chunk) -> Iterator[Item]:
    file = open_parquet(chunk.path)
    column = bytes_column(file.schema_arrow)
    light = [field.name for field in file.schema_arrow if not _holds_bytes(field)]
    for group in range(chunk.start, chunk.stop):
        for number, values in enumerate(_rows_of_group(file, group, light)):
            place = None
            if column is not None:
                place = Place("cell", chunk.path, group, number, column)
            where = f"{chunk.path}, row group {group}, row {number}"
            yield _row(values, Path(chunk.path).parent, where, place)


def _rows_of_group(file: Any, group: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    if not columns:
        yield from ({} for _ in range(file.metadata.row_group(group).num_rows))
        return
    batches = file.iter_batches(
        _ROWS_AT_A_TIME, row_groups=[group], columns=columns, use_threads=False
    )
    for batch in batches:
        yield from batch.to_pylist()


def _read_dataset(chunk: Chunk) -> Iterator[Item]:
    for place, values in hf.rows(chunk.path, chunk.start, chunk.stop):
        yield _row(values, Path(), str(place), place)


def _row(values: Mapping[str, Any], folder: Path, where: str, place: Place | None = None) -> Item:
    rest = {name: value for name, value in values.items() if value is not None}
    fault = detail = ""
    if place is None:
        image = _pop_text(rest, PATH_FIELDS)
        place = Place("file", str(folder / (image or "")))
        if image is None:
            fault = MISSING_IMAGE
            detail = f"{where}: none of the fields {', '.join(PATH_FIELDS)} names an image"
        default = image or where
    else:
        default = (
            f"{place.first:05d}-{place.second:06d}" if place.kind == "cell" else str(place.first)
        )
    caption, key = _pop_text(rest, CAPTION_FIELDS), _pop_text(rest, ID_FIELDS)
    if {"url", "error_message", "status"} <= values.keys() and values["status"] != "success":
        fault = NOT_DOWNLOADED  # a table of img2dataset
        detail = f"{values['url']}: {values['error_message'] or values['status']}"
    return Item(key or default, place, caption, rest, {}, fault, detail)


def _pop_text(values: dict[str, Any], fields: Iterable[str]) -> str | None:
    for name in fields:
        if isinstance(values.get(name), str | int):
            return str(values.pop(name))
    return None


def _holds_bytes(field: Any) -> bool:
    return "binary" in str(field.type)  # binary, large_binary, struct<bytes: binary, path: string>


def bytes_column(schema: Any) -> str | None:
    """The column of a Parquet table that holds the images; None where there is none."""
    names = [field.name for field in schema if _holds_bytes(field)]
    return next((name for name in BYTES_COLUMNS if name in names), None)
