"""Caption many images into a table, into text files beside the images, or both; resumable at any point."""

from __future__ import annotations

import hashlib
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlv.data.texts import known_about
from vlv.errors import ConfigError, DataError, OutputError
from vlv.jobs.caption_settings import CHECK_COLUMNS, INCLUDE_COLUMNS
from vlv.jobs.formats import TABLE_SUFFIXES
from vlv.jobs.inputs import (
    BatchSize,
    Opened,
    Reader,
    check_embeddings,
    embeddings,
    file_stat,
    good_items,
)
from vlv.jobs.outputs import METADATA, TarShards, write_metadata
from vlv.jobs.sidecars import Sidecars, Text
from vlv.jobs.table import GrowingTable
from vlv.jobs.tally import Tally
from vlv.models.arguments import nearest, present
from vlv.models.draws import mixed_seed
from vlv.models.words import missing_words
from vlv.storage import Json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vlv.data.records import Record
    from vlv.jobs.caption_settings import CaptionSettings
    from vlv.jobs.formats import Row
    from vlv.jobs.table import OnExisting
    from vlv.models.decoding import Caption
    from vlv.models.pipeline import VLVPipeline

IMAGES_PER_TAR = 1000
Format = Literal["table", "webdataset", "imagefolder"]


@dataclass(frozen=True)
class CaptionOutput:
    """Where captions go, and what becomes of those that are there.

    Attributes:
        path: A ``.jsonl``, ``.parquet`` or ``.csv`` file, or a folder for the other formats; None writes no table.
        format: ``webdataset`` adds tar shards of images and captions to the table, and ``imagefolder`` the file
            ``metadata.jsonl``; both tables are ``captions.jsonl`` in the folder.
        sidecar: Suffix of the text files beside the images, or None.
        on_existing: What to do with captions that are there.
        on_changed: Whether an image that changed since it was captioned keeps its caption, or gets a new one.
    """

    path: Path | None = None
    format: Format = "table"
    sidecar: str | None = None
    on_existing: OnExisting = "skip"
    on_changed: Literal["skip", "redo"] = "skip"

    def __post_init__(self) -> None:
        if self.format != "table":
            self._check_folder()
        elif self.path is not None and self.path.suffix not in TABLE_SUFFIXES:
            raise OutputError(
                f"{self.path} must end in {', '.join(TABLE_SUFFIXES)}, or be a folder with --format"
            )
        if self.on_changed == "redo" and self.path is None:
            raise ConfigError(
                "--on-changed redo has no effect without --output, which knows the images by size, time and hash"
            )

    def _check_folder(self) -> None:
        if self.path is None:
            raise ConfigError(f"--format {self.format} needs a folder: --output FOLDER")
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file; --format {self.format} writes a folder")
        metadata = self.path / METADATA
        if self.format == "imagefolder" and metadata.exists() and not (self.path / TABLE).exists():
            raise OutputError(f"{metadata} was not written by vlv and is kept; move it away")

    @property
    def table(self) -> Path | None:
        """The file of the table."""
        return self.path / TABLE if self.path and self.format != "table" else self.path


TABLE = "captions.jsonl"


def key(record: Record) -> tuple[str, str]:
    """What identifies a record in the table."""
    return record.id, record.name


