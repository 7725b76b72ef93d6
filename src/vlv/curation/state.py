"""The folder that a data command writes: whose it is, what is done, and one writer at a time."""

from __future__ import annotations

import fcntl
import json
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vlv.errors import OutputError
from vlv.storage import remove_temporaries, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

SUMMARY_NAME = "summary.json"
_WORK = ".work"
_NOTE = "job.json"


class OutputFolder:
    """The folder of one job.

    Args:
        folder: Created by `working`.
        settings: All that the result depends on besides the inputs; JSON values.
        inputs: Hash of the inputs.

    Raises:
        OutputError: The folder holds something else, or the result of other settings or inputs.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], inputs: str) -> None:
        self.folder = folder
        self.work = folder / _WORK
        self.settings = json.loads(json.dumps(dict(settings)))
        self.inputs = inputs
        known = self._known()
        if known is not None:
            self._compare(known)
        elif folder.exists() and any(path.name != _WORK for path in folder.iterdir()):
            raise OutputError(
                f"{folder} holds other files; name a new or an empty folder with --output"
            )

    def _known(self) -> dict[str, Any] | None:
        """What an earlier run noted; a damaged note is refused."""
        for path in (self.folder / SUMMARY_NAME, self.work / _NOTE):
            if path.exists():
                try:
                    value = json.loads(path.read_text(encoding="utf-8"))
                    return {"settings": value["settings"], "inputs": value["inputs"]}
                except (OSError, ValueError, KeyError, TypeError) as error:
                    raise OutputError(
                        f"{path} is damaged ({error}); name another folder"
                    ) from error
        return None

    def _compare(self, known: Mapping[str, Any]) -> None:
        old, new = _flat(known["settings"]), _flat(self.settings)
        names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        if names:
            what = ", ".join(f"{name} was {old.get(name)}, now {new.get(name)}" for name in names)
            raise OutputError(
                f"{self.folder} was begun with other settings ({what}); name another folder"
            )
        if known["inputs"] != self.inputs:
            raise OutputError(
                f"{self.folder} was begun with other inputs, or they have changed since; "
                "name another folder"
            )

    @property
    def is_finished(self) -> bool:
        """Whether the job is complete."""
        return (self.folder / SUMMARY_NAME).exists()

    def summary(self) -> dict[str, Any]:
        """What a complete job found."""
        value: dict[str, Any] = json.loads((self.folder / SUMMARY_NAME).read_text(encoding="utf-8"))
        return value

    @contextmanager
    def working(self) -> Iterator[None]:
        """Make the folders and keep other processes out.

        Raises:
            OutputError: Another process works here, or something cannot be written.
        """
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            lock = (self.work / "lock").open("w")
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be made ({error.strerror})") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputError(
                    f"another process works in {self.folder}; wait for it, or name another folder"
                ) from error
            note = {"settings": self.settings, "inputs": self.inputs}
            try:
                if not (self.work / _NOTE).exists():
                    write_text(self.work / _NOTE, json.dumps(note, indent=1) + "\n")
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

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, which marks the job as complete, and remove what is no longer needed."""
        content = {**summary, "settings": self.settings, "inputs": self.inputs}
        write_text(
            self.folder / SUMMARY_NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        )
        self.clean()

    def clean(self) -> None:
        """Remove the folder of work, and what a killed run has left half written."""
        shutil.rmtree(self.work, ignore_errors=True)
        remove_temporaries(self.folder)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
