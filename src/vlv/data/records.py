"""Find records: files, folders, globs, tar shards, JSONL and Parquet, each with random access.

A record is an id, the place where its image bytes lie, and what is known about it. Images are
not opened here.
"""

from __future__ import annotations

import glob
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image

from vlv.data.hub_sets import HubCell, is_hub_set, is_saved_set, list_hub_set
from vlv.data.images import DEFAULT_LIMITS, IMAGE_SUFFIXES, ImageLimits, load_image
from vlv.data.locations import Location, Url, expand_lists, expand_url, is_remote
from vlv.data.shards import Span, TarShardWriter, index_tar, shard_path
from vlv.data.tables import (
    GUESSED,
    Absent,
    Cell,
    Columns,
    Held,
    Row,
    parse_object,
    read_jsonl,
    read_parquet,
    stated_hash,
)
from vlv.data.tar_stream import Sample
from vlv.data.values import check_hash, load_bytes
from vlv.errors import DataError, ImageError

__all__ = [
    "Cell",
    "Columns",
    "Held",
    "Record",
    "Source",
    "Span",
    "TarShardWriter",
    "find_records",
    "record_of_row",
    "record_of_sample",
    "shard_path",
]

logger = logging.getLogger(__name__)

READABLE = (
    "images (.jpg, .png, .webp and others), folders, .tar, .jsonl and .parquet, @LIST of them, "
    "URLs of .tar and .parquet, and hf:OWNER/NAME"
)
_TABLES = frozenset({".jsonl", ".parquet"})
_SIDECARS = (".txt", ".json")  # caption, metadata

