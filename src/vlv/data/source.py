"""`Source`: every kind of input behind one interface, for captioning, embedding, training, filtering and evaluation."""

from __future__ import annotations

import difflib
import glob
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Literal

from vlv.data import embeddings
from vlv.data.embeddings import EmbeddingFile
from vlv.data.folders import walk
from vlv.data.hub_sets import HubRows, is_hub_set, is_saved_set, shards_of, splits_of
from vlv.data.images import IMAGE_SUFFIXES
from vlv.data.locations import Location, Url, expand_lists, expand_url, is_remote
from vlv.data.parts import Detail, ImageFiles, Part
from vlv.data.records import (
    DAMAGED,
    DUPLICATE_KEY,
    GUESSED,
    MISSING_IMAGE,
    NOT_DOWNLOADED,
    REFUSED,
    Absent,
    BadRecord,
    Columns,
    Entry,
    ImagePlace,
    Record,
    Span,
)
from vlv.data.tables import RECORDS, JsonLines, ParquetRows
from vlv.data.tars import TarShard
from vlv.errors import DataError

logger = logging.getLogger(__name__)

READABLE = (
    "images (.jpg, .png, .webp and others), folders, .tar, .jsonl and .parquet, files of vlv embed, saved Hugging Face "
    "datasets, @LIST of them, URLs of .tar and .parquet, and hf:OWNER/NAME"
)
_TABLES = frozenset({".jsonl", ".parquet"})
_READ = IMAGE_SUFFIXES | _TABLES | {".tar", embeddings.SUFFIX}
_SIDECARS = frozenset({".txt", ".json"})
_STREAMED = (".tar", ".parquet")
_LISTED_BYTES = 2**39  # half a terabyte of shards: about 10 million images

OnDamage = Literal["error", "keep"]


