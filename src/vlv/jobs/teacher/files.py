"""What a captioning job keeps on disk: its rows while it runs, and the files that it writes from them.

OUTPUT/state/settings.json    what the captions depend on
OUTPUT/state/rows.sqlite      one row per image and prompt, written the moment it is known
OUTPUT/state/answers.sqlite   every answer of an endpoint, so that none is paid for twice
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlv.endpoint import KeyedStore, utf8
from vlv.errors import OutputError
from vlv.jobs.formats import Row, write_rows
from vlv.jobs.outputs import (
    METADATA,
    ParquetShards,
    TarShards,
    beside_tars,
    common_folder,
    keyed,
    relative_path,
    write_lines,
    write_metadata,
)
from vlv.jobs.sidecars import Sidecars, Text
from vlv.storage import (
    check_settings,
    plain,
    read_settings,
    remove_temporaries,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from vlv.data.records import Record
    from vlv.jobs.teacher.prompts import Prompt

Format = Literal["parquet", "jsonl", "csv", "txt", "webdataset", "imagefolder", "beside-tars"]
FORMATS: tuple[Format, ...] = (
    "parquet",
    "jsonl",
    "csv",
    "txt",
    "webdataset",
    "imagefolder",
    "beside-tars",
)


@dataclass(frozen=True)
class TeacherOutput:
    """What is written, and what becomes of what is there.

    Attributes:
        folder: Folder of the shards and of the state.
        formats: What is written: ``parquet`` and ``webdataset`` shards with the images, ``jsonl`` and ``csv`` tables,
            ``txt`` files beside the images, the metadata of an ``imagefolder``, JSON lines ``beside-tars``.
        images: Whether Parquet shards hold the bytes of the images or the paths of their files.
        shard_size: Images of a shard.
        on_existing: Go on with what is there, begin anew (paid answers are kept), or refuse.
        retry_failed: Ask again what has failed before.
    """

    folder: Path
    formats: Sequence[Format] = ("parquet",)
    images: Literal["bytes", "path"] = "bytes"
    shard_size: int = 2000
    on_existing: Literal["skip", "overwrite", "error"] = "skip"
    retry_failed: bool = False


_PER_PROMPT: dict[str, type] = {
    "caption": str,
    "n_tokens": int,
    "finish_reason": str,
    "tries": int,
    "error": str,
}


def columns(prompts: Sequence[Prompt]) -> dict[str, type]:
    """Columns of a row: those of the first prompt by their plain names, of others with ``_NAME`` behind."""
    names: dict[str, type] = {"id": str, "file_name": str, "caption": str}
    for index, prompt in enumerate(prompts):
        for name, kind in _PER_PROMPT.items():
            names[name if index == 0 else f"{name}_{prompt.name}"] = kind
    more = {"model": str, "prompt_style": str, "seed": int, "width": int, "height": int}
    return names | more | {"sha256": str}


def wide_row(record: Record, prompts: Sequence[Prompt], rows: Sequence[Row], seed: int) -> Row:
    """One image with its captions for all prompts."""
    wide: Row = {"id": record.id, "file_name": record.name}
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        for name in _PER_PROMPT:
            wide[name if index == 0 else f"{name}_{prompt.name}"] = row[name]
    wide |= {name: rows[0][name] for name in ("model", "width", "height", "sha256")}
    wide |= {"prompt_style": prompts[0].name, "seed": seed}
    return {
        name: utf8(wide[name]) if isinstance(wide[name], str) else wide[name]
        for name in columns(prompts)
    }


class State:
    """The rows of a job on disk; building one reads and checks, `open` is the first to write.

    Args:
        output: Folder of the job, and what becomes of an older one.
        settings: What the captions depend on.

    Raises:
        OutputError: The folder is no job's, or was written with other settings.
    """

    def __init__(self, output: TeacherOutput, settings: Mapping[str, object]) -> None:
        self.folder = output.folder / "state"
        self._settings = plain(settings)
        self._anew = output.on_existing == "overwrite"
        self._retry_failed = output.retry_failed
        self._rows: KeyedStore | None = None
        file, folder = self.folder / "settings.json", output.folder
        if file.exists():
            if output.on_existing == "error":
                raise OutputError(
                    f"{folder} holds captions; name another folder, or use --on-existing skip to go on"
                )
            if output.on_existing == "skip":
                old = read_settings(file, mend="use --on-existing overwrite to begin anew")
                mend = "name another folder, or use --on-existing overwrite (answers that are paid for are kept)"
                check_settings(folder, old or {}, self._settings, mend=mend)
        elif folder.exists() and not _is_new(folder, self.folder):
            raise OutputError(f"{folder} exists and holds no captions of vlv; name another folder")

    def open(self) -> None:
        """Make the state ready for rows."""
        self._rows = KeyedStore(self.folder / "rows.sqlite")  # which only one process may hold
        remove_temporaries(self.folder.parent)
        if self._anew:
            self._rows.clear()
        write_json(self.folder / "settings.json", self._settings)

    def answers(self) -> KeyedStore:
        """The store of the endpoint's answers."""
        return KeyedStore(self.folder / "answers.sqlite")

    def close(self) -> None:
        """Close the file of rows."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def get(self, record: Record, prompt: Prompt) -> Row | None:
        """The row of an image and prompt; None where it is missing."""
        assert self._rows is not None, "open() comes first"
        text = self._rows.get(_key(record, prompt))
        if text is None:
            return None
        row: Row = json.loads(text)
        return row

    def is_missing(self, row: Row | None) -> bool:
        """Whether there is something to do."""
        return row is None or (self._retry_failed and row["error"] is not None)

    def put(self, record: Record, prompt: Prompt, row: Row) -> None:
        """Write a row.

        Raises:
            OutputError: The disk is full, or the file cannot be written.
        """
        assert self._rows is not None, "open() comes first"
        self._rows.put(_key(record, prompt), json.dumps(row))


def _is_new(folder: Path, state: Path) -> bool:
    """Whether a folder is empty, but for the state of a job that was killed before it wrote its settings."""
    return folder.is_dir() and all(path == state for path in folder.iterdir())


def _key(record: Record, prompt: Prompt) -> bytes:
    text = json.dumps([record.id, record.name, prompt.name])
    return hashlib.sha256(text.encode()).digest()


class Files:
    """The files of a job, checked before any work.

    Raises:
        OutputError: A file is there that vlv did not write, or a format does not fit the images.
    """

    def __init__(
        self, records: Sequence[Record], prompts: Sequence[Prompt], output: TeacherOutput
    ) -> None:
        self._records, self._prompts, self._output = records, prompts, output
        formats, folder = frozenset(output.formats), output.folder
        self._formats = formats
        self._shards = (
            ParquetShards(folder, columns(prompts), output.images) if "parquet" in formats else None
        )
        if self._shards is not None and output.images == "path":
            for record in records:
                relative_path(record, folder)
        on_existing = output.on_existing
        self._sidecars = Sidecars(records, ".txt", on_existing) if "txt" in formats else None
        self._tars = beside_tars(records) if "beside-tars" in formats else {}
        self._root = common_folder(records) if "imagefolder" in formats else None
        self._mine = folder / "state" / "metadata_written"
        written_by_us = self._mine.exists() or on_existing == "overwrite"
        if self._root is not None and (self._root / METADATA).exists() and not written_by_us:
            raise OutputError(
                f"{self._root / METADATA} exists; move it away, or use --on-existing overwrite"
            )

    @property
    def has_shards(self) -> bool:
        """Whether shards are written while the job runs."""
        return self._shards is not None

    def collision(self, record: Record) -> str | None:
        """Why the record can have no text file, which it should have."""
        return None if self._sidecars is None else self._sidecars.collisions.get(record.id)

    def keeps(self, record: Record) -> bool:
        """Whether the record has a text file that is to stay, and nothing else is asked for."""
        alone = self._sidecars is not None and self._formats == {"txt"}
        return alone and self._sidecars is not None and self._sidecars.keeps(record)

    def write_shard(self, number: int, pairs: Sequence[tuple[Record, Row]]) -> None:
        """Write a Parquet shard, where they are asked for."""
        if self._shards is not None and pairs:
            self._shards.write(number, pairs)

    def finish(self, row_of: Callable[[Record], Row | None], num_shards: int) -> None:
        """Write all that comes at the end; records without a row are left out."""

        def pairs(records: Sequence[Record] = self._records) -> Iterator[tuple[Record, Row]]:
            return ((r, row) for r in records if (row := row_of(r)) is not None)

        folder, rest = self._output.folder, self._prompts[1:]
        names = ["caption", *(f"caption_{prompt.name}" for prompt in rest)]
        if self._shards is not None:
            self._shards.remove_from(num_shards)
        if "jsonl" in self._formats:
            write_lines(folder / "captions.jsonl", (row for _, row in pairs()))
        if "csv" in self._formats:
            rows = (row for _, row in pairs())
            write_rows(folder / "captions.csv", columns(self._prompts), rows)
        if "webdataset" in self._formats:
            TarShards(folder).write_all(pairs(), self._output.shard_size)
        if self._sidecars is not None:
            texts = ((r, [row[n] for n in names if row[n] is not None]) for r, row in pairs())
            self._sidecars.write(Text(record, captions) for record, captions in texts if captions)
        for path, members in self._tars.items():
            write_lines(path, (keyed(record, row) for record, row in pairs(members)))
        if self._root is not None:
            write_text(self._mine, "")
            more = {f"text_{prompt.name}": f"caption_{prompt.name}" for prompt in rest}
            write_metadata(self._root, pairs(), more)
