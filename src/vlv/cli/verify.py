"""``vlv verify``."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlv.cli import common, shared
from vlv.cli.options import option_group, options, takes_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlv.jobs.caption_files import Captioned
    from vlv.jobs.formats import Row
    from vlv.jobs.verify import VerifyJob, VerifySettings
    from vlv.models.calibration import Calibration
    from vlv.models.folder import Task
    from vlv.models.placement import Placement


@option_group("Captions")
class CaptionsOptions:
    """Which captions are judged."""

    captions: Annotated[
        Path | None,
        typer.Option(
            help="Table of captions by any tool: .jsonl, .csv or .parquet; without it, those that lie beside the images or in their table."
        ),
    ] = None
    caption_column: Annotated[
        str | None, typer.Option(help="Its column of captions; caption or text by default.")
    ] = None
    id_column: Annotated[
        str | None,
        typer.Option(
            help="Its column with the image's id, path or name; the usual names by default."
        ),
    ] = None
    claims: Annotated[
        Literal["auto", "toyworld", "none"],
        typer.Option(
            help="Grammar that reads claims out of captions; auto takes what the model was calibrated with."
        ),
    ] = "auto"
    calibration: Annotated[
        Path | None, typer.Option(help="Probabilities of doubt; MODEL/doubts.json by default.")
    ] = None

    def find(self, source: common.InputOptions) -> list[Captioned]:
        """Images with their captions."""
        from vlv.errors import ConfigError
        from vlv.jobs.caption_files import join_captions, own_captions

        records = replace(source, limit=None).find(self.caption_column, detail="texts")
        if self.captions is None:
            if self.id_column is not None:
                raise ConfigError("--id-column has no effect without --captions")
            return own_captions(records)[: source.limit]
        found = join_captions(
            records,
            self.captions,
            caption_column=self.caption_column,
            id_column=self.id_column,
        )
        return found[: source.limit]


@option_group("Scoring")
class ScoringOptions:
    """At which noise captions are scored."""

    timesteps: Annotated[
        int,
        typer.Option(
            min=1, help="Noise levels; each costs one pass of the denoiser for each text."
        ),
    ] = 3
    seed: common.Seed = 0


@options
class VerifyOptions:
    """Options of ``vlv verify``."""

    source: common.InputOptions
    texts: CaptionsOptions
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="FILE.jsonl, FILE.parquet or FILE.csv; - prints JSON lines. A folder, or the URL of one, is shared by "
            "many workers.",
            rich_help_panel="Output",
        ),
    ] = None
    on_existing: Annotated[
        Literal["skip", "overwrite", "append", "error"],
        typer.Option(help="What to do with results that exist already.", rich_help_panel="Output"),
    ] = "skip"
    fix: Annotated[
        bool,
        typer.Option(
            "--fix",
            help="Propose each caption with the best exchange in a doubtful sentence, or without it: column fixed.",
            rich_help_panel="Output",
        ),
    ] = False
    page: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Write the most doubtful captions beside image and reconstruction.",
            rich_help_panel="Output",
        ),
    ] = None
    scoring: ScoringOptions
    model: common.ModelOptions
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Images whose captions are judged together.",
            rich_help_panel="Model and device",
        ),
    ] = "8"
    workers: shared.WorkerOptions

    def settings(self, dtype: str) -> VerifySettings:
        """Everything that a verdict depends on, besides the image and its caption."""
        from vlv.jobs.verify import VerifySettings
        from vlv.models.scoring import Scoring

        calibration = self._calibration()
        claims = calibration.claims if self.texts.claims == "auto" else self.texts.claims
        return VerifySettings(
            self.model.name,
            calibration,
            self.model.revision,
            Scoring(timesteps=self.scoring.timesteps, seed=self.scoring.seed),
            None if claims == "none" else claims,
            self.fix,
            dtype,
        )

    def _calibration(self) -> Calibration:
        from vlv.jobs.verify import find_calibration

        found, note = find_calibration(
            self.model.model,
            self.model.revision,
            self.texts.calibration,
            shipped=common.SHIPPED_MODEL,
        )
        if note is not None:
            common.say(f"note: {note}")
        return found


@takes_options
def verify(given: VerifyOptions) -> int:
    """Ask the frozen decoder which captions, sentences and claims are wrong, whoever wrote them.

    Each caption gets a score, each sentence (and each claim where the grammar is known) a probability of being wrong.
    Nothing is drawn. An interrupted run goes on where it stopped when the same command is given again.
    """
    from vlv.errors import OutputError
    from vlv.jobs.inputs import BatchSize
    from vlv.jobs.verify import VerifyJob
    from vlv.jobs.verify_page import make_page
    from vlv.storage import check_writable, write_text
    from vlv.toyworld.claims import find_grammar

    size, placement = BatchSize.parse(given.batch_size), given.model.placement()
    if shared.is_shared(given.output, given.workers):
        return _share(given, placement)
    output = None if given.output in {None, "-"} else Path(str(given.output))
    page = given.page
    if page is not None and (page.is_dir() or page.suffix != ".html"):
        raise OutputError(f"{page} must be a file that ends in .html")
    check_writable(page)
    captions = given.texts.find(given.source)
    settings = given.settings(common.dtype_name(placement))
    job = VerifyJob(captions, settings, output, given.on_existing, find_grammar(settings.claims))
    tasks: list[Task] = ["embed", "generate", *(["reconstruct"] if page else [])]  # type: ignore[list-item]
    load = cache(lambda: given.model.load(tasks, placement))
    printer = _Printer(job, as_json=given.output == "-", silent=output is not None)
    printer.keeps = page is not None
    with printer.progress:
        tally = job.run(load, batch_size=size, report=printer.report)
    for note in _notes(job):
        common.say(f"note: {note}")
    if page is not None:
        found = ((x.record, printer.kept.get(x.id) or job.row(x)) for x in captions)
        pairs = [(record, row) for record, row in found if record is not None and row is not None]
        title = f"vlv verify: {settings.model}"
        write_text(page, make_page(load(), pairs, settings.calibration, title=title))
    return common.close(tally, output)


def _share(given: VerifyOptions, placement: Placement) -> int:
    from vlv.jobs.shared.operators import VerifyShards
    from vlv.toyworld.claims import find_grammar

    texts = given.texts
    shared.refuse(
        limit=given.source.limit is not None,
        captions=texts.captions is not None,
        id_column=texts.id_column is not None,
        on_existing=given.on_existing != "skip",
        page=given.page is not None,
    )
    settings = given.settings(common.dtype_name(placement))
    operator = VerifyShards(settings, given.batch_size, find_grammar(settings.claims))
    source = given.source.source(texts.caption_column, detail="texts")
    return shared.work_on(
        str(given.output),
        source,
        operator,
        given.workers,
        given.model,
        ["embed", "generate"],
        placement,
    )


def _notes(job: VerifyJob) -> list[str]:
    notes = []
    if job.unread:
        notes.append(
            f"{job.unread} captions make no claim that the grammar {job.settings.claims} knows; "
            "their sentences were judged by leaving words out"
        )
    if job.divided:
        notes.append(
            f"{job.divided} captions are longer than the text tower and were judged in pieces of whole sentences"
        )
    return notes


class _Printer:
    """Shows rows as they come: verdicts on stdout where asked for, failures and progress on stderr."""

    def __init__(self, job: VerifyJob, *, as_json: bool, silent: bool) -> None:
        self._as_json, self._silent = as_json, silent
        self.keeps = False
        self.kept: dict[str, Row] = {}
        self.progress = common.Progress(
            len(job.todo) + len(job.refused), unit="caption", resumable=silent
        )

    def report(self, rows: Sequence[Row]) -> None:
        self.progress.report([row["error"] for row in rows])
        good = [row for row in rows if row["error"] is None]
        if self.keeps:
            self.kept.update((row["id"], row) for row in good)
        if self._as_json:
            for row in rows:
                typer.echo(json.dumps(row, ensure_ascii=False))
        elif not self._silent:
            for row in good:
                text = " ".join(str(row.get("fixed", row["caption"])).split())
                typer.echo(f"{row['file_name']}\t{row['score']:.2f}\t{row['doubt']:.2f}\t{text}")
