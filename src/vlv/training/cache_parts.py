"""One part of a cache on the disk: the arrays computed of a shard, or of all single images.

Its folder has a float16 array for every name, `hashes.npy` (of a shard: the SHA-256 of each image), and
`manifest.json`, which says what the part was made of and is written last. Until then `progress.json` says how far it is.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from vlv.data.loader import LoaderSettings, OnBad, epoch_batches
from vlv.errors import CacheError, DataError, OutputError
from vlv.progress import Progress
from vlv.storage import (
    Json,
    check_settings,
    new_array,
    plain,
    read_settings,
    replacing,
    sync,
    write_json,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlv.data.records import Record
    from vlv.training.caches import Cache

File = TypeVar("File", str, str | None)

BESIDE = "beside"
"""For the folder of a cache: the part of a shard lies in `.vlv-latents` or `.vlv-features` beside it."""

SAVE_SECONDS = 60.0
"""How much work an interruption may cost."""

FORMAT = 4
_SINGLE_IMAGES = "images"


# Where parts lie ---------------------------------------------------------------------------------


def parts_of(records: Sequence[Record]) -> dict[str | None, list[int]]:
    """The places of the records of each shard, and (None) of all single images together."""
    parts: dict[str | None, list[int]] = {}
    for place, record in enumerate(records):
        parts.setdefault(_shard_of(record), []).append(place)
    return parts


def part_folders(where: str | Path, kind: str, files: Iterable[File]) -> dict[File, Path]:
    """The folder of the part of each shard, and (None) of single images.

    Raises:
        CacheError: Two shards have the same name, and with it the same folder; or one is to lie beside what is no file
            on this machine.
    """
    owners: dict[Path, File] = {}
    for file in files:
        folder = _part_folder(where, kind, file)
        if owners.setdefault(folder, file) != file:
            raise CacheError(
                f"{owners[folder]} and {file} have the same name, so their {kind} cannot share a folder; rename one, "
                "or keep the caches beside the shards"
            )
    return {file: folder for folder, file in owners.items()}


def _part_folder(where: str | Path, kind: str, file: str | None) -> Path:
    name = _SINGLE_IMAGES if file is None else file.rstrip("/").rpartition("/")[2]
    if where != BESIDE:
        return Path(where) / name
    if file is None or not Path(file).is_file():
        raise CacheError(
            f"the {kind} of {file or 'single images'} cannot lie beside a shard on this machine; name a folder for them"
        )
    return Path(file).parent / f".vlv-{kind}" / name


def _shard_of(record: Record) -> str | None:
    """The shard that holds an image; None for one that is a file of its own."""
    return None if isinstance(record.source, Path) else str(record.source.path)


# Made or opened ----------------------------------------------------------------------------------


def fill_part(
    cache: Cache,
    records: Sequence[Record],
    folder: Path,
    settings: LoaderSettings,
    on_bad: OnBad | None = None,
) -> dict[str, NDArray[np.float16]]:
    """Compute the arrays of all records of a part, or open them where they were computed before; see `fill_cache`."""
    made_of = {
        **cache.made_with(settings),
        "records": _ids_hash(records),
        "num_records": len(records),
        "files": _stamp(records),
    }
    if _is_filled(cache, folder, made_of, records):
        return open_part(folder, cache.names)
    folder.mkdir(parents=True, exist_ok=True)
    growing = _GrowingPart(folder, cache.names, made_of, records)
    places = growing.places()
    images = epoch_batches([growing.records[place] for place in places], settings, on_bad=on_bad)
    done = len(records) - len(places)
    with Progress(len(records), done=done, what=folder.name) as progress:
        for batch in images:
            computed = [value.float().cpu().numpy() for value in cache.compute(batch["pixels"])]
            growing.put(places[batch["index"].numpy()], computed)
            progress.advance(len(batch["index"]))
    if not growing.arrays:
        raise DataError(f"none of {len(records)} images for {folder} can be read")
    growing.save()
    paths = _files_of(records)
    num_bytes = sum(path.stat().st_size for path in paths) if paths else None
    about = made_of | {"content": _content_hash(records), "bytes": num_bytes}
    write_json(folder / "manifest.json", about)
    growing.progress.unlink(missing_ok=True)
    return open_part(folder, cache.names)


def open_part(folder: Path, names: Sequence[str]) -> dict[str, NDArray[np.float16]]:
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


def read_manifest(folder: Path) -> Json | None:
    """What a part was made of; None where it is not complete.

    Raises:
        CacheError: The manifest is damaged.
    """
    try:
        return read_settings(folder / "manifest.json", mend="delete the folder")
    except OutputError as error:
        raise CacheError(str(error)) from error


def check_part(cache: Cache, folder: Path, found: Json, wanted: dict[str, object]) -> None:
    """Raise CacheError unless a part was made of what is wanted."""
    check_settings(
        f"the cache in {folder}",
        {key: found.get(key) for key in wanted},
        wanted,
        mend=f"delete the folder or name another, and run vlv data cache-{cache.kind}",
        error=CacheError,
    )


def _is_filled(
    cache: Cache, folder: Path, wanted: dict[str, object], records: Sequence[Record]
) -> bool:
    found = read_manifest(folder)
    if found is None:
        return False
    expected = {key: value for key, value in wanted.items() if key != "files"}
    if found.get("files") != wanted["files"] and found.get("content") is not None:
        expected["content"] = _content_hash(
            records
        )  # files were touched or copied; perhaps no more
    check_part(cache, folder, found, expected)
    return True


class _GrowingPart:
    """The arrays of a part while they are computed; an interrupted computation of the very same goes on.

    Attributes:
        records: The same, which keep the hash of an image of a shard once it was read.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        made_of: dict[str, object],
        records: Sequence[Record],
    ) -> None:
        self.records = [_with_hash(record) for record in records]
        self.files = [folder / f"{name}.npy" for name in names]
        self.progress, self._hash_file = folder / "progress.json", folder / "hashes.npy"
        self.arrays: list[np.memmap[Any, np.dtype[np.float16]]] = []
        in_shard = any(_shard_of(record) is not None for record in records)
        self._hashes = np.zeros((len(records) if in_shard else 0, 32), np.uint8)
        self._made_of, self._done = plain(made_of), 0
        self._saved = time.monotonic()
        self._go_on()

    def _go_on(self) -> None:
        """Take over what an interrupted computation has saved."""
        try:
            found = read_settings(self.progress) or {}
            arrays = [np.load(file, mmap_mode="r+") for file in self.files]
            hashes = np.load(self._hash_file)
        except (OutputError, OSError, EOFError, ValueError):
            return
        if {key: found.get(key) for key in self._made_of} == self._made_of:
            self.arrays, self._hashes, self._done = arrays, hashes, found["done"]

    def places(self) -> NDArray[np.int64]:
        """The records that are still to be computed; those that could not be read are tried and reported again."""
        rest = np.arange(self._done, len(self.records))
        if not self.arrays:
            return rest
        done = self.arrays[0][: self._done].reshape(self._done, -1)
        return np.concatenate([np.flatnonzero(np.isnan(done[:, 0])), rest])

    def put(self, rows: NDArray[np.int64], values: Sequence[NDArray[np.float32]]) -> None:
        """Set some rows of each array, and save now and then; the arrays are made with the first ones."""
        if not self.arrays:
            self.progress.unlink(missing_ok=True)  # it tells of other arrays
            pairs = zip(self.files, values, strict=True)
            self.arrays = [_create(*pair, len(self.records)) for pair in pairs]
        for array, value in zip(self.arrays, values, strict=True):
            array[rows] = value
        self._done = max(self._done, int(rows[-1]) + 1)
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()
            write_json(self.progress, self._made_of | {"done": self._done})
            self._saved = time.monotonic()

    def save(self) -> None:
        """Force the arrays to the disk, with the hashes of all images that were read."""
        for row, record in enumerate(self.records):
            if isinstance(record.source, _Hashing) and record.source.hash:
                self._hashes[row] = np.frombuffer(record.source.hash, np.uint8)
        for array, file in zip(self.arrays, self.files, strict=True):
            array.flush()
            sync(file)
        with replacing(self._hash_file) as temporary, temporary.open("wb") as hashes:
            np.save(hashes, self._hashes)