class CaptionJob:
    """The captions that are asked for, those that are there, and the way to make the rest.

    Building it reads and checks, and writes nothing: `todo` and `skipped` are what a dry run shows.

    Attributes:
        todo: Images that will be captioned.
        refused: Images that cannot be, and why: their captions would share a file.
        skipped: How many have their captions already.
        changed: How many of all have changed since they were captioned.

    Raises:
        OutputError: The output cannot be used as it stands.
    """

    def __init__(
        self, records: Sequence[Record], settings: CaptionSettings, output: CaptionOutput
    ) -> None:
        self.settings, self.output, self._records = settings, output, records
        settings.verification()  # complain now
        if settings.verify is not None and (
            found := next((r for r in records if r.is_embedding), None)
        ):
            raise ConfigError(
                f"{found.name} is a caption embedding; verification compares captions with images, so give the images"
            )
        if output.format == "imagefolder":
            _check_below(records, output.path)
        sidecar, table = output.sidecar, output.table
        self._sidecars = None if sidecar is None else Sidecars(records, sidecar, output.on_existing)
        self._table = (
            None
            if table is None
            else GrowingTable(table, settings.columns, settings.lasting(), output.on_existing)
        )
        collisions = {} if self._sidecars is None else self._sidecars.collisions
        self.changed = 0
        self._old: dict[str, str] = {}  # captions that are made anew, by the id of the image
        todo = [record for record in records if not self._is_done(record)]
        self.todo = [record for record in todo if record.id not in collisions]
        self.refused = [(r, collisions[r.id]) for r in todo if r.id in collisions]
        self.skipped = len(records) - len(todo)

    def _is_done(self, record: Record) -> bool:
        if self._table is None:
            return self._sidecars is not None and self._sidecars.keeps(record)
        row = self._table.get(key(record))
        if row is None or not has_changed(record, row):
            return row is not None
        self.changed += 1
        if self.output.on_changed == "redo":
            self._old[record.id] = row["caption"]
            return False
        return True

    def run(
        self,
        load: Callable[[], VLVPipeline],
        *,
        batch_size: BatchSize | None = None,
        report: Callable[[Sequence[Row]], None] = lambda rows: None,
    ) -> Tally:
        """Make the captions that are missing.

        Args:
            load: Loads the model; called only when there is something to do.
            batch_size: Images captioned together; 32 by default.
            report: Receives the rows of each batch once they are on disk.

        Returns:
            The counts. An interruption leaves everything that was reported on disk.
        """
        load = self._checking(load)
        redone = len(self._old)
        tally = Tally(skipped=self.skipped, changed=self.changed - redone, redone=redone)
        with nullcontext() if self._table is None else self._table.filling():
            if self._table is not None and self._sidecars is not None:
                self._sidecars.write(self._missing_sidecars())
            if self.refused:
                report(self._refuse(tally))
            for rows in self._rows(load, batch_size or BatchSize(32), tally) if self.todo else ():
                report(rows)
        self._export()
        return tally

    def _checking(self, load: Callable[[], VLVPipeline]) -> Callable[[], VLVPipeline]:
        """Load at once a model that must know a style or take a prompt: one that does not leaves no table behind.

        Raises:
            ConfigError: The model was not taught it.
        """
        from vlv.models.decoding import Generation

        styles, prompt, words = self.settings.styles, self.settings.prompt, self.settings.words
        column = self.settings.context_column
        if not self.todo or not (styles or prompt or words or column):
            return load
        pipe = load()
        captioner = present(pipe.caption_decoder, "caption_decoder")
        for style in styles or (None,):
            how = Generation(style=style, prompt=prompt, words=words, known=column)
            captioner.instructions(how, 1)
        return lambda: pipe

    def _missing_sidecars(self) -> Iterator[Text]:
        """Captions that stand in the table but perhaps not yet beside their image."""
        for record in self._records:
            row = None if self._table is None else self._table.get(key(record))
            if row is not None and record.id not in self._old:
                yield Text(record, [row["caption"]])

    def _refuse(self, tally: Tally) -> list[Row]:
        rows = [self._row(Opened(record, error=why), ()) for record, why in self.refused]
        tally.failed += len(rows)
        if self._table is not None:
            self._table.append(rows)
        return rows

    def _rows(
        self, load: Callable[[], VLVPipeline], size: BatchSize, tally: Tally
    ) -> Iterator[list[Row]]:
        pipe = load()
        check_embeddings(pipe, self.todo)
        tally.restart()
        with Reader(self.todo, pipe.image_size, pipe.framing) as reader:
            while opened := reader.take(size.now):
                batch = list(map(self._checked, opened))
                began = time.monotonic()
                found = iter(caption_images(pipe, batch, self.settings, size))
                captions = [next(found) if item.error is None else () for item in batch]
                size.measured(len(batch), time.monotonic() - began)
                rows = [self._row(*pair) for pair in zip(batch, captions, strict=True)]
                self._save(batch, rows)
                for several in captions:
                    tally.failed += not several
                    tally.done += bool(several)
                    tally.truncated += not all(caption.finished for caption in several)
                yield rows

    def _checked(self, item: Opened) -> Opened:
        """An image whose field of what is known makes no sense fails alone."""
        try:
            known_about(item.record, self.settings.context_column)
        except DataError as error:
            return replace(item, error=item.error or str(error))
        return item

    def _save(self, batch: Sequence[Opened], rows: Sequence[Row]) -> None:
        """Text files first: what the table holds is done."""
        if self._sidecars is not None:
            self._sidecars.write(
                Text(item.record, [row["caption"]], self._old.get(item.record.id))
                for item, row in zip(batch, rows, strict=True)
                if row["caption"] is not None
            )
        if self._table is not None:
            self._table.append(rows)

    def _row(self, item: Opened, captions: Sequence[Caption]) -> Row:
        """The row of an image with its captions, one for each style; without any, of what failed."""
        caption = captions[0] if captions else None
        finished, wording = all(x.finished for x in captions), self.settings.wording
        texts: list[str | None] = [wording.apply(x.text) for x in captions]
        texts = texts or [None] * len(self.settings.styles)
        columns = self.settings.style_columns.values()
        width, height = item.size or (None, None)
        file_size, mtime = item.stat or (None, None)
        return {
            "id": item.record.id,
            "file_name": item.record.name,
            "caption": texts[0] if captions else None,
            "n_tokens": caption and caption.num_tokens,
            "finish_reason": caption and ("stop" if finished else "length"),
            "model": self.settings.model,
            "seed": self.settings.seed,
            "width": width,
            "height": height,
            "sha256": item.sha256,
            "file_size": file_size,
            "mtime_ns": mtime,
            **(dict(zip(columns, texts, strict=True)) if columns else {}),
            **(self._check(caption) if self.settings.verify is not None else {}),
            **(self._inclusion(captions, texts) if self.settings.include else {}),
            "error": item.error,
        }

    def _check(self, caption: Caption | None) -> Row:
        check = None if caption is None else caption.check
        if check is None:
            return dict.fromkeys(CHECK_COLUMNS)
        return {"score": check.score, "margin": check.margin, "n_candidates": check.num_candidates}

    def _inclusion(self, captions: Sequence[Caption], texts: Sequence[str | None]) -> Row:
        """Of the texts as they are written, which may be cut."""
        if not captions:
            return dict.fromkeys(INCLUDE_COLUMNS)
        lacking = [missing_words(self.settings.include, text or "") for text in texts]
        missing = [word for word in self.settings.include if any(word in some for some in lacking)]
        bias = max(caption.include_bias for caption in captions)
        return {"missing_words": ", ".join(missing) or None, "include_bias": bias}

    def _export(self) -> None:
        """Write the files of the format from the rows of the table."""
        folder = self.output.path
        if folder is None or self._table is None or self.output.format == "table":
            return
        rows = ((record, self._table.get(key(record))) for record in self._records)
        pairs = ((record, row) for record, row in rows if row is not None)
        if self.output.format == "imagefolder":
            write_metadata(folder, pairs)
        else:
            TarShards(folder).write_all(pairs, IMAGES_PER_TAR)


