"""Tar shards read from the beginning to the end, without seeking: local, by URL, or from a command."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from vlv.data.locations import Location
from vlv.data.shards import BLOCK, split_name
from vlv.errors import DataError

_BUFFER_BYTES = 512 * BLOCK


@dataclass(frozen=True)
class Sample:
    """One key of a tar, with its members in memory.

    Attributes:
        key: What its members are called before the first dot.
        parts: Suffix to bytes; empty for samples that are left out.
    """

    key: str
    parts: dict[str, bytes]


def stream_tar(path: Location, start: int = 0) -> Iterator[Sample]:
    """The samples of a tar one after the other, one of them in memory at a time.

    Args:
        path: The file.
        start: Samples at the beginning whose bytes are not kept; they are yielded nonetheless.

    Raises:
        DataError: The tar cannot be read, is truncated or damaged, or the members of a key do not lie side by side;
            what comes before that was yielded.
    """
    seen: set[str] = set()
    sample = Sample("", {})
    try:
        with path.open("rb") as file:
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
                    sample.parts[suffix] = member.read()
    except tarfile.TarError as error:
        raise DataError(
            f"{path}: the tar is damaged after {len(seen)} samples ({error})"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if sample.key:
        yield sample


def _members(file: BinaryIO) -> Iterator[tuple[str, str, BinaryIO]]:
    """Key, suffix and content of each member; the content must be read before the next one."""
    watched: Any = _Watched(file)
    with tarfile.open(fileobj=watched, mode="r|", bufsize=_BUFFER_BYTES) as tar:
        for info in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # or the list grows with the file
            key, suffix = split_name(info.name)
            content = tar.extractfile(info)
            if content is not None and key and not key.endswith("/"):
                yield key, suffix, content  # type: ignore[misc]
        if not watched.ended_well:
            raise tarfile.ReadError("it is truncated")


class _Watched:
    """A file that remembers whether its last block was one of zeros, as in every whole tar."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.ended_well = False

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        if data:
            self.ended_well = data[-BLOCK:] == bytes(BLOCK)
        return data
