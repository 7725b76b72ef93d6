"""The folders in which what was computed of shards lies: their places, files, manifests, and what is refused.

A part belongs to one shard, or to all single images. It has an array for every name, `hashes.npy` and `manifest.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vlv.errors import CacheError, DataError
from vlv.training.checkpoint import sync, write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlv.data.records import Record

BESIDE = "beside"
"""For the folder of a cache: what is computed of a shard lies in `.vlv-latents` or `.vlv-features` beside it."""

_MANIFEST = "manifest.json"
FORMAT = 4
LOOSE = "images"


def parts_of(records: Sequence[Record]) -> dict[str | None, list[int]]:
    """The places of the records of each shard, and (None) of all single images together."""
    parts: dict[str | None, list[int]] = {}
    for place, record in enumerate(records):
        parts.setdefault(file_of(record), []).append(place)
    return parts


def part_folders(where: str | Path, kind: str, files: Iterable[str | None]) -> dict[Any, Path]:
    """The folder of each part, see `part_folder`.

    Raises:
        CacheError: Two shards have the same name, and with it the same folder.
    """
    owners: dict[Path, str | None] = {}
    for file in files:
        folder = part_folder(where, kind, file)
        if owners.setdefault(folder, file) != file:
            raise CacheError(
                f"{owners[folder]} and {file} have the same name, so their {kind} cannot share a folder; rename one, "
                "or keep the caches beside the shards"
            )
    return {file: folder for folder, file in owners.items()}


def part_folder(where: str | Path, kind: str, file: str | None) -> Path:
    """The folder of what was computed of one shard, or (file None) of single images.

    Raises:
        CacheError: It is to lie beside what is no file on this machine.
    """
    if where != BESIDE:
        return Path(where) / (LOOSE if file is None else _last_of(file))
    if file is None or not Path(file).is_file():
        raise CacheError(
            f"the {kind} of {file or 'single images'} cannot lie beside a shard on this machine; name a folder for them"
        )
    return Path(file).parent / f".vlv-{kind}" / _last_of(file)


def file_of(record: Record) -> str | None:
    """The shard that holds an image; None for one that is a file of its own."""
    return None if isinstance(record.source, Path) else str(record.source.path)


def _last_of(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def hash_of(image: bytes) -> bytes:
    """What finds an image of a stream in a cache: the SHA-256 of its file, 32 bytes."""
    return hashlib.sha256(image).digest()


class _Hashed:
    """A source of image bytes that keeps the hash of what it gave."""

    def __init__(self, source: Any) -> None:
        self._source, self.path = source, source.path
        self.hash = bytes(32)

    def __str__(self) -> str:
        return str(self._source)

    def read(self) -> bytes:
        data: bytes = self._source.read()
        self.hash = hash_of(data)
        return data


def hashed(record: Record) -> Record:
    """The record of a shard so that `write_hashes` knows the hash of its image once it was read."""
    if isinstance(record.source, Path):
        return record
    return replace(record, source=cast("Any", _Hashed(record.source)))


def write_hashes(folder: Path, records: Sequence[Record]) -> None:
    """The hash of each image of a shard, (N, 32); zeros where it could not be read, none for single images."""
    sources = (record.source for record in records)
    hashes = [source.hash for source in sources if isinstance(source, _Hashed)]
    np.save(folder / "hashes.npy", np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32))
    sync(folder / "hashes.npy")


def open_part(folder: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The arrays of a part, memory-mapped.

    Raises:
        DataError: One of them cannot be read.
    """
    try:
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"the cache in {folder} cannot be read ({error}); delete the folder"
        ) from error


def ids_hash(records: Sequence[Record]) -> str:
    """A hash of the ids in their order, as they are where the shard is listed alone."""
    ids = (record.id.removeprefix(f"{file_of(record)}/") for record in records)
    return hashlib.sha256("".join(f"{name}\0" for name in ids).encode()).hexdigest()


def files_of(records: Sequence[Record]) -> list[Path]:
    """The files on this machine that hold the images, each once."""
    sources = (record.source for record in records)
    paths = (source if isinstance(source, Path) else source.path for source in sources)
    return [path for path in dict.fromkeys(paths) if isinstance(path, Path) and path.is_file()]


def stamp(records: Sequence[Record]) -> str:
    """Sizes and times of the files: where they are the same, so is the content."""
    digest = hashlib.sha256()
    for path in files_of(records):
        about = path.stat()
        digest.update(f"{about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def content_hash(records: Sequence[Record]) -> str:
    """A hash of the files that hold the images; what is remote has no part in it."""
    digest = hashlib.sha256()
    for path in files_of(records):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write_manifest(folder: Path, identity: dict[str, Any], records: Sequence[Record]) -> None:
    """Say that a part is complete, and what it was made of."""
    paths = files_of(records)
    num_bytes = sum(path.stat().st_size for path in paths) if paths else None
    write_json(
        folder / _MANIFEST, identity | {"content": content_hash(records), "bytes": num_bytes}
    )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a part was made of; None where it is not complete.

    Raises:
        CacheError: The manifest is damaged.
    """
    if not (folder / _MANIFEST).exists():
        return None
    try:
        found: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
    except ValueError as error:
        raise CacheError(f"{folder / _MANIFEST} is damaged ({error}); delete the folder") from error
    return found


def refuse_difference(
    kind: str, folder: Path, found: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """Raise CacheError unless a part was made of what is wanted."""
    for key, value in wanted.items():
        if found.get(key) != value:
            raise CacheError(
                f"the cache in {folder} was made with {key} {found.get(key)}, this run has {value}; "
                f"delete the folder or name another, and run vlv data cache-{kind}"
            )
