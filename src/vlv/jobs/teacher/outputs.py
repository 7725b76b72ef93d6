"""What is written in the end: Parquet shards that stage 2 reads, and the forms that other tools read.

Everything is in the order of the inputs and depends on nothing but the rows, so that the same captions
give the same files, however the requests interleaved.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlv.data.records import Span
from vlv.endpoint import utf8
from vlv.errors import DataError, OutputError
from vlv.jobs.inputs import file_name
from vlv.jobs.sidecars import Sidecars
from vlv.jobs.table import import_pyarrow
from vlv.storage import replacing, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from vlv.data.records import Record
    from vlv.jobs.teacher.prompts import Prompt
    from vlv.jobs.teacher.state import OnExisting, Row

Form = Literal["parquet", "jsonl", "txt", "webdataset", "imagefolder"]
FORMS = ("parquet", "jsonl", "txt", "webdataset", "imagefolder")
ROWS_PER_GROUP = 64  # stage 2 reads a group at a time

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
    wide: Row = {"id": record.id, "file_name": file_name(record)}
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        for name in _PER_PROMPT:
            wide[name if index == 0 else f"{name}_{prompt.name}"] = row[name]
    wide |= {name: rows[0][name] for name in ("model", "width", "height", "sha256")}
    wide |= {"prompt_style": prompts[0].name, "seed": seed}
    return {
        name: utf8(wide[name]) if isinstance(wide[name], str) else wide[name]
        for name in columns(prompts)
    }


def digest(rows: Iterable[Row]) -> str:
    """Hash of rows."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, ensure_ascii=False).encode())
    return found.hexdigest()


class Shards:
    """Parquet files ``00000.parquet`` and so on, each with ``00000_stats.json``, the mark that it is whole.

    Args:
        folder: Where they go.
        prompts: What was asked.
        images: Whether the bytes of the images are put in, or the paths of their files.
    """

    def __init__(
        self, folder: Path, prompts: Sequence[Prompt], images: Literal["bytes", "path"]
    ) -> None:
        self._arrow, self._parquet = import_pyarrow()  # complain now, not after hours
        self._folder, self._images = folder, images
        kind = self._arrow.binary() if images == "bytes" else self._arrow.string()
        types = {str: self._arrow.string(), int: self._arrow.int64()}
        fields = [("image", kind), *((n, types[k]) for n, k in columns(prompts).items())]
        if images == "path":  # readers would take file_name, which is relative to somewhere else
            fields = [field for field in fields if field[0] != "file_name"]
        self._schema = self._arrow.schema(fields)

    def write(self, number: int, pairs: Sequence[tuple[Record, Row]]) -> None:
        """Write a shard, unless it is there with just these rows.

        Rows without the first caption are left out, so that training never meets them.

        Raises:
            DataError: An image has changed since it was captioned.
            OutputError: The disk is full, or the file cannot be written.
        """
        path = self._folder / f"{number:05d}.parquet"
        mark = self._folder / f"{number:05d}_stats.json"
        good = [(record, row) for record, row in pairs if row["caption"] is not None]
        stats = {
            "rows": len(good),
            "failed": len(pairs) - len(good),
            "images": self._images,
            "digest": digest(row for _, row in pairs),
        }
        text = json.dumps(stats, indent=2) + "\n"
        if _content(mark) == text and path.exists() == bool(good):
            return
        mark.unlink(missing_ok=True)
        try:
            if good:
                with replacing(path) as temporary:
                    self._write(temporary, good)
            else:
                path.unlink(missing_ok=True)
            write_text(mark, text)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error

    def _write(self, path: Path, pairs: Sequence[tuple[Record, Row]]) -> None:
        with self._parquet.ParquetWriter(path, self._schema, compression="zstd") as writer:
            for start in range(0, len(pairs), ROWS_PER_GROUP):
                group = pairs[start : start + ROWS_PER_GROUP]
                rows = [{**row, "image": self._image(record, row)} for record, row in group]
                writer.write_table(self._arrow.Table.from_pylist(rows, schema=self._schema))

    def _image(self, record: Record, row: Row) -> bytes | str:
        if self._images == "path":
            return relative_path(record, self._folder)
        data = record.open()
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise DataError(
                f"{file_name(record)} has changed since it was captioned; bring the old file back, or "
                "use --on-existing overwrite"
            )
        return data

    def remove_from(self, number: int) -> None:
        """Remove shards of an earlier, longer run, from this number on."""
        while (mark := self._folder / f"{number:05d}_stats.json").exists():
            mark.unlink()
            (self._folder / f"{number:05d}.parquet").unlink(missing_ok=True)
            number += 1


