"""A key-value store in one SQLite file that survives a killed process."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from vlv.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class KeyedStore:
    """Texts by key in one SQLite file, of constant memory however many there are.

    Every `put` is a transaction of its own in a write-ahead log: a killed process loses none, a machine
    that loses power perhaps the last few. One process at a time may hold the file; its threads share it.

    Raises:
        OutputError: The file cannot be written, is no store, or another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        with self._named():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(
                path, timeout=1.0, isolation_level=None, check_same_thread=False
            )
        try:
            with self._named():
                self._take()
        except OutputError:
            self.close()  # or the lock would last until the object is collected
            raise

    def _take(self) -> None:
        """Make the file this process's own."""
        self._base.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._base.execute("PRAGMA journal_mode=WAL")
        self._base.execute("PRAGMA synchronous=NORMAL")
        self._base.execute(
            "CREATE TABLE IF NOT EXISTS items (key BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID"
        )
        # takes the lock now, and shows whether there is room for a byte
        self._base.execute("INSERT OR REPLACE INTO items VALUES (x'00', '')")
        self._base.execute("DELETE FROM items WHERE key = x'00'")

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise OutputError(
                    f"another process works with {self.path}; let only one run at a time"
                ) from error
            raise OutputError(f"{self.path} cannot be written: {error}") from error
        except sqlite3.DatabaseError as error:
            raise OutputError(f"{self.path} is damaged, or no file of vlv ({error})") from error
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}") from error

    def get(self, key: bytes) -> str | None:
        """The text of a key; None when it has none."""
        with self._named():
            row = self._base.execute("SELECT value FROM items WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: bytes, value: str) -> None:
        """Write the text of a key; an older one is replaced.

        Raises:
            OutputError: The disk is full, or the file cannot be written.
        """
        with self._named():
            self._base.execute("INSERT OR REPLACE INTO items VALUES (?, ?)", (key, value))

    def clear(self) -> None:
        """Forget all keys."""
        with self._named():
            self._base.execute("DELETE FROM items")

    def __len__(self) -> int:
        with self._named():
            return int(self._base.execute("SELECT count(*) FROM items").fetchone()[0])

    def total(self, field: str) -> float:
        """Sum of a number over all texts, which are JSON objects."""
        with self._named():
            query = "SELECT total(json_extract(value, ?)) FROM items"
            return float(self._base.execute(query, (f"$.{field}",)).fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self._base.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *rest: object) -> None:
        self.close()
