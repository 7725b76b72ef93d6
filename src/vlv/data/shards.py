"""Tar shards in the naming of webdataset (one key, several suffixes), written so that only whole ones ever show."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from vlv.data.tars import split_name
from vlv.errors import OutputError
from vlv.storage import TEMPORARY_SUFFIX, sync


def shard_path(folder: str | os.PathLike[str], index: int, prefix: str = "shard") -> Path:
    """The final name of shard number `index`."""
    return Path(folder) / f"{prefix}-{index:05d}.tar"


class TarShardWriter:
    """Write records into numbered tar shards; only complete shards ever bear their final name.

    A shard grows under a hidden temporary name; when it is full, or the writer is closed, it is
    flushed to the disk and renamed. Leaving the `with` block by an exception discards the
    unfinished shard. The same records give the same bytes. Several processes may write into one
    folder, each its own shard numbers.

    Args:
        folder: Created when absent.
        prefix: First part of the shard names.
        per_shard: Records in a full shard.
        index: Number of the first shard that is written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        prefix: str = "shard",
        per_shard: int = 1000,
        *,
        index: int = 0,
    ) -> None:
        if per_shard < 1:
            raise ValueError(f"per_shard must be at least 1, not {per_shard}")
        self.folder = Path(folder)
        self.prefix = prefix
        self.per_shard = per_shard
        self.index = index
        self._keys: set[str] = set()
        self._open: tuple[BinaryIO, tarfile.TarFile] | None = None

    @property
    def path(self) -> Path:
        """The final name of the shard that is being written, or comes next."""
        return shard_path(self.folder, self.index, self.prefix)

    def write(self, key: str, parts: Mapping[str, bytes | str | Mapping[str, object]]) -> None:
        """Append one record: suffix to content, as in `{"png": bytes, "txt": str, "json": dict}`.

        Raises:
            OutputError: The key cannot be used, the shard exists already, or the disk refuses.
        """
        if not key or split_name(key) != (key, "") or key[-1] == "/" or key in self._keys:
            raise OutputError(f"'{key}' is no key for {self.path}: it must be new and have no dot")
        encoded = {suffix: _encode(part) for suffix, part in parts.items()}
        try:
            self._append(key, encoded)
            if len(self._keys) >= self.per_shard:
                self._finish()
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Complete the shard that is being written, if there is one.

        Raises:
            OutputError: The disk refuses.
        """
        try:
            self._finish()
        except OSError as error:
            raise self._failed(error) from error

    def discard(self) -> None:
        """Remove the unfinished shard, if there is one."""
        if self._open is not None:
            file, _ = self._open
            self._open = None
            try:
                file.close()
            finally:
                self._temporary.unlink(missing_ok=True)
        self._keys.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    @property
    def _temporary(self) -> Path:
        return self.path.with_name(f".{self.path.name}{TEMPORARY_SUFFIX}")

    def _append(self, key: str, parts: Mapping[str, bytes]) -> None:
        if self._open is None:
            self._open = self._begin()
        _, tar = self._open
        for suffix, data in parts.items():
            info = tarfile.TarInfo(f"{key}.{suffix}")  # time and owner stay 0: the same bytes
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        self._keys.add(key)

    def _begin(self) -> tuple[BinaryIO, tarfile.TarFile]:
        if self.path.exists():
            raise OutputError(f"{self.path} exists already; remove it or start at another index")
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._temporary.open("wb")
        return file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT)

    def _finish(self) -> None:
        if self._open is None:
            return
        file, tar = self._open
        tar.close()
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._temporary.replace(self.path)
        sync(self.folder)
        self._open = None
        self._keys.clear()
        self.index += 1

    def _failed(self, error: OSError) -> OutputError:
        message = f"{self.path}: cannot be written ({error.strerror or error})"
        self.discard()
        return OutputError(message)


def _encode(part: bytes | str | Mapping[str, object]) -> bytes:
    if isinstance(part, bytes):
        return part
    if isinstance(part, str):
        return part.encode()
    return json.dumps(part, ensure_ascii=False, separators=(",", ":")).encode()