def _create(
    file: Path, example: NDArray[np.float32], count: int
) -> np.memmap[Any, np.dtype[np.float16]]:
    array = new_array(file, np.float16, (count, *example.shape[1:]))
    array[:] = np.nan
    return array


# What a part is made of --------------------------------------------------------------------------


def image_hash(image: bytes) -> bytes:
    """What finds an image of a stream in a cache: the SHA-256 of its file, 32 bytes."""
    return hashlib.sha256(image).digest()


class _Hashing:
    """A source of image bytes that keeps the hash of what it gave."""

    def __init__(self, source: Any) -> None:
        self._source, self.path, self.raw_pixels = source, source.path, source.raw_pixels
        self.hash = b""

    def __str__(self) -> str:
        return str(self._source)

    def read(self) -> bytes:
        data: bytes = self._source.read()
        self.hash = image_hash(data)
        return data


def _with_hash(record: Record) -> Record:
    if isinstance(record.source, Path):
        return record
    return replace(record, source=cast("Any", _Hashing(record.source)))


def _ids_hash(records: Sequence[Record]) -> str:
    """A hash of the ids in their order, as they are where the shard is listed alone."""
    ids = (record.id.removeprefix(f"{_shard_of(record)}/") for record in records)
    return hashlib.sha256("".join(f"{name}\0" for name in ids).encode()).hexdigest()


def _files_of(records: Sequence[Record]) -> list[Path]:
    """The files on this machine that hold the images, each once."""
    sources = (record.source for record in records)
    paths = (source if isinstance(source, Path) else source.path for source in sources)
    return [path for path in dict.fromkeys(paths) if isinstance(path, Path) and path.is_file()]


def _stamp(records: Sequence[Record]) -> str:
    """Sizes and times of the files: where they are the same, so is the content."""
    digest = hashlib.sha256()
    for path in _files_of(records):
        about = path.stat()
        digest.update(f"{about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _content_hash(records: Sequence[Record]) -> str:
    """A hash of the files that hold the images; what is remote has no part in it."""
    digest = hashlib.sha256()
    for path in _files_of(records):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
