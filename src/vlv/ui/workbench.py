"""What all tabs share: the model, its flags, and a folder for what is dropped and drawn."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlv.errors import ConfigError, VLVError
from vlv.storage import Json, replacing
from vlv.ui import gallery
from vlv.ui.commands import ModelFlags
from vlv.ui.desk import Desk

if TYPE_CHECKING:
    from vlv.ui.album import Album
    from vlv.ui.desk import Work
    from vlv.ui.searching import SearchableIndex

NOW: Json = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""How Gradio handles events that are answered at once, in the thread of the request."""
LATER: Json = {"show_progress": "hidden", "api_visibility": "private"}
"""And those whose answer comes in pieces."""
Values = list[Any]
"""What the components of a page hold, or are to show; each of a kind of its own."""
SCOPES = ["this image", "marked", "all shown"]
POLL = 0.25
"""Seconds between two looks at work that runs."""
MOST_ALBUMS = 8
MOST_DROPPED = 1000
_UNSAFE = re.compile(r"[^\w.()\[\]+,@ -]+")


@dataclass
class Workbench:
    """One process of `vlv ui`.

    Attributes:
        desk: The model and its work.
        reader: Work on many captions, which needs no model and so goes beside.
        flags: Which model.
        dtype: Of its weights.
        folder: Where dropped images and new ones go.
        index: That the Search tab searches; without one there is no such tab.
        closing: What is to be done at the end.
    """

    desk: Desk
    flags: ModelFlags
    dtype: str
    folder: Path
    index: SearchableIndex | None = None
    closing: ExitStack = field(default_factory=ExitStack)
    reader: Desk = field(init=False)
    _albums: dict[str, Album] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reader = Desk(self.desk.pipe)

    def stop(self) -> None:
        """Stop what runs; what is finished is kept."""
        self.desk.stop()
        self.reader.stop()

    def show(self, album: Album) -> None:
        """Let the browser ask for the images of a folder; the oldest of many is forgotten."""
        self._albums[album.key] = album
        while len(self._albums) > MOST_ALBUMS:
            self._albums.pop(next(iter(self._albums)))

    def album(self, key: str) -> Album | None:
        """The folder of a key."""
        return self._albums.get(key)

    def keep_dropped(self, files: Sequence[str]) -> Path:
        """Copy files that the browser has sent into a folder of their own, under their names.

        Raises:
            ConfigError: There are too many, or none.
            OutputError: The disk refuses.
        """
        if not 0 < len(files) <= MOST_DROPPED:
            raise ConfigError(
                f"{len(files)} files were dropped; drop 1 to {MOST_DROPPED}, or type the path of their folder"
            )
        folder = self.folder / time.strftime("dropped-%Y%m%d-%H%M%S")
        taken: set[str] = set()
        for file in files:
            name = _free_name(_UNSAFE.sub("_", Path(file).name).lstrip(".") or "image", taken)
            with replacing(folder / name) as temporary:
                shutil.copyfile(file, temporary)
        return folder

    def keep_one(self, file: str | None) -> tuple[str, str]:
        """Keep a file that was dropped; its path, or nothing where none was, and what to say."""
        kept: list[Path] = []

        def action() -> None:
            if file:
                kept.extend(self.keep_dropped([file]).iterdir())

        said = attempt(action)
        return str(kept[0]) if kept else "", gallery.message(*said)

    def follow(self, work: Work) -> Iterator[Work]:
        """The work now and then, until it has ended."""
        while work.is_running:
            yield work
            time.sleep(POLL)
        yield work

    def close(self) -> None:
        """Stop the work, let go of files."""
        self.desk.close()
        self.reader.close()
        for album in self._albums.values():
            album.close()
        self.closing.close()


def _free_name(name: str, taken: set[str]) -> str:
    """A name whose stem no other has, as text files are named by it."""
    stem, dot, suffix = name.rpartition(".")
    stem, number = stem or suffix, 2
    found = stem
    while found.casefold() in taken:
        found, number = f"{stem}-{number}", number + 1
    taken.add(found.casefold())
    return f"{found}{dot}{suffix}" if dot else found


def attempt(action: Callable[[], str | None]) -> tuple[str, str]:
    """Do something and say how it went: a sentence, and whether it is ``info`` or ``error``."""
    try:
        return action() or "", "info"
    except VLVError as error:
        return " ".join(str(error).split()), "error"
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be used ({error.strerror or error})", "error"