def _check_below(records: Sequence[Record], folder: Path | None) -> None:
    """An imagefolder describes the images below it."""
    root = Path(folder or "").resolve()
    for record in records:
        if not isinstance(record.source, Path) or root not in record.source.resolve().parents:
            raise OutputError(
                f"{record.name} is no file below {root}; an imagefolder describes the images in its own folder "
                "(--format webdataset packs images of any kind)"
            )


def check_known(records: Sequence[Record], column: str | None) -> None:
    """Refuse a field of what is known that no record has.

    Raises:
        ConfigError: None of them has it.
    """
    if column is None:
        return
    names: set[str] = set()
    for record in records:
        meta = record.meta or {}
        if column in meta or (column == "caption" and record.caption):
            return
        names |= meta.keys()
    hint = nearest(column, sorted(names)) if names else "they have no fields"
    raise ConfigError(f"no image has a field {column!r:.60}; {hint}")


def has_changed(record: Record, row: Row) -> bool:
    """Whether an image is another one than a row describes: by size and time, in doubt by its hash."""
    stat = file_stat(record)
    if stat is None or stat == (row.get("file_size"), row.get("mtime_ns")):
        return False
    try:
        return bool(hashlib.sha256(record.open()).hexdigest() != row["sha256"])
    except DataError:
        return True


def caption_images(
    pipe: VLVPipeline, batch: Sequence[Opened], settings: CaptionSettings, batch_size: BatchSize
) -> list[tuple[Caption, ...]]:
    """Captions of the good inputs of a batch, in order, one for each style.

    A sampled caption has draws of its own, made of the given seed and of its image's id.
    """
    options: Json = {}
    if settings.samples:
        options = {
            "do_sample": True,
            "temperature": settings.temperature or 1.0,
            "top_p": settings.top_p or 1.0,
        }
    how = settings.verification()
    styles: list[str | None] = [*settings.styles] or [None]

    def describe(items: Sequence[Opened]) -> list[tuple[Caption, ...]]:
        z = embeddings(pipe, items)
        written = [
            pipe.describe(
                images=None if how is None else [present(item.image, "image") for item in items],
                z=z,
                verify=how,
                batch_size=len(items),
                max_new_tokens=settings.max_new_tokens,
                num_beams=settings.num_beams,
                early_stopping=settings.early_stopping,
                tidy=settings.tidy,
                seed=[mixed_seed(settings.seed, item.record.id) for item in items],
                style=style,
                prompt=settings.prompt,
                words=settings.words,
                known=[known_about(item.record, settings.context_column) for item in items],
                schema=settings.schema,
                include=settings.include,
                exclude=settings.exclude,
                **options,
            )
            for style in styles
        ]
        return list(zip(*written, strict=True))

    return batch_size.run(describe, good_items(batch))
