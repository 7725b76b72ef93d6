"""A table of rows that survives being killed: JSON lines, synced batch by batch, with its settings beside it.

Memory holds where the rows begin, not the rows, and a resumed run appends to the file as it is. Beside
``captions.jsonl`` stands ``captions.jsonl.settings.json``, the list of runs that wrote the rows: each with its
settings, the number of its first row, and whether it came to its end. Parquet and CSV files are written at the
end, from a journal of JSON lines that lies beside them for as long as the run lasts.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Literal

from vlv.errors import OutputError
from vlv.jobs.formats import (
    TABLE_SUFFIXES,
    Columns,
    Row,
    import_pyarrow,
    read_rows,
    scan_lines,
    write_rows,
)
from vlv.storage import (
    Journal,
    Json,
    check_settings,
    plain,
    read_settings,
    replacing,
    to_line,
    write_json,
)

__all__ = ["GrowingTable", "OnExisting", "Row", "fill", "open_table"]

OnExisting = Literal["skip", "overwrite", "append", "error"]


@dataclass(frozen=True)
class Run:
    """One run that wrote rows.

    Attributes:
        settings: What the rows depend on.
        first_row: Number of the first row that it wrote.
        finished: Whether it came to its end.
    """

    settings: Json
    first_row: int = 0
    finished: bool = False


class GrowingTable:
    """The rows of one output file, and which run they belong to.

    ``key in table`` says whether the current run has a row without error for a key; `get` reads that row.
    Building a table reads and checks; `start` makes the file ready and is the first to write.

    Args:
        output: A ``.jsonl``, ``.parquet`` or ``.csv`` file.
        columns: Its columns and their types; needed for Parquet and CSV.
        settings: What the rows depend on.
        on_existing: What to do with an output that is there.
        key: Names of the columns that tell rows apart.

    Raises:
        OutputError: The output is damaged, not ours, or was made with other settings.
    """

    _lines: IO[bytes] | None = None  # the rows as JSON lines, for reading

    def __init__(
        self,
        output: Path,
        columns: Columns,
        settings: Mapping[str, object],
        on_existing: OnExisting,
        key: tuple[str, ...] = ("id", "file_name"),
    ) -> None:
        self.output, self.key, self.columns = output, key, dict(columns)
        self.header = output.with_name(output.name + ".settings.json")
        self._converts = output.suffix in {".parquet", ".csv"}
        if output.suffix == ".parquet":
            import_pyarrow()  # complain now, not after hours of work
        self.path = output.with_name(output.name + ".journal.jsonl") if self._converts else output
        self._runs = [Run(plain(settings))]
        self._anew = True
        self._journal: Journal | None = None
        self._latest: dict[
            int, int
        ] = {}  # by hash of its key, where the latest row of this run begins
        self._failed: set[int] = set()  # hashes of keys whose latest row is an error
        self._num_stale = 0  # rows of this run that a later one replaces
        if output.exists() or self.path.exists():
            self._read_existing(on_existing)

    def __contains__(self, key: object) -> bool:
        mark = _hash(key)
        return mark in self._latest and mark not in self._failed

    def __len__(self) -> int:
        return len(self._latest) - len(self._failed)

    def get(self, key: tuple[object, ...]) -> Row | None:
        """The row without error that the current run has for a key."""
        if key not in self:
            return None
        row = self._read(self._latest[_hash(key)])
        return row if self._key(row) == key else None

    def _read(self, offset: int) -> Row:
        assert self._lines is not None
        self._lines.seek(offset)
        row: Row = json.loads(self._lines.readline())
        return row

    def _key(self, row: Row) -> tuple[object, ...]:
        return tuple(row[name] for name in self.key)

    # What is there -------------------------------------------------------------------------------

    def _read_existing(self, on_existing: OnExisting) -> None:
        if on_existing == "error":
            raise OutputError(
                f"{self.output} exists; name another file, or use --on-existing skip to go on with it"
            )
        if on_existing == "overwrite":
            if self.output.exists() and not self.header.exists():
                raise OutputError(
                    f"{self.output} was not written by vlv and is not overwritten; remove it, or name another file"
                )
            return
        (new,) = self._runs
        self._runs, self._anew = self._read_header(), False
        last = self._runs[-1]
        if on_existing == "skip":
            check_settings(
                self.output,
                last.settings,
                new.settings,
                mend="name another file, or use --on-existing overwrite or append",
            )
        if last.settings == new.settings and (on_existing == "skip" or not last.finished):
            self._runs[-1] = replace(last, finished=False)
            self._index(last.first_row)
        else:
            self._runs.append(replace(new, first_row=self._index(None)))

    def _read_header(self) -> list[Run]:
        mend = "use --on-existing overwrite to begin anew"
        found = read_settings(self.header, mend=mend)
        if found is None:
            raise OutputError(
                f"{self.output} exists, but {self.header.name} beside it does not, so its settings are "
                "unknown; name another file"
            )
        try:
            runs = [Run(**run) for run in found["runs"]]
        except (KeyError, TypeError) as error:
            raise OutputError(f"{self.header} is damaged ({error}); {mend}") from error
        if not runs:
            raise OutputError(f"{self.header} names no run; {mend}")
        return runs

    def _index(self, first_row: int | None) -> int:
        """Note where rows begin, from a row on; returns the number of all rows."""
        lines = self._open_lines()
        self._read_from(lines)
        count = 0
        for count, (offset, row) in enumerate(scan_lines(lines, self.path, self.key), 1):
            if first_row is not None and count > first_row:
                self._note(row, offset)
        return count

    def _read_from(self, lines: IO[bytes]) -> None:
        if self._lines is not None:
            self._lines.close()
        self._lines = lines

    def __del__(self) -> None:
        if self._lines is not None:
            self._lines.close()

    def _open_lines(self) -> IO[bytes]:
        if self.path.exists():
            return self.path.open("rb")
        spool = TemporaryFile()  # noqa: SIM115  # random access to the rows of a finished table
        for row in read_rows(self.output, self.columns):
            spool.write(to_line(row))
        spool.seek(0)
        return spool

    def _note(self, row: Row, offset: int) -> None:
        mark = _hash(self._key(row))
        self._num_stale += mark in self._latest
        self._latest[mark] = offset
        (self._failed.discard if row.get("error") is None else self._failed.add)(mark)

    # Writing -------------------------------------------------------------------------------------

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Rows may be appended within; the run ends with it, or is left to be gone on with."""
        try:
            self.start()
            yield
            self.finish()
        finally:
            self.close()

    def start(self) -> None:
        """Write the header, and open the file for more rows."""
        self._write_header()
        if self._anew or self.path.exists():
            self._open_journal()

    def _open_journal(self) -> Journal:
        if self._anew:
            with replacing(self.path) as temporary:
                temporary.touch()
            self._anew = False
        elif not self.path.exists():
            assert self._lines is not None
            self._lines.seek(0)
            with replacing(self.path) as temporary, temporary.open("wb") as out:
                shutil.copyfileobj(self._lines, out)
        else:
            _end_last_line(self.path)
        self._journal = Journal(self.path)
        self._read_from(self.path.open("rb"))
        self._end = self.path.stat().st_size
        return self._journal

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows and sync them to disk; one for a key that has a row already replaces it.

        Raises:
            OutputError: Somebody else has written to the file, or the disk is full.
        """
        journal = self._journal or self._open_journal()
        if self.path.stat().st_size != self._end:  # perhaps another file by now
            raise OutputError(f"another process writes to {self.path}; let only one run at a time")
        fresh = [row for row in rows if not self._failed_alike(row)]
        journal.append(fresh)
        for row in fresh:
            self._note(row, self._end)
            self._end += len(to_line(row))

    def _failed_alike(self, row: Row) -> bool:
        """Whether the file says already that this row has failed, in the same words."""
        mark = _hash(self._key(row))
        return mark in self._failed and self._read(self._latest[mark]) == row

    def finish(self) -> None:
        """Mark the run as ended, drop rows that were replaced, and write the Parquet or CSV file."""
        started = self._journal is not None
        self.close()
        self._runs[-1] = replace(self._runs[-1], finished=True)
        if self._converts and started:
            write_rows(self.output, self.columns, self._kept())
        elif self._num_stale:
            with replacing(self.path) as temporary, temporary.open("wb") as out:
                out.writelines(map(to_line, self._kept()))
            self._latest.clear()
            self._failed.clear()
            self._num_stale = 0
            self._index(self._runs[-1].first_row)
        self._write_header()
        if self._converts:
            self.path.unlink(missing_ok=True)

    def _kept(self) -> Iterator[Row]:
        """All rows but those of this run that a later one replaces."""
        first = self._runs[-1].first_row
        with self.path.open("rb") as file:
            for number, (offset, row) in enumerate(scan_lines(file, self.path, self.key)):
                if number < first or self._latest[_hash(self._key(row))] == offset:
                    yield row

    def close(self) -> None:
        """Close the file; every row that was appended is on disk."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _write_header(self) -> None:
        write_json(self.header, {"runs": [asdict(run) for run in self._runs]})


