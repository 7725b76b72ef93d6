"""A table of rows that survives being killed: JSON lines, synced batch by batch, with its settings beside it.

Beside ``captions.jsonl`` stands ``captions.jsonl.settings.json``, the list of runs that wrote the rows:
each with its settings, the number of its first row, and whether it came to its end. A Parquet table
cannot grow row by row, so ``captions.parquet`` is written at the end from a journal that lies beside it
for as long as the run lasts.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from vlv.errors import OutputError
from vlv.storage import replacing, write_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import BinaryIO

OnExisting = Literal["skip", "overwrite", "append", "error"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run that wrote rows.

    Attributes:
        settings: What the rows depend on.
        first_row: Number of the first row that it wrote.
        finished: Whether it came to its end.
    """

    settings: dict[str, Any]
    first_row: int = 0
    finished: bool = False


class GrowingTable:
    """The rows of one output file, and which run they belong to.

    Building one reads and checks; `start` makes the file ready and is the first to write.

    Attributes:
        rows: The rows of earlier runs that stay, in file order.
        done: The rows without error of the run that goes on, by their key; not made again.
        key: Names of the columns that tell rows apart.
    """

    def __init__(
        self,
        output: Path,
        columns: Mapping[str, type],
        settings: Mapping[str, object],
        on_existing: OnExisting,
        key: tuple[str, ...] = ("id", "file_name"),
    ) -> None:
        self.output, self.key = output, key
        self.columns = dict(columns)
        self.header = output.with_name(output.name + ".settings.json")
        self.is_parquet = output.suffix == ".parquet"
        if self.is_parquet:
            import_pyarrow()  # complain now, not after hours of work
        self.path = output.with_name(output.name + ".journal.jsonl") if self.is_parquet else output
        self._settings = json.loads(json.dumps(dict(settings), default=str))
        self._file: BinaryIO | None = None
        self.runs: list[Run] = []
        self.rows: list[Row] = []
        self.done: dict[tuple[Any, ...], Row] = {}
        if output.exists() or self.path.exists():
            self._read_existing(on_existing)
        else:
            self.runs = [Run(self._settings)]

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
            self.runs = [Run(self._settings)]
            return
        self.runs, self.rows = self._read_header(), self._read_rows()
        if self._continues(on_existing):
            self._resume()
        elif on_existing == "append":
            self.runs.append(Run(self._settings, first_row=len(self.rows)))
        else:
            raise OutputError(self._difference())

    def _continues(self, on_existing: OnExisting) -> bool:
        last = self.runs[-1]
        return last.settings == self._settings and (on_existing == "skip" or not last.finished)

    def _resume(self) -> None:
        """Keep what the last run got right; what failed is tried again."""
        first = self.runs[-1].first_row
        kept = [row for row in self.rows[first:] if row.get("error") is None]
        self.rows = self.rows[:first] + kept
        self.done = {tuple(row[name] for name in self.key): row for row in kept}
        self.runs[-1] = replace(self.runs[-1], finished=False)

    def _difference(self) -> str:
        old, new = self.runs[-1].settings, self._settings
        names = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        what = ", ".join(f"{key} was {old.get(key)}, now {new.get(key)}" for key in names)
        return (
            f"{self.output} was written with other settings ({what}); name another file, "
            "or use --on-existing overwrite or append"
        )

    def _read_header(self) -> list[Run]:
        try:
            runs = [
                Run(**run) for run in json.loads(self.header.read_text(encoding="utf-8"))["runs"]
            ]
        except FileNotFoundError:
            raise OutputError(
                f"{self.output} exists, but {self.header.name} beside it does not, so its settings are "
                "unknown; name another file"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{self.header} is damaged ({error}); use --on-existing overwrite to begin anew"
            ) from error
        if not runs:
            raise OutputError(
                f"{self.header} names no run; use --on-existing overwrite to begin anew"
            )
        return runs

    def _read_rows(self) -> list[Row]:
        if self.path.exists():
            return parse_rows(self.path.read_bytes(), self.path, self.key)
        return read_parquet(self.output)

    def start(self) -> None:
        """Write the header and the rows that stay, and open the file for more."""
        self._write_header()
        with replacing(self.path) as temporary:
            temporary.write_bytes(_to_lines(self.rows))
        self._file = self.path.open("ab")

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows and sync them to disk.

        Raises:
            OutputError: Somebody else has written to the file, or the disk is full.
        """
        assert self._file is not None, "start() comes first"
        if self.path.stat().st_size != self._file.tell():
            raise OutputError(f"another process writes to {self.path}; let only one run at a time")
        try:
            self._file.write(_to_lines(rows))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}") from error
        self.rows.extend(rows)

    def finish(self) -> None:
        """Mark the run as ended, and write the Parquet table where one was asked for."""
        self.close()
        self.runs[-1] = replace(self.runs[-1], finished=True)
        if self.is_parquet:
            write_parquet(self.output, self.columns, self.rows)
        self._write_header()
        if self.is_parquet:
            self.path.unlink()

    def close(self) -> None:
        """Close the file; every row that was appended is on disk."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_header(self) -> None:
        runs = [asdict(run) for run in self.runs]
        write_text(self.header, json.dumps({"runs": runs}, indent=2) + "\n")


def _to_lines(rows: Sequence[Row]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def parse_rows(content: bytes, path: Path, key: tuple[str, ...] = ("id", "file_name")) -> list[Row]:
    """Parse JSON lines that each have the columns of the key; a last line that was torn by a kill is dropped.

    Raises:
        OutputError: A line before the last is damaged.
    """
    lines = content.split(b"\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not row.keys() >= set(key):
                raise ValueError(f"no row with {' and '.join(key)}")
        except ValueError as error:
            if number == len(lines):  # no line end follows: the write was cut off
                break
            raise OutputError(
                f"line {number} of {path} is damaged ({error}); remove it, or use --on-existing overwrite"
            ) from error
        rows.append(row)
    return rows


def import_pyarrow() -> tuple[Any, Any]:
    """The modules ``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        OutputError: They are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise OutputError(
            'Parquet needs pyarrow: pip install "vlv[data]", or name a .jsonl file'
        ) from None
    return pyarrow, pyarrow.parquet


def read_parquet(path: Path) -> list[Row]:
    """Rows of a Parquet table."""
    arrow, parquet = import_pyarrow()
    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise OutputError(f"{path} is no readable Parquet table ({error})") from error
    return rows


def write_parquet(path: Path, columns: Mapping[str, type], rows: Sequence[Row]) -> None:
    """Write rows as a Parquet table, atomically; ``columns`` gives each column ``str`` or ``int``."""
    arrow, parquet = import_pyarrow()
    types = {str: arrow.string(), int: arrow.int64()}
    schema = arrow.schema([(name, types[kind]) for name, kind in columns.items()])
    with replacing(path) as temporary:
        parquet.write_table(arrow.Table.from_pylist(list(rows), schema=schema), temporary)
