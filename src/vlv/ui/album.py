"""A folder of images as the workbench shows it: listed by name, opened page by page."""

from __future__ import annotations

import os
import secrets
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlv.data.folders import image_names
from vlv.data.foreign import has_control, printable
from vlv.data.records import Record
from vlv.errors import DataError
from vlv.ui.stores import Store, TextFiles

if TYPE_CHECKING:
    from vlv.ui.filters import Filter

Number = Callable[[int, str, str], float | None]
"""Of an image and its caption, by name: tokens, doubt, score."""


@dataclass(frozen=True)
class Entry:
    """An image with its caption, for the filter."""

    index: int
    path: str
    caption: str
    look_up: Number

    def number(self, name: str) -> float | None:
        """By name; None where it is not known."""
        return self.look_up(self.index, self.caption, name)


class Album:
    """Images of a folder and their captions.

    Args:
        folder: Which.
        recursive: Whether its subfolders belong to it.

    Attributes:
        key: A name that nobody can guess, for addresses.
        names: Of the images, relative to the folder.

    Raises:
        DataError: There is no such folder, or no image in it.
    """

    def __init__(self, folder: Path, recursive: bool = True) -> None:
        self.key = secrets.token_urlsafe(16)
        self.folder, self.recursive = folder, recursive
        self.names = [name for name in image_names(folder, recursive) if not has_control(name)]
        if not self.names:
            raise DataError(
                f"{printable(folder)}: the folder holds no images (shards and tables are captioned by vlv caption)"
            )
        self._twins = _twins(self.names)
        self.store: Store = TextFiles(self._sharing, ".txt")
        self._captions: dict[int, str | None] = {}
        self._lock = threading.RLock()

    @classmethod
    def open(cls, text: str) -> Album:
        """The folder that somebody typed.

        Raises:
            DataError: As the class, or nothing was typed.
        """
        if not text.strip():
            raise DataError("no folder was named; type the path of a folder of images")
        return cls(Path(os.path.abspath(os.path.expanduser(text.strip()))))  # noqa: PTH100, PTH111

    def __len__(self) -> int:
        return len(self.names)

    def record(self, number: int) -> Record:
        """An image."""
        return Record(printable(self.names[number]), self.path(number))

    def path(self, number: int) -> Path:
        """File of an image."""
        return self.folder / self.names[number]

    def use(self, store: Store) -> None:
        """Keep captions elsewhere from now on."""
        self.store.close()
        self.store = store
        self.forget()

    def text_files(self, suffix: str) -> TextFiles:
        """Text files beside the images."""
        return TextFiles(self._sharing, suffix)

    def forget(self, numbers: Iterable[int] | None = None) -> None:
        """Read captions anew, of some images or of all."""
        with self._lock:
            if numbers is None:
                self._captions.clear()
            for number in numbers or ():
                self._captions.pop(number, None)

    def caption(self, number: int) -> str | None:
        """The caption of an image; None where there is none.

        Raises:
            DataError: It cannot be read.
        """
        with self._lock:
            if number in self._captions:
                return self._captions[number]
        caption = self.store.read(self.record(number))
        with self._lock:
            return self._captions.setdefault(number, caption)

    def shown_caption(self, number: int) -> str:
        """The caption; empty where there is none, or it cannot be read."""
        try:
            return self.caption(number) or ""
        except DataError:
            return ""

    def save(self, number: int, caption: str) -> bool:
        """Replace the caption of an image, on disk when this returns; False where it is as it was.

        Raises:
            DataError: What is there cannot be read.
            OutputError: It was changed by somebody else, or cannot be written.
        """
        old, new = self.caption(number), caption.strip() or None
        if new == old:
            return False
        self.store.write(self.record(number), new or "", old)
        self.forget([number])
        return True

    def select(
        self,
        wanted: Filter | None,
        look_up: Number = lambda number, caption, name: None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Sequence[int]:
        """Numbers of the images that pass a filter.

        Args:
            wanted: The filter; None passes all.
            look_up: Numbers that the filter may ask for.
            advance: Told how many more were looked at, now and then.
        """
        if wanted is None:
            return range(len(self.names))
        found = []
        for number, name in enumerate(self.names):
            entry = Entry(number, printable(name), self.shown_caption(number), look_up)
            if wanted(entry):
                found.append(number)
            if number % 256 == 255:
                advance(256)
        return found

    def _sharing(self, record: Record) -> list[Record]:
        """The images with the same text file as one, that one among them."""
        numbers = self._twins.get(os.path.splitext(record.id)[0])  # noqa: PTH122
        return [record] if numbers is None else [self.record(number) for number in numbers]

    def close(self) -> None:
        """Let go of files."""
        self.store.close()


def _twins(names: Sequence[str]) -> dict[str, list[int]]:
    """Images that differ in their suffix alone, by stem."""
    stems: defaultdict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(names):
        stems[os.path.splitext(printable(name))[0]].append(number)  # noqa: PTH122
    return {stem: numbers for stem, numbers in stems.items() if len(numbers) > 1}
