"""Tar shards in the naming of webdataset (one key, several suffixes): listed by their headers, or read as a stream."""

from __future__ import annotations

import io
import logging
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from vlv.data.foreign import (
    MAX_TEXT_BYTES,
    decode_text,
    has_control,
    printable,
    read_up_to,
    unreadable,
)
from vlv.data.images import DEFAULT_LIMITS, IMAGE_SUFFIXES
from vlv.data.img2dataset import Downloads, compare_with_stats
from vlv.data.locations import Location, open_location, open_seekable
from vlv.data.parts import Detail, Part, image_of, record_of_texts
from vlv.data.records import DUPLICATE_KEY, MISSING_IMAGE, BadRecord, Entry, Held, Record, Span
from vlv.errors import DataError, ImageError

logger = logging.getLogger(__name__)

BLOCK = 512
_BUFFER_BYTES = 512 * BLOCK
_MAX_EMPTY_READS = 10
"""Past the end of a stream: tarfile skips a member of an absurd size buffer by buffer, for years."""
_TAR_ERRORS = (tarfile.TarError, RecursionError, MemoryError, OverflowError, ValueError)
"""What tarfile raises on damaged, or deliberately strange, headers."""


@dataclass(frozen=True)
class TarShard(Part):
    """A tar.

    Attributes:
        table: Parquet that img2dataset has put beside it; None where there is none.
    """

    source: Location
    table: Path | None = None

    def scan(self, detail: Detail) -> Iterator[Entry]:
        """Every key with an image; what is missing, cut off or there twice is named.

        Raises:
            DataError: The file cannot be read, or is no tar.
        """
        index = index_tar(self.source)
        downloads = Downloads(self.table if detail == "all" else None)
        num_images = 0
        with open_seekable(self.source) as file:
            for key, members in index.keys.items():
                image = image_of(members)
                if image is None:
                    reason = f"{self}: {key} has {', '.join(sorted(members))}, but no image"
                    yield BadRecord(key, str(self), reason, MISSING_IMAGE)
                    continue
                num_images += 1
                texts = self._texts(file, members, f"{self}/{key}") if detail != "images" else {}
                others = {
                    s: span for s, span in members.items() if s not in ("txt", "json", image[0])
                }
                extras = (others or None) if detail == "all" else None
                record = record_of_texts(key, image[1], texts, self.columns, extras)
                yield downloads.join(record, key)
        for name in index.repeated:
            reason = f"{self}: the member {name} occurs twice; the first counts"
            yield BadRecord(name, str(self), reason, DUPLICATE_KEY)
        if index.damage:
            yield self.damaged(f"{self}: {index.damage}")
        if detail == "all":
            yield from downloads.failures(str(self))
            yield from compare_with_stats(self, num_images)

    def _texts(
        self, file: BinaryIO, members: Mapping[str, Span], where: str
    ) -> dict[str, str | None]:
        texts: dict[str, str | None] = {}
        for suffix in ("json", self.columns.caption or "txt"):
            if suffix in members:
                file.seek(members[suffix].offset)
                data = read_up_to(file, min(members[suffix].size, MAX_TEXT_BYTES))
                texts[suffix] = _text(data, f"{where}.{suffix}")
        return texts

    def stream(self, start: int) -> Iterator[Entry]:
        """The samples; the members of a key lie side by side.

        Raises:
            DataError: As `stream_tar`.
        """
        suffixes = {"json", self.columns.caption or "txt"}
        for sample in islice(stream_tar(self.source, suffixes, start), start, None):
            try:
                yield self._record_of(sample)
            except DataError as error:
                yield BadRecord(f"{self}/{sample.key}", str(self), str(error))

    def _record_of(self, sample: Sample) -> Record:
        where = f"{self}/{sample.key}"
        image = image_of(sample.members)
        if image is None:
            raise DataError(f"{where}: the sample has no image")
        if image[1] is None:
            raise ImageError(f"{where}: larger than the limit of {DEFAULT_LIMITS.max_bytes} bytes")
        texts = {
            suffix: _text(data, f"{where}.{suffix}")
            for suffix, data in sample.members.items()
            if data is not None and f".{suffix}" not in IMAGE_SUFFIXES
        }
        return record_of_texts(where, Held(str(self), image[1]), texts, self.columns)


def _text(data: bytes, where: str) -> str | None:
    """The text of a member; without a readable one the image is taken all the same."""
    try:
        return decode_text(data, where).strip()
    except DataError as error:
        logger.warning("%s; its image is listed without it", error)
        return None