Source = Path | Span | Cell | Held | Absent | HubCell
OnDamage = Literal["error", "keep"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, init=False)
class Record:
    """One image and what is known about it.

    Attributes:
        id: Unique and stable: the path relative to the folder that was named, or the tar key.
        source: Where the bytes of the image lie.
        caption: The text that belongs to it, if any.
        meta_json: Everything else, as the text of a JSON object; `meta` is the object.
        sha256: What an index says that the SHA-256 of the image file is; it is checked at each read.
    """

    id: str
    source: Source
    caption: str | None
    meta_json: str | None
    sha256: str | None

    def __init__(
        self,
        id: str,
        source: Source,
        caption: str | None = None,
        meta: Mapping[str, Any] | None = None,
        *,
        meta_json: str | None = None,
        sha256: str | None = None,
    ) -> None:
        if meta is not None:
            meta_json = json.dumps(meta, ensure_ascii=False)
        for name, value in (("id", id), ("source", source), ("caption", caption)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "meta_json", meta_json)
        object.__setattr__(self, "sha256", sha256)

    @property
    def meta(self) -> dict[str, Any] | None:
        """The metadata, parsed anew at each access: tens of thousands stay small in memory.

        Raises:
            DataError: It is not a JSON object.
        """
        return None if self.meta_json is None else parse_object(self.meta_json, self.id)

    def open(self, *, max_bytes: int = DEFAULT_LIMITS.max_bytes) -> bytes:
        """The bytes of the image file; safe from any thread or process.

        Raises:
            DataError: The file is gone, shorter than when it was indexed, over the limit, or another than the index
                states.
        """
        if isinstance(self.source, Path):
            data = _read_file(self.source, max_bytes)
        else:
            if isinstance(self.source, Span) and self.source.size > max_bytes:
                raise ImageError(f"{self.source}: larger than the limit of {max_bytes} bytes")
            data = self.source.read()
        check_hash(data, self.sha256, self.name)
        return data

    def load(self, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
        """The image, upright and RGB: see `load_image`, and `load_bytes` for what tables may hold.

        Raises:
            DataError: It cannot be read or decoded, or is over a limit.
        """
        if isinstance(self.source, Path) and self.sha256 is None:
            return load_image(self.source, limits=limits)
        return load_bytes(self.open(max_bytes=limits.max_bytes), limits=limits, name=self.name)

    @property
    def name(self) -> str:
        """How messages and tables name the file of the image."""
        return (
            str(self.source) if isinstance(self.source, Path) else f"{self.source.path}/{self.id}"
        )


def find_records(
    inputs: Sequence[str | os.PathLike[str]],
    recursive: bool = True,
    *,
    columns: Columns = GUESSED,
    on_damage: OnDamage = "error",
) -> list[Record]:
    """List the records of files, folders, globs, tar shards, JSONL and Parquet files, and Hugging Face datasets.

    Folders give their images (with `.txt` and `.json` of the same stem as caption and metadata)
    and the records of their `.tar` shards, in sorted order. Numeric brace ranges such as
    `shard-{00000..00003}.tar` are expanded, and `@FILE` names a list of inputs. An image found twice is listed once;
    where an id occurs in two inputs, the path of its input is put before it. Of `.tar` and `.parquet` by URL only the
    headers are fetched here, and each image when it is read.

    Args:
        inputs: Paths, globs, brace ranges, `@FILE`, URLs, or `hf:OWNER/NAME[:SPLIT]`.
        recursive: Whether folders are searched to any depth.
        columns: What the image, its caption and its hash are called.
        on_damage: A truncated tar is an error, or its complete records are kept with a warning.

    Raises:
        DataError: An input is missing, empty, damaged, or of a type that vlv does not read.
    """
    if not inputs:
        raise DataError(f"no input was given; name {READABLE}")
    found: list[tuple[Record, Location]] = []
    for text in inputs:
        for base, path in expand(os.fspath(text)):
            if isinstance(path, str):
                found += [(record, Path(path)) for record in _read_hub_set(path, columns)]
                continue
            records = _records_of(path, base, recursive, columns, on_damage)
            found += [(record, _container(record, path, base)) for record in records]
    return _unique_ids(_without_repeats(found))


# From what was typed to paths --------------------------------------------------------------------


def expand(text: str) -> Iterator[tuple[Path, Location | str]]:
    """Pairs (the folder that ids are relative to, a path, URL or Hugging Face dataset).

    Raises:
        DataError: An input is missing or matches nothing.
    """
    for part in expand_lists(text):
        path = Path(part)
        if is_hub_set(part):
            yield Path(), part
        elif is_remote(part):
            yield from ((Path(), url) for url in expand_url(part))
        elif is_saved_set(path):
            yield Path(), f"hf:{part}"
        elif path.exists():
            yield (path if path.is_dir() else path.parent), path
        elif glob.has_magic(part):
            yield from _expand_glob(part)
        else:
            raise DataError(f"{part}: there is no such file or folder")


def _expand_glob(pattern: str) -> Iterator[tuple[Path, Location | str]]:
    readable = IMAGE_SUFFIXES | _TABLES | {".tar"}
    matches = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
    paths = [path for path in matches if path.is_file() and path.suffix.lower() in readable]
    paths = paths or [path for path in matches if path.is_dir()]
    if not paths:
        raise DataError(f"{pattern}: matches nothing that vlv reads; it reads {READABLE}")
    fixed = Path(*_before_magic(Path(pattern).parts))
    yield from ((fixed, path) for path in paths)


def _before_magic(parts: Iterable[str]) -> Iterator[str]:
    for part in parts:
        if glob.has_magic(part):
            return
        yield part


# From a path to records --------------------------------------------------------------------------


def _records_of(
    path: Location, base: Path, recursive: bool, columns: Columns, on_damage: OnDamage
) -> list[Record]:
    if isinstance(path, Url) and path.is_command:
        raise DataError(
            f"{path}: what a command prints cannot be listed; set data.streaming to true to train on it, or save it first"
        )
    if isinstance(path, Path) and path.is_dir():
        return _read_folder(path, base, recursive, columns, on_damage)
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return _read_tar(path, columns, on_damage)
    if suffix in _TABLES:
        return _read_table(path, columns)
    if isinstance(path, Path) and suffix in IMAGE_SUFFIXES:
        return [_read_image(path, base, _sidecars_of(path))]
    if (
        isinstance(path, Path)
        and suffix in _SIDECARS
        and any(path.with_suffix(s).exists() for s in IMAGE_SUFFIXES)
    ):
        return []  # the sidecar of an image, swept up by a glob of the shell
    raise DataError(f"{path}: vlv does not read this type of file; it reads {READABLE}")


def _container(record: Record, path: Location, base: Path) -> Location:
    if isinstance(record.source, Span):
        return record.source.path
    return path if path.suffix.lower() in _TABLES else base


def _without_repeats(
    found: Iterable[tuple[Record, Location]],
) -> Iterator[tuple[Record, Location]]:
    seen: set[Source] = set()
    for record, container in found:
        in_table = (
            not isinstance(record.source, Span | Path) or container.suffix.lower() in _TABLES
        )  # where one image may have many captions
        if in_table or record.source not in seen:
            seen.add(record.source)
            yield record, container


def _unique_ids(found: Iterable[tuple[Record, Location]]) -> list[Record]:
    found = list(found)
    counts = Counter(record.id for record, _ in found)
    records: list[Record] = []
    times: Counter[str] = Counter()
    for record, container in found:
        name = record.id
        if counts[name] > 1:
            name = f"{container.as_posix()}/{name}"
            times[name] += 1
            name += f"#{times[name]}" if times[name] > 1 else ""
        records.append(record if name == record.id else replace(record, id=name))
    return records


def _read_file(path: Path, max_bytes: int | None = None) -> bytes:
    try:
        if max_bytes is not None and path.stat().st_size > max_bytes:
            raise ImageError(f"{path}: larger than the limit of {max_bytes} bytes")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _decode(data: bytes, where: object) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: the text is not UTF-8") from error


# Folders -----------------------------------------------------------------------------------------


def _read_folder(
    folder: Path, base: Path, recursive: bool, columns: Columns, on_damage: OnDamage
) -> list[Record]:
    records: list[Record] = []
    for path, siblings in _walk(folder, recursive):
        if path.suffix.lower() == ".tar":
            records += _read_tar(path, columns, on_damage)
        else:
            records.append(_read_image(path, base, siblings))
    if not records:
        note = "" if recursive else " (its subfolders were not searched)"
        raise DataError(f"{folder}: the folder holds no images and no .tar shards{note}")
    return records


def _walk(folder: Path, recursive: bool) -> Iterator[tuple[Path, frozenset[str]]]:
    """Images and shards in sorted order, each with the names of all files beside it."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    wanted = IMAGE_SUFFIXES | {".tar"}
    for top, folders, names in os.walk(folder, onerror=fail):
        shown = sorted(name for name in folders if not name.startswith("."))
        folders[:] = shown if recursive else []
        siblings = frozenset(names)
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in wanted:
                yield Path(top, name), siblings


def _text(read: Callable[[], bytes], where: object) -> str | None:
    """The text of a sidecar; without a readable one the image is listed all the same."""
    try:
        return _decode(read(), where).strip()
    except DataError as error:
        logger.warning("%s; its image is listed without it", error)
        return None


def _sidecars_of(path: Path) -> frozenset[str]:
    sidecars = (path.with_suffix(suffix) for suffix in _SIDECARS)
    return frozenset(sidecar.name for sidecar in sidecars if sidecar.exists())


def _read_image(path: Path, base: Path, siblings: frozenset[str]) -> Record:
    caption, meta_json = (
        _text(partial(_read_file, sidecar), sidecar) if sidecar.name in siblings else None
        for sidecar in (path.with_suffix(suffix) for suffix in _SIDECARS)
    )
    return Record(path.relative_to(base).as_posix(), path, caption, meta_json=meta_json)


# Tar shards and tables ---------------------------------------------------------------------------


def _read_tar(path: Location, columns: Columns, on_damage: OnDamage) -> list[Record]:
    index = index_tar(path)
    if index.damage and on_damage == "error":
        raise DataError(f"{path}: {index.damage}; fetch or write it again")
    if index.damage:
        logger.warning("%s: %s; the complete records are kept", path, index.damage)
    records: list[Record] = []
    left_out: list[str] = []
    for key, parts in index.keys.items():
        image = _image_of(parts)
        if image is None:
            left_out.append(key)
            continue
        where = f"{path}/{key}"
        texts = {
            suffix: _text(parts[suffix].read, f"{where}.{suffix}")
            for suffix in ("json", columns.caption or "txt")
            if suffix in parts
        }
        records.append(_record_of_texts(key, image, texts, columns, where))
    if left_out:
        shown = ", ".join(left_out[:5])
        logger.warning("%s: %d keys without an image are left out: %s", path, len(left_out), shown)
    if not records and not index.damage:
        raise DataError(f"{path}: the tar holds no images")
    return records


def record_of_sample(sample: Sample, path: Location, columns: Columns = GUESSED) -> Record:
    """The record of a tar's sample that is in memory; its id begins with the path of the tar.

    Raises:
        DataError: The sample has no image, or metadata that are no JSON.
    """
    where = f"{path}/{sample.key}"
    image = _image_of(sample.parts)
    if image is None:
        raise DataError(f"{where}: the sample has no image")
    texts = {
        suffix: _text(partial(sample.parts.__getitem__, suffix), f"{where}.{suffix}")
        for suffix in ("json", columns.caption or "txt")
        if suffix in sample.parts
    }
    return _record_of_texts(where, Held(str(path), image), texts, columns, where)


def _image_of(parts: Mapping[str, T]) -> T | None:
    """The first member of a sample that is an image."""
    return next((parts[s] for s in sorted(parts) if f".{s}" in IMAGE_SUFFIXES), None)


def _record_of_texts(
    key: str, image: Source, texts: Mapping[str, str | None], columns: Columns, where: str
) -> Record:
    """A record whose caption is a member of its own or a field of the metadata."""
    caption, meta_json = texts.get(columns.caption or "txt"), texts.get("json")
    sha256 = None
    if columns != GUESSED:
        fields = parse_object(meta_json, where) if meta_json is not None else {}
        if caption is None and columns.caption in fields:
            caption = str(fields[columns.caption])
        sha256 = stated_hash(fields, columns)
    return Record(key, image, caption, meta_json=meta_json, sha256=sha256)


def _read_table(path: Location, columns: Columns) -> list[Record]:
    if path.suffix.lower() == ".parquet":
        rows: Iterable[Row] = read_parquet(path, columns)
    else:
        assert isinstance(path, Path), "expand_url takes no other URLs"
        rows = read_jsonl(path, _decode(_read_file(path), path), columns)
    records = [record_of_row(row, path) for row in rows]
    if not records:
        raise DataError(f"{path}: the file holds no records")
    return records


def record_of_row(row: Row, path: Location, prefix: str = "") -> Record:
    """The record of a table's row; the path of its image is relative to the table.

    Raises:
        DataError: The table is remote and names images by their paths.
    """
    if not isinstance(row.image, str):
        source: Source = row.image
    elif isinstance(path, Url):
        raise DataError(f"{path}: a remote table must hold the images, not their paths")
    else:
        source = path.parent / row.image
    return Record(prefix + row.id, source, row.caption, meta_json=row.meta_json, sha256=row.sha256)


def _read_hub_set(text: str, columns: Columns) -> list[Record]:
    return [
        Record(row.id, cell, row.caption, meta_json=row.meta_json, sha256=row.sha256)
        for row, cell in list_hub_set(text, columns)
    ]
