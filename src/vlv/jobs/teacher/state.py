"""What is known of a captioning job on disk: its settings, and a row for every image and prompt.

OUTPUT/state/settings.json    what the captions depend on
OUTPUT/state/rows.sqlite      one row per image and prompt, written the moment it is known
OUTPUT/state/answers.sqlite   every answer of an endpoint, so that none is paid for twice
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Literal

from vlv.endpoint import KeyedStore
from vlv.errors import OutputError
from vlv.jobs.inputs import file_name
from vlv.storage import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from vlv.data.records import Record
    from vlv.jobs.teacher.prompts import Prompt

OnExisting = Literal["skip", "overwrite", "error"]
Row = dict[str, Any]


class State:
    """The rows of a job; building one reads and checks, `open` is the first to write.

    Args:
        output: Folder of the job.
        settings: What the captions depend on.
        on_existing: Go on with what is there, begin anew (paid answers are kept), or refuse.
        retry_failed: Whether rows with an error count as missing.

    Raises:
        OutputError: The folder is no job's, or was written with other settings.
    """

    def __init__(
        self,
        output: Path,
        settings: Mapping[str, object],
        on_existing: OnExisting,
        *,
        retry_failed: bool = False,
    ) -> None:
        self.folder = output / "state"
        self._settings = json.loads(json.dumps(dict(settings), default=str))
        self._anew = on_existing == "overwrite"
        self._retry_failed = retry_failed
        self._rows: KeyedStore | None = None
        file = self.folder / "settings.json"
        if file.exists():
            if on_existing == "error":
                raise OutputError(
                    f"{output} holds captions; name another folder, or use --on-existing skip to go on"
                )
            if on_existing == "skip":
                self._compare(output, file)
        elif output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise OutputError(f"{output} exists and holds no captions of vlv; name another folder")

    def _compare(self, output: Path, file: Path) -> None:
        try:
            old = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise OutputError(
                f"{file} is damaged ({error}); use --on-existing overwrite to begin anew"
            ) from error
        names = sorted(
            name
            for name in old.keys() | self._settings.keys()
            if old.get(name) != self._settings.get(name)
        )
        if names:
            what = ", ".join(
                f"{name} was {_short(old.get(name))}, now {_short(self._settings.get(name))}"
                for name in names
            )
            raise OutputError(
                f"{output} was written with other settings ({what}); name another folder, or use "
                "--on-existing overwrite (answers that are paid for are kept)"
            )

    @property
    def started(self) -> bool:
        """Whether there are rows to go on with."""
        return not self._anew and (self.folder / "rows.sqlite").exists()

    def open(self) -> None:
        """Make the state ready for rows."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            rows = KeyedStore(self.folder / "rows.sqlite")
            if self._anew:
                rows.clear()
            write_text(self.folder / "settings.json", json.dumps(self._settings, indent=2) + "\n")
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written: {error.strerror}") from error
        self._rows = rows

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
        return None if text is None else json.loads(text)

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


def _key(record: Record, prompt: Prompt) -> bytes:
    text = json.dumps([record.id, file_name(record), prompt.name])
    return hashlib.sha256(text.encode()).digest()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:60] + " ..."
