"""The folder that a data command writes: whose it is, what is done, and one writer at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vlv.errors import OutputError
from vlv.storage import (
    Json,
    check_settings,
    lock,
    plain,
    read_settings,
    remove_temporaries,
    write_json,
)

SUMMARY_NAME = "summary.json"
_WORK = ".work"
_NOTE = "job.json"
_MEND = "name another folder"


class OutputFolder:
    """The folder of one job.

    Args:
        folder: Created by `working`.
        settings: All that the result depends on besides the inputs; JSON values.
        inputs: Hash of the inputs.

    Raises:
        OutputError: The folder holds something else, or the result of other settings or inputs.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], inputs: str) -> None:
        self.folder = folder
        self.work = folder / _WORK
        self.settings, self.inputs = plain(settings), inputs
        known = self._known()
        if known is not None:
            self._compare(known)
        elif folder.exists() and any(path.name != _WORK for path in folder.iterdir()):
            raise OutputError(
                f"{folder} holds other files; name a new or an empty folder with --output"
            )

    def _known(self) -> Json | None:
        """What an earlier run noted; a damaged note is refused."""
        for path in (self.folder / SUMMARY_NAME, self.work / _NOTE):
            known = read_settings(path, mend=_MEND)
            if known is not None:
                if not isinstance(known.get("settings"), dict):
                    raise OutputError(f"{path} is no note of vlv; {_MEND}")
                return known
        return None

    def _compare(self, known: Json) -> None:
        check_settings(self.folder, known["settings"], self.settings, mend=_MEND)
        if known.get("inputs") != self.inputs:
            raise OutputError(
                f"{self.folder} was begun with other inputs, or they have changed since; {_MEND}"
            )

    @property
    def note(self) -> Json:
        """What is written of the job, for a later run to compare."""
        return {"settings": self.settings, "inputs": self.inputs}

    @property
    def is_finished(self) -> bool:
        """Whether the job is complete."""
        return (self.folder / SUMMARY_NAME).exists()

    def summary(self) -> Json:
        """What a complete job found."""
        return read_settings(self.folder / SUMMARY_NAME, mend=_MEND) or {}

    @contextmanager
    def working(self) -> Iterator[None]:
        """Make the folders and keep other processes out.

        Raises:
            OutputError: Another process works here, or something cannot be written.
        """
        with lock(self.work / "lock", str(self.folder)):
            try:
                if not (self.work / _NOTE).exists():
                    write_json(self.work / _NOTE, self.note)
                yield
            except OSError as error:
                self._leave_empty()
                where = error.filename or self.folder
                raise OutputError(f"{where}: cannot be written ({error.strerror})") from error
            except BaseException:
                self._leave_empty()
                raise

    def _leave_empty(self) -> None:
        """After a failure before anything was done, other settings may be tried at once."""
        if not any(path.name not in ("lock", _NOTE) for path in self.work.iterdir()):
            self.clean()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def finish(self, summary: Mapping[str, object]) -> None:
        """Write the summary, which marks the job as complete, and remove what is no longer needed."""
        write_json(self.folder / SUMMARY_NAME, {**summary, **self.note})
        self.clean()

    def clean(self) -> None:
        """Remove the folder of work, and what a killed run has left half written."""
        shutil.rmtree(self.work, ignore_errors=True)
        remove_temporaries(self.folder)
