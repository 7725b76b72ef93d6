"""Where the captions of a folder are kept, to be read and edited: text files beside the images, or a table."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vlv.data.foreign import decode_text, printable, read_at_most, read_file
from vlv.data.images import read_header
from vlv.errors import DataError, OutputError
from vlv.jobs.caption import key
from vlv.jobs.caption_settings import COLUMNS, CaptionSettings
from vlv.jobs.inputs import file_stat
from vlv.jobs.sidecars import Sidecars, Text
from vlv.jobs.table import GrowingTable
from vlv.storage import read_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vlv.data.records import Record
    from vlv.jobs.formats import Row

EDITED = "edited"
"""`finish_reason` of a caption that a person wrote."""
MAX_CAPTION_BYTES = 100_000


class Store(Protocol):
    """Captions of images, by record."""

    def read(self, record: Record) -> str | None:
        """The caption; None where there is none.

        Raises:
            DataError: It cannot be read.
        """

    def write(self, record: Record, caption: str, old: str | None) -> None:
        """Replace a caption, on disk when this returns.

        Args:
            record: Whose.
            caption: The new one.
            old: What was there when it was read.

        Raises:
            OutputError: Something else is there by now, or the disk refuses.
        """

    def close(self) -> None:
        """Let go of files; the next call opens them again."""


class TextFiles:
    """Text files beside the images, as `vlv caption --sidecar` writes them; each line is a caption.

    Args:
        sharing: The images that would share the text file of one, that one among them.
        suffix: Of the text files.

    Raises:
        OutputError: It is no suffix of captions.
    """

    def __init__(self, sharing: Callable[[Record], Sequence[Record]], suffix: str) -> None:
        self._sharing = sharing
        self._suffix = suffix
        self._sidecars = Sidecars([], suffix, "overwrite")

    def read(self, record: Record) -> str | None:
        """All lines."""
        path = self._sidecars.path(record)
        try:
            text = decode_text(read_file(path, MAX_CAPTION_BYTES), printable(path))
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        return text.strip() or None

    def write(self, record: Record, caption: str, old: str | None) -> None:
        """One line for each that is not empty; without any the file is removed, so that the image counts as without caption."""
        path = self._sidecars.path(record)
        sidecars = Sidecars(self._sharing(record), self._suffix, "overwrite")
        if why := sidecars.collisions.get(record.id):
            raise OutputError(why)
        if self.read(record) != old:
            raise OutputError(
                f"{printable(path)} was changed by somebody else; read the folder again before you save"
            )
        if lines := [line for line in caption.split("\n") if line.strip()]:
            sidecars.write([Text(record, lines)])
        else:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Nothing is open."""


class Table:
    """A table of `vlv caption`, whose rows are replaced one by one.

    Args:
        path: A ``.jsonl`` file.
        settings: Of the captions that will be written, for a table that does not exist yet.

    Raises:
        OutputError: It is no such table.
    """

    def __init__(self, path: Path, settings: CaptionSettings) -> None:
        if path.suffix != ".jsonl":
            raise OutputError(
                f"{path} must end in .jsonl; other tables cannot be edited row by row"
            )
        self.path, self._settings = path, settings
        self._table: GrowingTable | None = None
        self._changed = False
        self._lock = threading.RLock()
        self._open()

    def read(self, record: Record) -> str | None:
        """The caption of its row."""
        with self._lock:
            row = self._open().get(key(record))
        return None if row is None else str(row["caption"])

    def write(self, record: Record, caption: str, old: str | None) -> None:
        """Replace its row, or add one."""
        with self._lock:
            table = self._open()
            row = table.get(key(record))
            if (None if row is None else row["caption"]) != old:
                raise OutputError(
                    f"{record.name} has another caption in {self.path} by now; read the folder again before you save"
                )
            text = " ".join(caption.split())
            row = (row or self._new(record)) | {"caption": text, "finish_reason": EDITED}
            if not self._changed:
                table.start()
            self._changed = True
            table.append([row | {"n_tokens": None, "error": None}])

    def _new(self, record: Record) -> Row:
        data = read_at_most(Path(str(record.source)), 20_000_000)
        header = read_header(data, name=record.name)
        file_size, mtime = file_stat(record) or (None, None)
        return dict.fromkeys(COLUMNS) | {
            "id": record.id,
            "file_name": record.name,
            "width": header.width,
            "height": header.height,
            "sha256": hashlib.sha256(data).hexdigest(),
            "file_size": file_size,
            "mtime_ns": mtime,
        }

    def _open(self) -> GrowingTable:
        if self._table is None:
            header = self.path.with_name(self.path.name + ".settings.json")
            found = read_settings(header) if self.path.exists() else None
            runs = (found or {}).get("runs")
            settings = runs[-1]["settings"] if runs else asdict(self._settings)
            self._table = GrowingTable(self.path, COLUMNS, settings, "skip")
        return self._table

    def close(self) -> None:
        """Drop rows that were replaced, and mark the table as whole."""
        with self._lock:
            if self._table is not None and self._changed:
                self._table.finish()
            self._table, self._changed = None, False
