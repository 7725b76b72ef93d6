"""The folder that workers share: on a disk that all of them mount, or in an object store by its URL."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlv.errors import OutputError
from vlv.storage import as_output_error, create, remove_temporaries, replacing

if TYPE_CHECKING:
    from collections.abc import Iterator


class SharedFolder(Protocol):
    """Files by name, with ``/`` between folders. Whatever the disk or the store refuses is an OutputError."""

    def names(self, below: str = "") -> list[str]:
        """Names of the files in a folder, hidden ones and folders left out."""

    def read(self, name: str) -> bytes | None:
        """Content of a file; None where there is none."""

    def exists(self, name: str) -> bool:
        """Whether a file is there."""

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists; whether it was written.

        A store without exclusive creation may tell two callers so: what is there afterwards counts.
        """

    def write(self, name: str, data: bytes) -> None:
        """Write a small file anew, not necessarily at once."""

    def put(self, name: str, path: Path) -> None:
        """Copy a file of this machine, whole or not at all."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def tidy(self) -> None:
        """Remove what killed workers left half written."""


def is_remote(output: str) -> bool:
    """Whether an output is the URL of a folder in an object store."""
    return "://" in output


def open_folder(output: str) -> SharedFolder:
    """The folder of an output, made if missing.

    Raises:
        OutputError: It cannot be made, or there is no package for its protocol.
    """
    return RemoteFolder(output) if is_remote(output) else LocalFolder(Path(output))


class LocalFolder:
    """A folder of a disk, which other machines may mount too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with as_output_error(path):
            path.mkdir(parents=True, exist_ok=True)

    def names(self, below: str = "") -> list[str]:
        """See `SharedFolder`."""
        folder = self.path / below
        with as_output_error(folder), contextlib.suppress(FileNotFoundError):
            entries = [entry.name for entry in os.scandir(folder) if entry.is_file()]
            return [name for name in entries if not name.startswith(".")]
        return []

    def read(self, name: str) -> bytes | None:
        """See `SharedFolder`."""
        with as_output_error(self.path / name), contextlib.suppress(FileNotFoundError):
            return (self.path / name).read_bytes()
        return None

    def exists(self, name: str) -> bool:
        """See `SharedFolder`."""
        return (self.path / name).exists()

    def create(self, name: str, data: bytes) -> bool:
        """See `SharedFolder`."""
        return create(self.path / name, data)

    def write(self, name: str, data: bytes) -> None:
        """See `SharedFolder`; in place, as other machines may know the file, but not yet another of its name."""
        with as_output_error(self.path / name):
            (self.path / name).write_bytes(data)

    def put(self, name: str, path: Path) -> None:
        """See `SharedFolder`."""
        with replacing(self.path / name) as temporary:
            shutil.copyfile(path, temporary)

    def remove(self, name: str) -> None:
        """See `SharedFolder`."""
        with as_output_error(self.path / name):
            (self.path / name).unlink(missing_ok=True)

    def tidy(self) -> None:
        """See `SharedFolder`."""
        remove_temporaries(self.path)


class RemoteFolder:
    """A folder of an object store, through fsspec; uploads show when they are whole."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        with self._as_output_error():
            try:
                import fsspec
            except ImportError as error:
                raise OutputError(f"{url}: URLs need fsspec; pip install 'vlv[data]'") from error
            self._system: Any
            self._system, self._root = fsspec.core.url_to_fs(self._url)
            self._system.makedirs(self._root, exist_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _as_output_error(self) -> Iterator[None]:
        try:
            yield
        except (OutputError, FileNotFoundError, FileExistsError):
            raise
        except ImportError as error:
            raise OutputError(
                f"{self._url}: fsspec needs another package for it ({error})"
            ) from error
        except Exception as error:  # every protocol has errors of its own
            reason = str(error) or type(error).__name__
            raise OutputError(f"{self._url} cannot be used ({reason})") from error

    def names(self, below: str = "") -> list[str]:
        """See `SharedFolder`."""
        with self._as_output_error(), contextlib.suppress(FileNotFoundError):
            self._system.invalidate_cache()
            found = self._system.ls(self._path(below), detail=True)
            names = [x["name"].rpartition("/")[2] for x in found if x["type"] == "file"]
            return [name for name in names if name and not name.startswith(".")]
        return []

    def read(self, name: str) -> bytes | None:
        """See `SharedFolder`."""
        with self._as_output_error(), contextlib.suppress(FileNotFoundError):
            data: bytes = self._system.cat_file(self._path(name))
            return data
        return None

    def exists(self, name: str) -> bool:
        """See `SharedFolder`."""
        with self._as_output_error():
            self._system.invalidate_cache()
            return bool(self._system.exists(self._path(name)))

    def create(self, name: str, data: bytes) -> bool:
        """See `SharedFolder`."""
        with self._as_output_error():
            try:
                self._system.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
            return True

    def write(self, name: str, data: bytes) -> None:
        """See `SharedFolder`."""
        with self._as_output_error():
            self._system.pipe_file(self._path(name), data)

    def put(self, name: str, path: Path) -> None:
        """See `SharedFolder`."""
        with self._as_output_error():
            self._system.put_file(str(path), self._path(name))

    def remove(self, name: str) -> None:
        """See `SharedFolder`."""
        with self._as_output_error(), contextlib.suppress(FileNotFoundError):
            self._system.rm_file(self._path(name))

    def tidy(self) -> None:
        """See `SharedFolder`; a store keeps no half uploads under a name."""