def split_name(name: str) -> tuple[str, str]:
    """The key ends at the first dot of the last part of the path."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, suffix = last.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _is_member(info: tarfile.TarInfo, key: str, suffix: str) -> bool:
    """Whether this is a file with content of its own and a usable name: no link, no folder, nothing sparse or hidden."""
    named = bool(key) and not key.endswith("/") and not has_control(suffix)
    return named and info.isfile() and not info.issparse()


# Listed ------------------------------------------------------------------------------------------


@dataclass
class TarIndex:
    """Where the members of a tar lie.

    Attributes:
        keys: Key to suffix (lower case, without its dot) to place, in the order of the file.
        repeated: Names of members that occur again; the first counts.
        cut: Names of members whose end is missing.
        damage: What is wrong with the file, in words; empty when it is sound.
    """

    keys: dict[str, dict[str, Span]] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    damage: str = ""

    def add(self, info: tarfile.TarInfo, path: Location, length: int) -> None:
        """Add a member of a file of so many bytes; links, hidden and sparse files are none."""
        name = printable(info.name)
        key, suffix = split_name(name)
        if not _is_member(info, key, suffix):
            return
        if info.size < 0 or info.offset_data + info.size > length:
            self.cut.append(name)
            return
        parts = self.keys.setdefault(key, {})
        if suffix in parts:
            self.repeated.append(name)
        else:
            parts[suffix] = Span(path, info.offset_data, info.size)


def index_tar(path: Location) -> TarIndex:
    """Find every complete member by one pass over the headers of a tar.

    Raises:
        DataError: The file cannot be read, or is no tar.
    """
    index = TarIndex()
    try:
        with open_seekable(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            length = file.seek(0, io.SEEK_END)
            try:
                for info in tar:  # what comes before the damage is kept
                    index.add(info, path, length)
                    if not info.issparse() and not 0 <= info.size <= length:
                        # tarfile would go back, and round for ever; or where no file can be read
                        raise tarfile.ReadError("a member has an absurd size")
                    tar.members.clear()  # type: ignore[attr-defined]  # or the list grows with the file
                file.seek(tar.offset)
                whole = file.read(BLOCK) == bytes(BLOCK) and not index.cut
            except _TAR_ERRORS:
                whole = False
    except _TAR_ERRORS as error:
        raise DataError(f"{printable(str(path))}: this is no tar file ({error})") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if not whole:
        count = sum(len(parts) for parts in index.keys.values())
        cut = f"; {', '.join(index.cut)} is cut off" if index.cut else ""
        index.damage = f"the tar is truncated or damaged after {count} members{cut}"
    return index


# Streamed ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One key of a tar, with its members in memory.

    Attributes:
        key: What its members are called before the first dot.
        members: Suffix to bytes, None where they are over the limit; empty for samples that are left out.
    """

    key: str
    members: dict[str, bytes | None]


def stream_tar(path: Location, suffixes: set[str], start: int = 0) -> Iterator[Sample]:
    """The samples of a tar one after the other, one of them in memory at a time; no seeking.

    Args:
        path: The file, URL or command.
        suffixes: Which members to keep beside the images.
        start: Samples at the beginning whose bytes are not kept; they are yielded nonetheless.

    Raises:
        DataError: The tar cannot be read, is truncated or damaged, or the members of a key do not lie side by side;
            what comes before that was yielded.
    """
    seen: set[str] = set()
    sample = Sample("", {})
    try:
        with open_location(path) as file:
            for key, suffix, member in _members(file):
                if key != sample.key:
                    if sample.key:
                        yield sample
                    if key in seen:
                        raise tarfile.ReadError(
                            f"the members of {key} do not lie side by side; sort the tar"
                        )
                    seen.add(key)
                    sample = Sample(key, {})
                if len(seen) > start:
                    _keep(sample, suffix, member, suffixes)
    except _TAR_ERRORS as error:
        raise DataError(
            f"{printable(str(path))}: the tar is damaged after {len(seen)} samples ({error})"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    if sample.key:
        yield sample


def _keep(sample: Sample, suffix: str, member: _Member, suffixes: set[str]) -> None:
    """Read a member that is an image, or one of the suffixes."""
    is_image = f".{suffix}" in IMAGE_SUFFIXES
    if (is_image or suffix in suffixes) and suffix not in sample.members:  # the first counts
        limit = DEFAULT_LIMITS.max_bytes if is_image else MAX_TEXT_BYTES
        sample.members[suffix] = member.content.read() if member.size <= limit else None


@dataclass(frozen=True, slots=True)
class _Member:
    size: int
    content: Any


def _members(file: BinaryIO) -> Iterator[tuple[str, str, _Member]]:
    """Key, suffix and content of each member; the content must be read before the next one."""
    watched: Any = _Watched(file)
    with tarfile.open(fileobj=watched, mode="r|", bufsize=_BUFFER_BYTES) as tar:
        for info in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # or the list grows with the file
            key, suffix = split_name(printable(info.name))
            if _is_member(info, key, suffix):
                yield key, suffix, _Member(info.size, tar.extractfile(info))
        if not watched.ended_well:
            raise tarfile.ReadError("it is truncated")


class _Watched:
    """A file that remembers whether its last block was one of zeros, as in every whole tar."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.ended_well = False
        self._empty_reads = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        if data:
            self.ended_well = data[-BLOCK:] == bytes(BLOCK)
        else:
            self._empty_reads += 1
        if self._empty_reads > _MAX_EMPTY_READS:
            raise tarfile.ReadError("it is truncated")
        return data
