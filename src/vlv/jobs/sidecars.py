"""Captions as text files beside their images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlv.data.images import IMAGE_SUFFIXES
from vlv.errors import OutputError
from vlv.jobs.inputs import file_name
from vlv.storage import write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlv.data.records import Record
    from vlv.jobs.table import OnExisting


class Sidecars:
    """One text file beside each image, with the same stem.

    Raises:
        OutputError: An image lies inside an archive, two images would share a text file, or a text file
            exists and ``on_existing`` is ``error``.
    """

    def __init__(self, records: Sequence[Record], suffix: str, on_existing: OnExisting) -> None:
        self._suffix = _checked_suffix(suffix)
        self._on_existing = on_existing
        owners: dict[Path, Record] = {}
        for record in records:
            path = self.path(record)
            if path in owners:
                raise OutputError(
                    f"{file_name(record)} and {file_name(owners[path])} would share {path}; "
                    "rename one of them, or use --output"
                )
            if on_existing == "error" and path.exists():
                raise OutputError(f"{path} exists; use --on-existing skip to keep what is there")
            owners[path] = record

    def path(self, record: Record) -> Path:
        """Text file of a record."""
        if not isinstance(record.source, Path):
            raise OutputError(
                f"{file_name(record)} lies in an archive and can have no text file beside it; use --output"
            )
        return record.source.with_suffix(self._suffix)

    def keeps(self, record: Record) -> bool:
        """Whether the text file is there and must not be touched."""
        return self._on_existing == "skip" and self.path(record).exists()

    def write(self, record: Record, *captions: str) -> None:
        """Write captions, each as one line; an existing file is kept, replaced or added to."""
        if self.keeps(record):
            return
        path = self.path(record)
        text = "".join(" ".join(caption.split()) + "\n" for caption in captions)
        if self._on_existing == "append" and path.exists():
            text = path.read_text(encoding="utf-8").rstrip("\n") + "\n" + text
        write_text(path, text)


def _checked_suffix(suffix: str) -> str:
    suffix = suffix if suffix.startswith(".") else f".{suffix}"
    if (
        suffix == "."
        or "/" in suffix
        or suffix.lower() in IMAGE_SUFFIXES | {".jsonl", ".parquet", ".tar"}
    ):
        raise OutputError(f"{suffix!r} cannot be the suffix of captions; use --sidecar .txt")
    return suffix
