"""Doubts about captions: judged one by one or as a whole folder, and shown as underlined words."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from vlv.data.source import Source
from vlv.jobs.caption_files import Captioned, join_captions, own_captions
from vlv.jobs.formats import read_rows
from vlv.jobs.inputs import BatchSize
from vlv.jobs.verify import VerifyJob, VerifySettings, find_calibration
from vlv.jobs.verify_page import doubtful_stretches, proposals, split_words
from vlv.toyworld.claims import find_grammar
from vlv.ui import commands
from vlv.ui.commands import command, options

if TYPE_CHECKING:
    from vlv.data.records import Record
    from vlv.jobs.formats import Row
    from vlv.ui.commands import ModelFlags
    from vlv.ui.desk import Desk, Work

TABLE = "doubts.jsonl"
"""In the folder of the images."""


@lru_cache(maxsize=1)
def settings_of(flags: ModelFlags, dtype: str, shipped: str = "vlv-tiny") -> VerifySettings:
    """How a model judges captions, as `vlv verify` does by default.

    Raises:
        ConfigError: It has no calibration.
    """
    calibration, _ = find_calibration(flags.model, flags.revision, shipped=shipped)
    return VerifySettings(
        flags.name, calibration, flags.revision, claims=calibration.claims, dtype=dtype
    )


@dataclass(frozen=True)
class VerifyPlan:
    """Verdicts that are wanted of the captions of a folder.

    Attributes:
        folder: Of the images.
        recursive: Whether its subfolders belong to it.
        captions: Table of the captions; None takes the text files beside the images.
        settings: What verdicts depend on.
        flags: Which model.
        batch_size: Images together.
    """

    folder: Path
    recursive: bool
    captions: Path | None
    settings: VerifySettings
    flags: ModelFlags
    batch_size: int = 8

    @property
    def output(self) -> Path:
        """The table of verdicts."""
        return self.folder / TABLE

    @property
    def command(self) -> str:
        """The command that does the same."""
        return command(
            "vlv",
            "verify",
            *commands.inputs([str(self.folder)]),
            *([] if self.recursive else ["--no-recursive"]),
            *options([("--captions", self.captions, None), ("--output", self.output, None)]),
            *options([("--batch-size", self.batch_size, 8)]),
            *self.flags.words(),
        )

    def run(self, desk: Desk, work: Work) -> str:
        """Judge the captions; returns the closing line."""
        work.message = "reading the captions"
        source = Source([str(self.folder)], recursive=self.recursive, detail="texts")
        records = source.records()
        found = (
            own_captions(records)
            if self.captions is None
            else join_captions(records, self.captions)
        )
        captioned = [x for x in found if x.caption is not None or self.captions is not None]
        reader = find_grammar(self.settings.claims)
        job = VerifyJob(captioned, self.settings, self.output, "skip", reader)
        work.total, work.message = len(job.todo) + len(job.refused), "loading the model"

        def report(rows: Sequence[Row]) -> None:
            work.advance(len(rows), [row["error"] for row in rows])

        return job.run(desk.pipe, batch_size=BatchSize(self.batch_size), report=report).line()


def judge_one(desk: Desk, record: Record, caption: str, settings: VerifySettings) -> Row:
    """The verdict on one caption, as a row of `vlv verify`.

    Raises:
        ConfigError: It cannot be judged.
    """
    rows: list[Row] = []
    captioned = Captioned(record.id, record, caption)
    job = VerifyJob([captioned], settings, read_claims=find_grammar(settings.claims))
    job.run(desk.pipe, batch_size=BatchSize(1), report=rows.extend)
    return rows[0]


class Verdicts:
    """The latest verdicts on the captions of a folder.

    Args:
        folder: With the table of `vlv verify`, if there is one.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / TABLE
        self._stamp: int | None = None
        self._table: dict[str, Row] = {}
        self._own: dict[str, Row] = {}

    def keep(self, row: Row) -> None:
        """Remember a verdict until the workbench ends."""
        self._own[row["id"]] = row

    def find(self, id: str, caption: str) -> Row | None:
        """The verdict on this very caption of an image."""
        self._read()
        for rows in (self._own, self._table):
            row = rows.get(id)
            if row is not None and row["caption"] == caption and row.get("error") is None:
                return row
        return None

    def _read(self) -> None:
        try:
            stamp = self._path.stat().st_mtime_ns
        except OSError:
            return
        if stamp != self._stamp:
            self._stamp = stamp
            self._table = {row["id"]: row for row in read_rows(self._path)}


def marked(row: Row, threshold: float) -> str:
    """A caption as HTML, its doubtful words underlined, with what would be better."""
    words = split_words(row["caption"], doubtful_stretches(row, threshold))
    text = "".join(
        f'<span class="doubtful">{html.escape(part)}</span>' if doubtful else html.escape(part)
        for doubtful, part in words
    )
    listed = "".join(f"<li>{html.escape(remark)}</li>" for remark in proposals(row, threshold))
    line = f"score {row['score']:.2f}, doubt {100 * row['doubt']:.0f} %"
    below = f"<ul>{listed}</ul>" if listed else ""
    return f'<div class="vlv-doubts"><p>{text}</p>{below}<p class="vlv-soft">{line}</p></div>'
