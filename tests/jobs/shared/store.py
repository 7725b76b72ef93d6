"""An object store in a folder, for fsspec: flat keys, whole objects, no renames, exclusive creation where it has it.

Every object is a file of its own whose name is the quoted key, so that many processes can use it, as they use a real one.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec
from fsspec import AbstractFileSystem

ROOT = "VLV_TEST_STORE"
"""Environment variable with the folder."""


class Store(AbstractFileSystem):  # type: ignore[misc]
    """Reached as ``bucket://NAME/KEY``."""

    protocol = "bucket"
    exclusive = True
    cachable = False

    @property
    def _root(self) -> Path:
        return Path(os.environ[ROOT])

    def _file(self, path: str) -> Path:
        return self._root / quote(self._strip_protocol(path), safe="")

    def _keys(self) -> Iterator[str]:
        return (unquote(x.name) for x in self._root.iterdir() if not x.name.startswith("."))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """A store has no folders."""

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        prefix = self._strip_protocol(path).rstrip("/") + "/"
        found: dict[str, dict[str, Any]] = {}
        for key in self._keys():
            if key.startswith(prefix):
                name, _, below = key.removeprefix(prefix).partition("/")
                kind = "directory" if below else "file"
                found[name] = {"name": prefix + name, "type": kind, "size": 0}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def exists(self, path: str, **options: Any) -> bool:
        return self._file(path).exists()

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        return self._file(path).read_bytes()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        temporary = self._root / f".{secrets.token_hex(8)}"
        temporary.write_bytes(value)
        if mode == "create" and self.exclusive:
            try:
                self._file(path).hardlink_to(temporary)
            finally:
                temporary.unlink()
        elif mode == "create" and self.exists(path):
            temporary.unlink()
            raise FileExistsError(path)
        else:
            temporary.replace(self._file(path))

    def put_file(self, lpath: str, rpath: str, callback: Any = None, **options: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def rm_file(self, path: str) -> None:
        self._file(path).unlink()


class PlainStore(Store):
    """A store that cannot create exclusively: looking and writing are two steps."""

    protocol = "plain"
    exclusive = False


def register() -> None:
    for store in (Store, PlainStore):
        fsspec.register_implementation(store.protocol, store, clobber=True)
