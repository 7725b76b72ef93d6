"""What the workbench has captioned, as the command line would: the same inputs, settings and job."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlv.data.source import Source
from vlv.errors import ConfigError, VLVError
from vlv.jobs.caption import CaptionJob, CaptionOutput
from vlv.jobs.caption_settings import CaptionSettings
from vlv.jobs.inputs import BatchSize
from vlv.jobs.wording import Wording
from vlv.storage import write_text
from vlv.ui import commands
from vlv.ui.commands import command, options

if TYPE_CHECKING:
    from vlv.jobs.formats import Row
    from vlv.jobs.table import OnExisting
    from vlv.ui.commands import ModelFlags
    from vlv.ui.desk import Desk, Work
    from vlv.ui.replace import Replacement
    from vlv.ui.view import View
    from vlv.ui.workbench import Workbench

MOST_NAMED = 12
"""Images that a command names itself; more go into a list."""


def as_inputs(paths: Sequence[Path], folder: Path) -> tuple[str, ...]:
    """Images as inputs of a command: by name, or as `@LIST` in a file that is written into a folder.

    Raises:
        OutputError: The list cannot be written.
    """
    if len(paths) <= MOST_NAMED:
        return tuple(map(str, paths))
    text = "".join(f"{path}\n" for path in paths)
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    list_file = folder / f"selection-{digest}.txt"
    write_text(list_file, text)
    return (f"@{list_file}",)


@dataclass(frozen=True)
class CaptionPlan:
    """Captions that are wanted.

    Attributes:
        inputs: A folder, images, or `@LIST`.
        settings: What captions depend on.
        output: Where they go.
        flags: Which model.
        recursive: Whether subfolders are searched.
        batch_size: Images together.
    """

    inputs: tuple[str, ...]
    settings: CaptionSettings
    output: CaptionOutput
    flags: ModelFlags
    recursive: bool = True
    batch_size: int = 8

    @property
    def command(self) -> str:
        """The command that does the same."""
        given, wording, to = self.settings, self.settings.wording, self.output
        return command(
            "vlv",
            "caption",
            *commands.inputs(self.inputs),
            *([] if self.recursive else ["--no-recursive"]),
            *options(
                [
                    ("--output", to.path, None),
                    ("--sidecar", to.sidecar, None),
                    ("--on-existing", to.on_existing, "skip"),
                    ("--max-words", wording.max_words, None),
                    ("--prefix", wording.prefix, None),
                    ("--suffix", wording.suffix, None),
                    ("--trigger", wording.trigger, None),
                    ("--max-new-tokens", given.max_new_tokens, None),
                    ("--num-beams", given.num_beams, 1),
                    ("--temperature", given.temperature, None),
                    ("--seed", given.seed, 0),
                    ("--verify", given.verify, None),
                    ("--batch-size", self.batch_size, 8),
                ]
            ),
            *self.flags.words(),
        )

    def job(self) -> CaptionJob:
        """The job of that command.

        Raises:
            VLVError: The output cannot be used as it stands.
        """
        records = Source(self.inputs, recursive=self.recursive, detail="images").records()
        return CaptionJob(records, self.settings, self.output)

    def run(self, desk: Desk, work: Work) -> str:
        """Write the captions; returns the closing line."""
        work.message = "listing the images"
        job = self.job()
        work.total = len(job.todo) + len(job.refused)
        if job.todo:
            work.message = "loading the model"

        def report(rows: Sequence[Row]) -> None:
            work.advance(len(rows), [row["error"] for row in rows])

        work.check()
        tally = job.run(desk.pipe, batch_size=BatchSize(self.batch_size), report=report)
        return tally.line()


@dataclass(frozen=True)
class Writing:
    """What the form says about captions that the model is to write; empty fields are None, "" or 0."""

    scope: str
    existing: OnExisting
    target: str
    words: float | None = None
    trigger: str = ""
    prefix: str = ""
    suffix: str = ""
    temperature: float | None = None
    seed: float | None = None
    verify: float | None = None

    def settings(self, flags: ModelFlags, dtype: str) -> CaptionSettings:
        """Everything that a caption depends on.

        Raises:
            ConfigError: A number makes no sense.
        """
        return CaptionSettings(
            flags.name,
            flags.revision,
            temperature=self.temperature or None,
            seed=int(self.seed or 0),
            dtype=dtype,
            verify=int(self.verify) if self.verify else None,
            wording=Wording(
                self.prefix or None,
                self.suffix or None,
                self.trigger or None,
                int(self.words) if self.words else None,
            ),
        )

    def plan(self, view: View, bench: Workbench) -> CaptionPlan:
        """The captions that are wanted of what is shown.

        Raises:
            ConfigError: There are none, or a table is to hold a part of a folder.
            OutputError: The list of many images cannot be written.
        """
        album, numbers = view.opened, view.scope(self.scope)
        is_whole, target = len(numbers) == len(album), self.target.strip()
        if target.endswith(".jsonl"):
            if not is_whole:
                raise ConfigError(
                    "a table holds the captions of the whole folder; choose all shown, without a filter, or text files"
                )
            output = CaptionOutput(album.folder / target, on_existing=self.existing)
        else:
            output = CaptionOutput(sidecar=target, on_existing=self.existing)
        paths = [album.path(number) for number in ([] if is_whole else numbers)]
        inputs = (str(album.folder),) if is_whole else as_inputs(paths, bench.folder)
        settings = self.settings(bench.flags, bench.dtype)
        return CaptionPlan(inputs, settings, output, bench.flags, album.recursive)


def replace_all(view: View, numbers: Sequence[int], how: Replacement, work: Work) -> str:
    """Replace in the captions of images, each on disk before the next; returns the closing line."""
    count = 0
    for number in numbers:
        error = None
        try:
            old = view.opened.caption(number)
            if old is not None:
                count += view.opened.save(number, how.apply(old))
        except VLVError as problem:
            error = str(problem)
        work.advance(1, [error])
    failed = f", {len(work.failures)} failed: {work.failures[0]}" if work.failures else ""
    return f"{count} captions changed{failed}"
