"""Captions as text files beside their images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from vlv.data.images import IMAGE_SUFFIXES
from vlv.data.records import Record
from vlv.errors import OutputError
from vlv.jobs.table import OnExisting
from vlv.storage import write_text

WRITERS = 8
"""Threads that write text files: each waits for the disk."""


class Text(NamedTuple):
    """What goes into the text file of a record.

    Attributes:
        record: Whose.
        captions: One line for each.
        old: A caption that they replace, where the file holds it alone, whatever is done with files that exist.
    """

    record: Record
    captions: Sequence[str]
    old: str | None = None


class Sidecars:
    """One text file beside each image, with the same stem.

    Attributes:
        collisions: Why a record can have no text file: another image would share it; by its id.

    Raises:
        OutputError: An image lies inside an archive, or a text file exists and ``on_existing`` is ``error``.
    """

    def __init__(self, records: Sequence[Record], suffix: str, on_existing: OnExisting) -> None:
        self._suffix = _checked_suffix(suffix)
        self._on_existing = on_existing
        self.collisions = find_collisions(records, self.path)
        for record in records if on_existing == "error" else ():
            if self.path(record).exists():
                raise OutputError(
                    f"{self.path(record)} exists; use --on-existing skip to keep what is there"
                )

    def path(self, record: Record) -> Path:
        """Text file of a record."""
        if not isinstance(record.source, Path):
            raise OutputError(
                f"{record.name} lies in an archive and can have no text file beside it; use --output"
            )
        return record.source.with_suffix(self._suffix)

    def keeps(self, record: Record) -> bool:
        """Whether the text file is there and must not be touched."""
        return self._on_existing == "skip" and self.path(record).exists()

    def write(self, texts: Iterable[Text]) -> None:
        """Write text files; one that exists is kept, replaced or added to, and one with two owners never written."""
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(self._write, texts))

    def _write(self, text: Text) -> None:
        record, path = text.record, self.path(text.record)
        if record.id in self.collisions or (self.keeps(record) and not _holds(path, text.old)):
            return
        content = "".join(map(_line, text.captions))
        if self._on_existing == "append" and path.exists() and not _holds(path, text.old):
            content = path.read_text(encoding="utf-8").rstrip("\n") + "\n" + content
        write_text(path, content)


def find_collisions(records: Sequence[Record], path_of: Callable[[Record], Path]) -> dict[str, str]:
    """Records that would share an output file with another one, each with a sentence that says so."""
    first: dict[Path, Record] = {}
    shared: dict[Path, list[Record]] = {}
    for record in records:
        path = path_of(record)
        other = first.setdefault(path, record)
        if other is not record:
            shared.setdefault(path, [other]).append(record)
    return {
        record.id: f"{record.name}: it would share {path} with {_others(record, those)}; rename one of them"
        for path, those in shared.items()
        for record in those
    }


def _others(record: Record, those: Sequence[Record]) -> str:
    return ", ".join(other.name for other in those if other is not record)


def _line(caption: str) -> str:
    return " ".join(caption.split()) + "\n"


def _holds(path: Path, caption: str | None) -> bool:
    """Whether a text file holds just this caption."""
    if caption is None or not path.exists():
        return False
    return path.read_text(encoding="utf-8", errors="replace").strip() == _line(caption).strip()


def _checked_suffix(suffix: str) -> str:
    suffix = suffix if suffix.startswith(".") else f".{suffix}"
    if (
        suffix == "."
        or "/" in suffix
        or suffix.lower() in IMAGE_SUFFIXES | {".jsonl", ".parquet", ".csv", ".tar"}
    ):
        raise OutputError(f"{suffix!r} cannot be the suffix of captions; use --sidecar .txt")
    return suffix