def open_table(
    output: Path | None,
    columns: Columns,
    settings: Mapping[str, object],
    on_existing: OnExisting,
    key: tuple[str, ...] = ("id", "file_name"),
) -> GrowingTable | None:
    """The table that a command was asked for, if it was.

    Raises:
        OutputError: The output cannot be used as it stands.
    """
    if output is None:
        return None
    if output.suffix not in TABLE_SUFFIXES:
        raise OutputError(f"{output} must end in {', '.join(TABLE_SUFFIXES)}")
    return GrowingTable(output, columns, settings, on_existing, key)


def fill(
    table: GrowingTable | None,
    batches: Iterable[Sequence[Row]],
    report: Callable[[Sequence[Row]], None],
) -> None:
    """Add batches of rows to a table, if there is one, and report each once it is on disk."""
    with nullcontext() if table is None else table.filling():
        for rows in batches:
            if table is not None:
                table.append(rows)
            report(rows)


def _hash(key: object) -> int:
    """64 bits of a key: a million of them fit where a thousand rows would."""
    text = json.dumps(key, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _end_last_line(path: Path) -> None:
    """Give a complete last line the line end that it lacks, as after an edit by hand."""
    with path.open("rb+") as file:
        size = file.seek(0, 2)
        if size == 0:
            return
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return
        start = max(0, size - 2**20)
        file.seek(start)
        last = file.read().rpartition(b"\n")[2]
        try:
            json.loads(last)
        except ValueError:
            return
        file.write(b"\n")