@dataclass(frozen=True)
class Source:
    """Images from files, folders, globs, tars, JSONL, Parquet, Hugging Face datasets, URLs, and files of `vlv embed`.

    Folders give their images (with `.txt` and `.json` of the same stem as caption and metadata) and `.tar` shards, in
    sorted order; where they have neither, their tables. Numeric brace ranges such as `shard-{00000..00003}.tar` are
    expanded, and `@FILE` names a list of inputs. Nothing is read before a method asks for it.

    Attributes:
        inputs: Paths, globs, brace ranges, `@FILE`, URLs, `pipe:COMMAND`, or `hf:OWNER/NAME[:SPLIT]`.
        columns: What the image, its caption and its hash are called.
        recursive: Whether folders are searched to any depth.
        detail: What is read beside the images when records are listed.
    """

    inputs: tuple[str, ...]
    columns: Columns = GUESSED
    recursive: bool = True
    detail: Detail = "texts"

    def __init__(
        self,
        inputs: Sequence[str | os.PathLike[str]],
        columns: Columns = GUESSED,
        *,
        recursive: bool = True,
        detail: Detail = "texts",
    ) -> None:
        values = {"inputs": tuple(os.fspath(text) for text in inputs), "columns": columns}
        for name, value in {**values, "recursive": recursive, "detail": detail}.items():
            object.__setattr__(self, name, value)

    # Listed: random access

    def records(self, on_damage: OnDamage = "error") -> list[Record]:
        """All records, each with the place of its image.

        An image found twice is listed once; where an id occurs in two inputs, the path of its input is put before it.
        Keys and rows without an image are left out with a warning.

        Args:
            on_damage: A damaged file is an error, or its whole records are kept with a warning.

        Raises:
            DataError: An input is missing, empty, damaged, or of a type that vlv does not read.
        """
        found: list[tuple[Record, Location]] = []
        for part in self._whole_parts():
            found += [(r, _container(r, part)) for r in _sound(part, self.detail, on_damage)]
        return _unique_ids(_without_repeats(found))

    def find(self, id: str) -> Record:
        """The record with an id.

        Raises:
            DataError: There is none, or as `records`.
        """
        if id in self._by_id:
            return self._by_id[id]
        near = difflib.get_close_matches(id, self._by_id, 1)
        hint = f"; did you mean {near[0]}" if near else ""
        raise DataError(f"no image has the id {id}{hint}")

    @cached_property
    def _by_id(self) -> dict[str, Record]:
        return {record.id: record for record in self.records()}

    # In parts: for processes that share the work

    def parts(self, size: int | None = None) -> list[Part]:
        """Pieces of about a thousand records (a tar is one, whatever its size), in the order of the inputs.

        A file that cannot be opened becomes a part of its own, so that it is named among the results.

        Args:
            size: Records of a part, where they can be chosen; `RECORDS` by default.

        Raises:
            DataError: No input, or one that is missing, empty or of a type that vlv does not read.
        """
        return [piece for part in self._whole_parts() for piece in _split(part, size or RECORDS)]

    # As a stream: too many to list

    def shards(self) -> list[Part]:
        """The files to be read one after the other; folders give the `.tar` files below them, and `.parquet` elsewhere.

        Raises:
            DataError: An input is missing, or cannot be streamed.
        """
        shards: list[Part] = []
        for _, place in self._places():
            if isinstance(place, str):
                shards += shards_of(place, self.columns)
            elif isinstance(place, Path) and place.is_dir():
                shards += [_shard(path, self.columns) for path in _shards_in(place)]
            elif place.suffix.lower() in _STREAMED:
                shards.append(_shard(place, self.columns))
            else:
                raise DataError(
                    f"{place}: only .tar and .parquet files and Hugging Face datasets are streamed; "
                    "set data.streaming to false, or pack the images into shards"
                )
        if not shards:
            raise DataError("no shard was given to stream; name .tar or .parquet files")
        return shards

    def stream(self) -> Iterator[Entry]:
        """The records of all shards, in memory one at a time; what is wrong in its place.

        Raises:
            DataError: As `shards`.
        """
        for shard in self.shards():
            yield from shard.read()

    def must_stream(self) -> bool:
        """Whether an input is remote, or so large (10 million records or so) that it should not be listed."""
        if any(is_remote(part) for text in self.inputs for part in expand_lists(text)):
            return True
        files = (place for _, place in self._places() if isinstance(place, Path))
        shards = (p for place in files for p in (_shards_in(place) if place.is_dir() else [place]))
        sizes = (path.stat().st_size for path in shards if path.suffix.lower() in _STREAMED)
        return sum(sizes) > _LISTED_BYTES

    # From what was typed to parts

    def _places(self) -> Iterator[tuple[Path, Location | str]]:
        """Pairs (the folder that ids are relative to, a path, URL or dataset)."""
        if not self.inputs:
            raise DataError(f"no input was given; name {READABLE}")
        for text in self.inputs:
            yield from _expand(text)

    def _whole_parts(self) -> Iterator[Part]:
        for (base, is_image), group in groupby(self._places(), _family):
            if is_image:
                names = [Path(str(place)).relative_to(base).as_posix() for _, place in group]
                yield ImageFiles(base, self.columns, tuple(names))
                continue
            for _, place in group:
                yield from self._parts_of(place, base)

    def _parts_of(self, place: Location | str, base: Path) -> Iterator[Part]:
        if isinstance(place, str):
            yield HubRows(place, self.columns)
        elif isinstance(place, Path) and place.is_dir():
            yield from self._folder(place, base)
        elif place.suffix.lower() in _READ:
            yield self._file(place)
        elif not _is_sidecar(place):  # of an image, swept up by a glob of the shell
            raise DataError(f"{place}: vlv does not read this type of file; it reads {READABLE}")

    def _file(self, place: Location) -> Part:
        match place.suffix.lower():
            case ".tar":
                return TarShard(place, self.columns, _table_beside(place))
            case ".parquet":
                return ParquetRows(place, self.columns)
        assert isinstance(place, Path), "expand_url takes no other URLs"
        if place.suffix.lower() == ".jsonl":
            return JsonLines(place, self.columns)
        return EmbeddingFile(place, self.columns)

    def _folder(self, folder: Path, base: Path) -> Iterator[Part]:
        """Images and tar shards in sorted order; a folder of img2dataset is one part, as a tar is."""
        empty = True
        for (is_tar, table), group in groupby(_walk(folder, self.recursive), _kind):
            empty = False
            if is_tar:
                yield from (TarShard(path, self.columns, _table_beside(path)) for path in group)
            else:
                names = tuple(path.relative_to(base).as_posix() for path in group)
                yield ImageFiles(base, self.columns, names, table)
        if empty:
            for path in _tables_in(folder, self.recursive):
                empty = False
                yield self._file(path)
        if empty:
            note = "" if self.recursive else " (its subfolders were not searched)"
            raise DataError(
                f"{folder}: the folder holds no images, no .tar shards and no tables{note}"
            )