def relative_path(record: Record, folder: Path) -> str:
    """Path of a record's file, seen from a folder.

    Raises:
        OutputError: It lies in an archive or table, and has none.
    """
    if not isinstance(record.source, Path):
        raise OutputError(
            f"{file_name(record)} lies in an archive or table and has no path; use --images bytes"
        )
    return os.path.relpath(record.source, folder)


def _content(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


# Other forms -------------------------------------------------------------------------------------


class OtherForms:
    """Text files beside the images, JSON lines beside tar shards, and tables; checked before any work.

    Raises:
        OutputError: Two captions would share a file, or a file is there that vlv did not write.
    """

    def __init__(
        self,
        records: Sequence[Record],
        output: Path,
        forms: Iterable[Form],
        on_existing: OnExisting,
    ) -> None:
        self._records, self._output, self._forms = records, output, frozenset(forms)
        self._sidecars = Sidecars(records, ".txt", on_existing) if "txt" in self._forms else None
        self._tars = _tars(records) if "webdataset" in self._forms else {}
        self._root = _root(records) if "imagefolder" in self._forms else None
        if self._root is not None and (self._root / "metadata.jsonl").exists():
            mine = output / "state" / "metadata_written"
            if not mine.exists() and on_existing != "overwrite":
                raise OutputError(
                    f"{self._root / 'metadata.jsonl'} exists; move it away, or use --on-existing overwrite"
                )

    def keeps(self, record: Record) -> bool:
        """Whether the record has a text file already, which is to stay."""
        return self._sidecars is not None and self._sidecars.keeps(record)

    def write(self, wide: Callable[[Record], Row | None], prompts: Sequence[Prompt]) -> None:
        """Write them all from the rows; records without a row are left out."""
        if "jsonl" in self._forms:
            rows = (row for record in self._records if (row := wide(record)) is not None)
            _write_lines(self._output / "captions.jsonl", rows)
        if self._sidecars is not None:
            for record in self._records:
                texts = _captions(wide(record), prompts)
                if texts:
                    self._sidecars.write(record, *texts)
        for path, members in self._tars.items():
            _write_lines(path, (_keyed(r, row) for r in members if (row := wide(r)) is not None))
        if self._root is not None:
            write_text(self._output / "state" / "metadata_written", "")
            _write_lines(self._root / "metadata.jsonl", self._metadata(wide, prompts))

    def _metadata(
        self, wide: Callable[[Record], Row | None], prompts: Sequence[Prompt]
    ) -> Iterator[Row]:
        assert self._root is not None
        for record in self._records:
            row = wide(record)
            if row is not None and row["caption"] is not None:
                more = {f"text_{p.name}": row[f"caption_{p.name}"] for p in prompts[1:]}
                yield {
                    "file_name": relative_path(record, self._root),
                    "text": row["caption"],
                } | more


def _captions(row: Row | None, prompts: Sequence[Prompt]) -> list[str]:
    """All captions of an image."""
    if row is None:
        return []
    names = ["caption", *(f"caption_{prompt.name}" for prompt in prompts[1:])]
    return [row[name] for name in names if row[name] is not None]


def _keyed(record: Record, row: Row) -> Row:
    """A row by the key within its shard, which is unique there."""
    assert isinstance(record.source, Span)
    key = record.id.removeprefix(f"{record.source.path.as_posix()}/")
    return {"__key__": key} | {name: value for name, value in row.items() if name != "id"}


def _tars(records: Sequence[Record]) -> dict[Path, list[Record]]:
    members: dict[Path, list[Record]] = {}
    for record in records:
        shard = record.source.path if isinstance(record.source, Span) else None
        if not isinstance(shard, Path):
            raise OutputError(
                f"{file_name(record)} lies in no tar shard on this machine; leave --form webdataset out"
            )
        members.setdefault(shard.with_suffix(".captions.jsonl"), []).append(record)
    return members


def _root(records: Sequence[Record]) -> Path:
    """The folder that holds all images."""
    for record in records:
        if not isinstance(record.source, Path):
            raise OutputError(f"{file_name(record)} is no file; leave --form imagefolder out")
    return Path(os.path.commonpath([Path(str(r.source)).absolute().parent for r in records]))


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    try:
        with (
            replacing(path) as temporary,
            temporary.open("w", encoding="utf-8", newline="\n") as out,
        ):
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
