"""Caption many images into a table, into text files beside the images, or both; resumable at any point."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlv.errors import ConfigError, OutputError
from vlv.jobs.inputs import file_name, good_images, open_batches
from vlv.jobs.sidecars import Sidecars
from vlv.jobs.table import GrowingTable
from vlv.jobs.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vlv.data.records import Record
    from vlv.jobs.inputs import Opened
    from vlv.jobs.table import OnExisting, Row
    from vlv.models.captioner import Caption
    from vlv.models.pipeline import VLVPipeline

COLUMNS: dict[str, type] = {
    "id": str,
    "file_name": str,
    "caption": str,
    "n_tokens": int,
    "finish_reason": str,  # "stop": the model ended the caption; "length": it was cut off
    "model": str,
    "seed": int,
    "width": int,
    "height": int,
    "sha256": str,
    "error": str,
}


@dataclass(frozen=True)
class CaptionSettings:
    """Everything that a caption depends on, besides the image.

    Attributes:
        model: Name or folder of the model.
        revision: Its revision on the hub.
        max_new_tokens: Longest caption, in tokens of the language model; None is 300, or as many as it has positions for.
        num_beams: Beams of the search; 1 is greedy.
        temperature: Draw the tokens at this temperature; None takes the likeliest.
        top_p: Draw among the likeliest tokens that hold this share of the probability.
        seed: Seed of the draws.
        early_stopping: End the search as soon as enough beams have ended.
        tidy: Drop repeated and unfinished sentences; None does where the model does not end by itself.
        dtype: Of the weights, such as bfloat16.
        llm_bits: Bits of the language model's weights; None is those of `dtype`.
    """

    model: str
    revision: str | None = None
    max_new_tokens: int | None = None
    num_beams: int = 1
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    early_stopping: bool = False
    tidy: bool | None = None
    dtype: str = "float32"
    llm_bits: int | None = None

    def __post_init__(self) -> None:
        if self.early_stopping and self.num_beams == 1:
            raise ConfigError("early_stopping has no effect on one beam; raise num_beams")
        for name in ("max_new_tokens", "num_beams"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or more")
        if self.temperature is not None and self.temperature <= 0:
            raise ConfigError(
                f"temperature is {self.temperature}; it must be above 0 (leave it out for the likeliest caption)"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must lie in (0, 1]")

    @property
    def draws(self) -> bool:
        """Whether chance has a part in the caption."""
        return self.temperature is not None or self.top_p is not None


def key(record: Record) -> tuple[str, str]:
    """What identifies a record in the table."""
    return record.id, file_name(record)


class CaptionJob:
    """The captions that are asked for, those that are there, and the way to make the rest.

    Building it reads and checks, and writes nothing: `todo` and `skipped` are what a dry run shows.

    Args:
        records: Images to caption.
        settings: What the captions depend on.
        output: A ``.jsonl`` or ``.parquet`` file, or None.
        sidecar: Suffix of the text files beside the images, or None.
        on_existing: What to do with captions that are there.

    Raises:
        OutputError: The output cannot be used as it stands.
    """

    def __init__(
        self,
        records: Sequence[Record],
        settings: CaptionSettings,
        *,
        output: Path | None = None,
        sidecar: str | None = None,
        on_existing: OnExisting = "skip",
    ) -> None:
        if output is not None and output.suffix not in {".jsonl", ".parquet"}:
            raise OutputError(f"{output} must end in .jsonl or .parquet")
        self.settings = settings
        self._sidecars = None if sidecar is None else Sidecars(records, sidecar, on_existing)
        self._table = (
            None if output is None else GrowingTable(output, COLUMNS, asdict(settings), on_existing)
        )
        self.todo = [record for record in records if not self._is_done(record)]
        self._known = self._sidecars_to_fill(records)
        self.skipped = len(records) - len(self.todo)

    def _is_done(self, record: Record) -> bool:
        if self._table is not None:
            return key(record) in self._table.done
        return self._sidecars is not None and self._sidecars.keeps(record)

    def _sidecars_to_fill(self, records: Sequence[Record]) -> list[tuple[Record, str]]:
        """Captions that stand in the table but not yet beside their image."""
        if self._table is None or self._sidecars is None:
            return []
        done = self._table.done
        return [(record, done[key(record)]["caption"]) for record in records if key(record) in done]

    def run(
        self,
        load: Callable[[], VLVPipeline],
        *,
        batch_size: int = 8,
        report: Callable[[Sequence[Row]], None] = lambda rows: None,
    ) -> Tally:
        """Make the captions that are missing.

        Args:
            load: Loads the model; called only when there is something to do.
            batch_size: Images captioned together.
            report: Receives the rows of each batch once they are on disk.

        Returns:
            The counts. An interruption leaves everything that was reported on disk.
        """
        tally = Tally(skipped=self.skipped)
        try:
            if self._table is not None:
                self._table.start()
            for record, caption in self._known:
                self._write_sidecar(record, caption)
            for rows in self._rows(load, batch_size, tally) if self.todo else ():
                report(rows)
            if self._table is not None:
                self._table.finish()
        finally:
            if self._table is not None:
                self._table.close()
        return tally

    def _rows(
        self, load: Callable[[], VLVPipeline], batch_size: int, tally: Tally
    ) -> Iterator[list[Row]]:
        pipe = load()
        tally.restart()
        for batch in open_batches(self.todo, batch_size, pipe.image_size, pipe.framing):
            captions = iter(caption_images(pipe, batch, self.settings))
            rows = []
            for item in batch:
                caption = next(captions) if item.error is None else None
                if caption is not None:
                    self._write_sidecar(item.record, caption.text)
                rows.append(self._row(item, caption))
                _count(tally, caption)
            if self._table is not None:
                self._table.append(rows)
            yield rows

    def _write_sidecar(self, record: Record, caption: str) -> None:
        if self._sidecars is not None:
            self._sidecars.write(record, caption)

    def _row(self, item: Opened, caption: Caption | None) -> Row:
        width, height = item.size or (None, None)
        return {
            "id": item.record.id,
            "file_name": file_name(item.record),
            "caption": caption and caption.text,
            "n_tokens": caption and caption.num_tokens,
            "finish_reason": caption and ("stop" if caption.finished else "length"),
            "model": self.settings.model,
            "seed": self.settings.seed,
            "width": width,
            "height": height,
            "sha256": item.sha256,
            "error": item.error,
        }


def _count(tally: Tally, caption: Caption | None) -> None:
    if caption is None:
        tally.failed += 1
    else:
        tally.done += 1
        tally.truncated += not caption.finished


def caption_images(
    pipe: VLVPipeline, batch: Sequence[Opened], settings: CaptionSettings
) -> list[Caption]:
    """Captions of the good images of a batch, in order.

    Drawn captions depend on the other images of the batch, so each batch has a seed of its own, made of
    the given one and of the first image.
    """
    images = good_images(batch)
    if not images:
        return []
    options: dict[str, Any] = {}
    if settings.draws:
        options = {
            "do_sample": True,
            "temperature": settings.temperature or 1.0,
            "top_p": settings.top_p or 1.0,
            "seed": _batch_seed(settings.seed, batch[0].record.id),
        }
    return pipe.describe(
        images,
        batch_size=len(images),
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        early_stopping=settings.early_stopping,
        tidy=settings.tidy,
        **options,
    )


def _batch_seed(seed: int, first_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {first_id}".encode()).digest()[:4], "big")
