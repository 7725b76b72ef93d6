"""One person's ballot in an arena: blind, saved vote by vote where `vlv eval score` reads it."""

from __future__ import annotations

import shlex
import threading
from contextlib import ExitStack
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from vlv.errors import ConfigError
from vlv.evaluation.experiments.rating import Ballot, open_ballot
from vlv.evaluation.experiments.run import Run
from vlv.storage import Json
from vlv.ui.commands import command

if TYPE_CHECKING:
    from vlv.evaluation.experiments.arena import Mode
    from vlv.jobs.table import GrowingTable


class Arena:
    """The ballot of one person at a time.

    Attributes:
        mode: What is judged.
        rater: Who judges.
        item: What the page shows, as `Ballot.next` gave it; None before a run is open.
    """

    def __init__(self) -> None:
        self.mode: Mode = "pairs"
        self.rater = ""
        self.item: Json | None = None
        self.run: Run | None = None
        self._ballot: Ballot | None = None
        self._table: GrowingTable | None = None
        self._open = ExitStack()
        self._lock = threading.Lock()

    def start(self, folder: str, rater: str, mode: Mode) -> str:
        """Begin, or go on with, the judgements of a person.

        Raises:
            VLVError: There is no such run, or it cannot be judged.
        """
        with self._lock:
            self._close()
            self.run, self.item = None, None
            if not folder.strip():
                raise ConfigError(
                    "no run was named; type the folder that vlv eval predict arena wrote"
                )
            run = Run.open(Path(folder.strip()).expanduser().absolute())
            self.mode, self.rater = mode, rater.strip()
            ballot, self._table = self._open.enter_context(open_ballot(run, self.rater, mode))
            self.run, self._ballot, self.item = run, ballot, ballot.next()
        return ""

    def vote(self, value: int | str | None) -> str:
        """Write down a judgement of the item that is shown, and go on.

        Raises:
            VLVError: It cannot be saved.
        """
        with self._lock:
            if self._ballot is None or self.item is None or "item" not in self.item:
                raise ConfigError("there is nothing to be judged; open a run first")
            try:
                self._ballot.vote(self.item["item"], value)
            except ValueError as error:
                raise ConfigError(str(error)) from error
            self.item = self._ballot.next()
            if "item" in self.item or self.run is None or self._table is None:
                return ""
            folder = self.run.folder
            self._close()
            return f"all is judged and saved; next: vlv eval score {shlex.quote(str(folder))}"

    def close(self) -> None:
        """Keep the votes."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        self._open.close()
        self._ballot, self._table = None, None

    @property
    def line(self) -> str:
        """How far it is."""
        if self.item is None:
            return ""
        done = self.item["total"] - self.item["left"]
        return f"{done} of {self.item['total']} judged"

    @property
    def html(self) -> str:
        """Image and captions, without names."""
        if self.item is None or "item" not in self.item:
            return ""
        texts = "".join(f"<p>{escape(text)}</p>" for text in self.item["captions"])
        source = f"data:image/png;base64,{self.item['picture']}"
        return (
            f'<div class="vlv-picture"><img src="{source}" alt="the image that is described"></div>'
            f'<div class="vlv-texts">{texts}</div>'
        )

    @property
    def command(self) -> str:
        """The command that goes on with it."""
        if self.run is None:
            return ""
        words = ["vlv", "eval", "rate", str(self.run.folder), "--rater", self.rater]
        return command(*words, *(["--pairs"] if self.mode == "pairs" else []))
