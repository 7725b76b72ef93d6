"""What one browser window looks at: a folder, a filter, a page, an image, and what is marked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlv.errors import ConfigError, VLVError
from vlv.ui.album import Album
from vlv.ui.doubts import Verdicts
from vlv.ui.filters import parse_filter
from vlv.ui.stores import Table
from vlv.ui.tokens import count_tokens

if TYPE_CHECKING:
    from vlv.jobs.caption_settings import CaptionSettings
    from vlv.jobs.formats import Row
    from vlv.models.pipeline import VLVPipeline
    from vlv.ui.replace import Replacement

PAGE = 24
"""Images of a page."""
Scope = Literal["this image", "marked", "all shown"]


class View:
    """The state of the caption tab.

    Attributes:
        album: The folder that is open; None before one is.
        shown: Numbers of the images that pass the filter.
        filter: As it was typed.
        position: Of the image that is looked at, among those shown.
        marks: Numbers of the images that are marked.
        text: Its caption when it was put into the editor.
        lock: Keys may come faster than they are answered.
    """

    def __init__(self) -> None:
        self.album: Album | None = None
        self.verdicts: Verdicts | None = None
        self.shown: Sequence[int] = ()
        self.filter = ""
        self.position = 0
        self.marks: set[int] = set()
        self.text = ""
        self.lock = threading.RLock()

    def __deepcopy__(self, memo: object) -> View:
        return View()  # for Gradio, which gives each window a copy of the first one

    # --- which images ----------------------------------------------------------------------------

    def open(self, album: Album) -> None:
        """Look at another folder."""
        if self.album is not None:
            self.album.close()
        self.album, self.verdicts = album, Verdicts(album.folder)
        self.shown, self.filter, self.position = range(len(album)), "", 0
        self.marks.clear()
        self._take_text()

    @property
    def opened(self) -> Album:
        """The folder.

        Raises:
            ConfigError: None is open.
        """
        if self.album is None:
            raise ConfigError("no folder is open; type its path and press Enter, or drop images")
        return self.album

    def keep_in(self, target: str, settings: CaptionSettings) -> None:
        """Choose where captions are kept: a suffix such as `.txt`, or a `.jsonl` table, relative to the folder.

        Raises:
            OutputError: It is neither.
        """
        album, target = self.opened, target.strip()
        if target.endswith(".jsonl"):
            album.use(Table(album.folder / Path(target).expanduser(), settings))
        else:
            album.use(album.text_files(target))
        self._take_text()

    def apply_filter(
        self,
        text: str,
        load: Callable[[], VLVPipeline],
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Show the images that pass a filter.

        Args:
            text: The filter; empty shows all.
            load: Gives the model, whose tokenizer may be asked for.
            advance: See `Album.select`.

        Raises:
            ConfigError: The filter makes no sense.
        """
        wanted, current = parse_filter(text), self.number

        def look_up(number: int, caption: str, name: str) -> float | None:
            if name == "tokens":
                counts = count_tokens(load(), caption) if caption else []
                return float(counts[0].tokens) if counts else None
            row = self.verdict(number, caption)
            return None if row is None else row[name]

        self.shown = self.opened.select(wanted, look_up, advance)
        self.filter = text.strip()
        self.position = self.shown.index(current) if current in self.shown else 0
        self._take_text()

    def refresh(self) -> None:
        """Read captions anew."""
        self.opened.forget()
        self._take_text()

    # --- the image that is looked at -------------------------------------------------------------

    @property
    def number(self) -> int | None:
        """Number of the image; None where none is shown."""
        return self.shown[self.position] if self.position < len(self.shown) else None

    @property
    def error(self) -> str | None:
        """Why its caption cannot be read; None where it can."""
        try:
            if self.number is not None:
                self.opened.caption(self.number)
        except VLVError as error:
            return str(error)
        return None

    def verdict(self, number: int, caption: str) -> Row | None:
        """What `vlv verify` said of a caption of an image."""
        if self.verdicts is None or not caption:
            return None
        return self.verdicts.find(self.opened.record(number).id, caption)

    def go(self, position: int) -> None:
        """Look at another image, the nearest there is."""
        self.position = max(0, min(position, len(self.shown) - 1))
        self._take_text()

    def look_at(self, number: int) -> None:
        """Look at the image of a number, where it is shown."""
        if number in self.shown:
            self.go(self.shown.index(number))

    def _take_text(self) -> None:
        number = self.number
        self.text = "" if number is None else self.opened.shown_caption(number)

    def is_edited(self, text: str, of: str) -> bool:
        """Whether the editor holds another caption of the image that is looked at."""
        return of == self.key and text.strip() != self.text.strip()

    @property
    def key(self) -> str:
        """A name of the image that is looked at, for what the browser sends back."""
        return "" if self.number is None else f"{self.opened.key}:{self.number}"

    def save(self, text: str, of: str) -> bool:
        """Save what the editor holds, unless it was not changed; returns whether it was.

        Args:
            text: What the editor holds.
            of: The `key` of the image whose caption it is. A browser that is slower than the keys may still hold that of the
                image before, which was saved when it was left.

        Raises:
            VLVError: It cannot be saved; what is on disk stays as it is.
        """
        if self.number is None or not self.is_edited(text, of):
            return False
        saved = self.opened.save(self.number, text)
        self._take_text()
        return saved

    # --- pages and marks -------------------------------------------------------------------------

    @property
    def page(self) -> int:
        """Number of the page, from 0."""
        return self.position // PAGE

    @property
    def num_pages(self) -> int:
        """How many there are."""
        return max(1, -(-len(self.shown) // PAGE))

    def on_page(self) -> Iterator[tuple[int, int]]:
        """Position and number of the images of the page."""
        start = self.page * PAGE
        for position in range(start, min(start + PAGE, len(self.shown))):
            yield position, self.shown[position]

    def turn(self, pages: int) -> None:
        """Go on by pages."""
        self.go(max(0, min(self.page + pages, self.num_pages - 1)) * PAGE)

    def mark(self, number: int) -> None:
        """Mark an image, or take the mark away."""
        self.marks ^= {number}

    def mark_shown(self) -> None:
        """Mark all images that are shown; where all are marked already, none of them."""
        shown = set(self.shown)
        self.marks = self.marks - shown if shown <= self.marks else self.marks | shown

    def scope(self, name: str) -> list[int]:
        """Numbers of the images that something is to be done with.

        Raises:
            ConfigError: There are none.
        """
        found = {
            "this image": [] if self.number is None else [self.number],
            "marked": sorted(self.marks),
            "all shown": list(self.shown),
        }[name]
        if not found:
            reason = (
                "no image is marked; mark some with x" if name == "marked" else "no image is shown"
            )
            raise ConfigError(reason)
        return found

    # --- find and replace ------------------------------------------------------------------------

    def changes(self, numbers: Sequence[int], how: Replacement) -> Iterator[tuple[int, str, str]]:
        """Images whose caption a replacement changes, with the caption before and after."""
        for number in numbers:
            old = self.opened.shown_caption(number)
            if old and (new := how.apply(old)) != old:
                yield number, old, new
