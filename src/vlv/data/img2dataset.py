"""What img2dataset writes beside its shards: a table of every address, fetched or not, and statistics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlv.data.foreign import decode_text, printable, read_file
from vlv.data.parts import metadata
from vlv.data.records import DAMAGED, NOT_DOWNLOADED, BadRecord, Record
from vlv.errors import DataError
from vlv.storage import Json

if TYPE_CHECKING:
    from vlv.data.parts import Part


_ROWS = 1000  # at a time


class Downloads:
    """The table beside a shard: what is known of each address.

    Args:
        path: The Parquet file; None knows nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._rows: dict[str, Json] = {}
        self._damage = ""
        self._path = path
        if path is None:
            return
        from vlv.data.parquet import Parquet
        from vlv.data.tables import light_columns

        try:
            file = Parquet(path)
            names = light_columns(file.schema)
            groups = range(file.num_groups if names else 0)
            rows = [row for group in groups for row in file.values(group, names, _ROWS)]
        except DataError as error:
            self._damage = str(error)
            return
        if all({"key", "status"} <= row.keys() for row in rows):
            self._rows = {str(row["key"]): row for row in rows}

    def join(self, record: Record, key: str) -> Record:
        """A record with what the table knows of it, below what its own JSON says."""
        row = self._rows.pop(key, None)
        if row is None:
            return record
        known = {name: value for name, value in row.items() if value is not None}
        known |= metadata(record.meta_json, record.name)
        caption = record.caption or known.get("caption")
        text = json.dumps(known, ensure_ascii=False, default=str)
        return replace(
            record, caption=caption if isinstance(caption, str) else None, meta_json=text
        )

    def failures(self, shard: str) -> Iterator[BadRecord]:
        """The addresses that gave no image, and the damage of the table itself."""
        if self._damage:
            path = printable(str(self._path))
            yield BadRecord(path, path, self._damage, DAMAGED, is_file=True)
        for key, row in self._rows.items():
            if row["status"] != "success":
                yield BadRecord(key, printable(shard), failure_of(row), NOT_DOWNLOADED)


def is_failure(row: Mapping[str, object]) -> bool:
    """Whether a row of an img2dataset table stands for an address that gave no image."""
    return {"url", "error_message", "status"} <= row.keys() and row["status"] != "success"


def failure_of(row: Mapping[str, object]) -> str:
    """Why it gave none, in words."""
    return f"{row.get('url', '')}: {row.get('error_message') or row['status']}"


def compare_with_stats(tar: Part, num_images: int) -> Iterator[BadRecord]:
    """A shard of img2dataset is complete when its statistics lie beside it and count the same images."""
    if not isinstance(tar.source, Path):
        return
    stats = tar.source.with_name(f"{tar.source.stem}_stats.json")
    if not stats.exists():
        if next(tar.source.parent.glob("*_stats.json"), None) is not None:
            yield tar.damaged(
                f"{tar}: img2dataset has not finished this shard ({stats.name} is missing)"
            )
        return
    try:
        text = decode_text(read_file(stats), stats)
    except DataError:
        return
    successes = metadata(text, stats).get("successes")
    if isinstance(successes, int) and successes != num_images:
        yield tar.damaged(f"{tar}: {num_images} images, but {stats.name} says {successes}")