def find_records(
    inputs: Sequence[str | os.PathLike[str]],
    recursive: bool = True,
    *,
    columns: Columns = GUESSED,
    on_damage: OnDamage = "error",
) -> list[Record]:
    """List the records of files, folders, globs, shards, tables and datasets; see `Source` and `Source.records`.

    Raises:
        DataError: An input is missing, empty, damaged, or of a type that vlv does not read.
    """
    return Source(inputs, columns, recursive=recursive).records(on_damage)


def records_of(part: Part, detail: Detail = "texts") -> list[Record]:
    """The records of one part; in the place of what is damaged or refused, one that says so when it is read.

    Keys and rows without an image are left out, an image found twice is listed once, and ids are unique in the part.
    """
    found: list[tuple[Record, Location]] = []
    for entry in part.entries(detail):
        if isinstance(entry, BadRecord):
            if entry.kind in (MISSING_IMAGE, NOT_DOWNLOADED):
                continue
            folder = entry.source.rpartition("/")[0] if entry.is_file else entry.source
            id = part.name if entry.is_file else entry.id
            entry = Record(id, Absent(folder, entry.reason))
        found.append((entry, _container(entry, part)))
    return _unique_ids(_without_repeats(found))


def fingerprint(parts: Iterable[Part], *, image_sizes: bool = True) -> str:
    """A hash of names and sizes: the same inputs give the same.

    Args:
        parts: The inputs.
        image_sizes: Whether the sizes of images in folders count, which takes a look at every file.
    """
    digest = hashlib.sha256()
    for part in parts:
        size = part.num_bytes if image_sizes or not isinstance(part, ImageFiles) else 0
        digest.update(f"{part!r} {size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


# From what was typed to places -------------------------------------------------------------------


def _expand(text: str) -> Iterator[tuple[Path, Location | str]]:
    for part in expand_lists(text):
        path = Path(part)
        if is_hub_set(part):
            yield Path(), part
        elif is_remote(part):
            yield from ((Path(), url) for url in expand_url(part))
        elif is_saved_set(path):
            yield from ((Path(), split) for split in _splits(path))
        elif path.exists():
            yield (path if path.is_dir() else path.parent), path
        elif glob.has_magic(part):
            yield from _expand_glob(part)
        else:
            raise DataError(f"{part}: there is no such file or folder")


def _splits(folder: Path) -> list[str]:
    splits = splits_of(folder)
    if len(splits) > 1:
        logger.warning("%s: all splits are read; name one of them: %s", folder, ", ".join(splits))
    return splits


def _expand_glob(pattern: str) -> Iterator[tuple[Path, Location | str]]:
    matches = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
    paths = [path for path in matches if path.suffix.lower() in _READ and not path.is_dir()]
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


def _family(found: tuple[Path, Location | str]) -> tuple[Path, bool]:
    """The folder that ids are relative to, and whether this is a single image, which others may join."""
    base, place = found
    is_image = isinstance(place, Path) and place.suffix.lower() in IMAGE_SUFFIXES
    return base, is_image and not place.is_dir()  # type: ignore[union-attr]


def _is_sidecar(place: Location) -> bool:
    return (
        isinstance(place, Path)
        and place.suffix.lower() in _SIDECARS
        and any(place.with_suffix(suffix).exists() for suffix in IMAGE_SUFFIXES)
    )


# Folders -----------------------------------------------------------------------------------------


def _walk(folder: Path, recursive: bool) -> Iterator[Path]:
    """Images and tar shards below a folder, in sorted order."""
    yield from (Path(top, name) for top, name in walk(folder, recursive))


def _kind(path: Path) -> tuple[bool, Path | None]:
    """Whether it is a tar; of an image: the table beside its folder."""
    is_tar = path.suffix.lower() == ".tar"
    return is_tar, None if is_tar else _table_of_folder(path.parent)


@lru_cache(maxsize=1)
def _table_of_folder(folder: Path) -> Path | None:
    return _table_beside(folder)


def _table_beside(place: Location) -> Path | None:
    """The Parquet that img2dataset writes for a shard: 00007.parquet for 00007.tar, or the folder 00007."""
    if isinstance(place, Url):
        return None
    table = place.with_name(f"{place.name.removesuffix('.tar')}.parquet") if place.name else place
    return table if table.is_file() else None


def _tables_in(folder: Path, recursive: bool) -> list[Path]:
    found = folder.rglob("*") if recursive else folder.glob("*")
    return sorted(path for path in found if path.suffix.lower() in _TABLES and _shown(path, folder))


def _shown(path: Path, folder: Path) -> bool:
    return not any(name.startswith(".") for name in path.relative_to(folder).parts)


def _shards_in(folder: Path) -> list[Path]:
    """The shards below a folder: no hidden files and folders, such as caches, and no tables beside tars.

    Those are indexes, as `vlv data filter`, `vlv data pack` and img2dataset write them.
    """
    found = (path for path in folder.rglob("*") if path.suffix.lower() in _STREAMED)
    shards = sorted(path for path in found if _shown(path, folder) and path.is_file())
    with_tars = {path.parent for path in shards if path.suffix.lower() == ".tar"}
    return [p for p in shards if p.suffix.lower() == ".tar" or p.parent not in with_tars]


def _shard(place: Location, columns: Columns) -> Part:
    return (TarShard if place.suffix.lower() == ".tar" else ParquetRows)(place, columns)


# From parts to records ---------------------------------------------------------------------------


def _split(part: Part, size: int) -> Iterator[Part]:
    """Parts of about `size` records, where it can be chosen."""
    if isinstance(part, ImageFiles) and part.table is None:
        for start in range(0, len(part.names), size):
            yield replace(part, names=part.names[start : start + size])
    elif isinstance(part, JsonLines | ParquetRows | HubRows):
        yield from part.split(size)
    else:
        yield part


def _sound(part: Part, detail: Detail, on_damage: OnDamage) -> Iterator[Record]:
    """The records of a part.

    Raises:
        DataError: It is damaged and damage is an error, or it holds no records.
    """
    left_out: list[BadRecord] = []
    count = 0
    for entry in part.entries(detail):
        if isinstance(entry, Record):
            count += 1
            yield entry
        elif entry.kind in (DAMAGED, DUPLICATE_KEY) and on_damage == "error":
            raise DataError(f"{entry.reason}; fetch or write it again")
        else:
            left_out.append(entry)
    damaged = [bad for bad in left_out if bad.kind in (DAMAGED, DUPLICATE_KEY)]
    for bad in damaged:
        logger.warning("%s; the complete records are kept", bad.reason)
    for bad in (bad for bad in left_out if bad.kind == REFUSED):
        logger.warning("%s; it is left out", bad.reason)
    missing = [bad for bad in left_out if bad.kind in (MISSING_IMAGE, NOT_DOWNLOADED)]
    if not count and not damaged:
        tables = not isinstance(part, TarShard)
        empty = "the file holds no records" if tables else "the tar holds no images"
        reasons = [bad.reason for bad in left_out if tables or bad.kind == REFUSED]
        raise DataError(reasons[0] if reasons else f"{part}: {empty}")
    if missing:
        names = ", ".join(bad.id for bad in missing[:5])
        why = "an image" if missing[0].kind == MISSING_IMAGE else "a downloaded image"
        logger.warning("%s: %d keys without %s are left out: %s", part, len(missing), why, names)


def _container(record: Record, part: Part) -> Location:
    """What tells equal ids of two inputs apart: the folder that was named, or the file."""
    if isinstance(record.source, Span):
        return record.source.path
    return Path(part.source) if isinstance(part.source, str) else part.source


def _without_repeats(
    found: Iterable[tuple[Record, Location]],
) -> Iterator[tuple[Record, Location]]:
    seen: set[ImagePlace] = set()
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
