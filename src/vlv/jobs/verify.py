"""Verify anybody's captions: a score for each, a doubt for each sentence and claim; resumable at any point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from vlv.errors import ConfigError
from vlv.jobs.inputs import Reader
from vlv.jobs.table import fill, open_table
from vlv.jobs.tally import Tally
from vlv.models.arguments import present
from vlv.models.calibration import CALIBRATION_NAME, Calibration, read_calibration
from vlv.models.doubts import no_claims
from vlv.models.scoring import Scoring

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vlv.data.records import Record
    from vlv.jobs.caption_files import Captioned
    from vlv.jobs.formats import Row
    from vlv.jobs.inputs import BatchSize, Opened
    from vlv.jobs.table import OnExisting
    from vlv.models.doubts import ClaimDoubt, Doubt, ReadClaims, Verdict
    from vlv.models.pipeline import VLVPipeline

COLUMNS: dict[str, type] = {
    "id": str,
    "file_name": str,
    "caption": str,
    "score": float,  # recovered share
    "doubt": float,  # of the most doubtful sentence
    "sentences": list,  # each with text, start, end, doubt
    "claims": list,  # each with text, start, end, fact, doubt, and what the image shows instead
    "n_chunks": int,  # pieces that the text tower read the caption in
    "model": str,
    "seed": int,
    "error": str,
}
MOST_WORDS = 1000
"""Of a caption: every word may cost a pass of the denoiser at every timestep."""


@dataclass(frozen=True)
class VerifySettings:
    """Everything that a verdict depends on, besides the image and its caption.

    Attributes:
        model: Name or folder of the model.
        calibration: From evidence to probabilities.
        revision: Of the model on the hub.
        scoring: Timesteps and noise.
        claims: Name of the grammar that reads claims; None leaves out words.
        fix: Whether a better caption is proposed.
        dtype: Of the weights, such as bfloat16.
    """

    model: str
    calibration: Calibration
    revision: str | None = None
    scoring: Scoring = field(default_factory=Scoring)
    claims: str | None = None
    fix: bool = False
    dtype: str = "float32"

    @property
    def columns(self) -> dict[str, type]:
        """Of the table."""
        return COLUMNS | {"fixed": str} if self.fix else COLUMNS


def find_calibration(
    model: str, revision: str | None, path: Path | None = None, *, shipped: str
) -> tuple[Calibration, str | None]:
    """The probabilities of a model's doubts.

    Args:
        model: Name or folder of the model.
        revision: On the hub.
        path: A file that was named; None takes the model's own, or else that of the shipped model.
        shipped: Name of the shipped model.

    Returns:
        The calibration, and a note to the user where it was not made for this model.

    Raises:
        ConfigError: There is none.
    """
    from vlv.models.folder import find_folder

    if path is not None:
        return Calibration.load(path), None
    folder = find_folder(model, tasks=["embed", "generate"], revision=revision)
    if (found := read_calibration(folder)) is not None:
        return found, None
    other = read_calibration(find_folder(shipped))
    if other is None:
        raise ConfigError(f"{model} has no {CALIBRATION_NAME}; name one with --calibration")
    note = (
        f"{model} has no {CALIBRATION_NAME}; with that of {shipped} doubts rank sentences, "
        "but their probabilities are not measured for this model"
    )
    return replace(other, claims=None), note


class VerifyJob:
    """The verdicts that are asked for, those that are there, and the way to make the rest.

    Building it reads and checks, and writes nothing.

    Attributes:
        todo: Captions that will be judged.
        refused: What cannot be judged, each with its error.
        skipped: How many verdicts are there already.
        unread: How many captions made no claim that the grammar knows.
        divided: How many were longer than the text tower.

    Raises:
        OutputError: The output cannot be used as it stands.
    """

    def __init__(
        self,
        captions: Sequence[Captioned],
        settings: VerifySettings,
        output: Path | None = None,
        on_existing: OnExisting = "skip",
        read_claims: ReadClaims = no_claims,
    ) -> None:
        self.settings, self.read_claims = settings, read_claims
        self._table = open_table(output, settings.columns, asdict(settings), on_existing)
        judged = [_limited(captioned) for captioned in captions]
        self.refused = [captioned for captioned in judged if captioned.error is not None]
        good = [captioned for captioned in judged if captioned.error is None]
        self.todo = [captioned for captioned in good if self.row(captioned) is None]
        self.skipped = len(good) - len(self.todo)
        self.unread = self.divided = 0

    def row(self, captioned: Captioned) -> Row | None:
        """The finished row of a caption; None where there is none, or one of another caption."""
        if self._table is None or captioned.record is None:
            return None
        row = self._table.get((captioned.id, captioned.record.name))
        return row if row is not None and row["caption"] == captioned.caption else None

    def run(
        self,
        load: Callable[[], VLVPipeline],
        *,
        batch_size: BatchSize,
        report: Callable[[Sequence[Row]], None] = lambda rows: None,
    ) -> Tally:
        """Make the verdicts that are missing.

        Args:
            load: Loads the model; called only when there is something to do.
            batch_size: Images whose captions are judged together.
            report: Receives the rows of each batch once they are on disk.

        Returns:
            The counts. An interruption leaves everything that was reported on disk.
        """
        tally = Tally(skipped=self.skipped)
        fill(self._table, self._rows(load, batch_size, tally), report)
        return tally

    def _rows(
        self, load: Callable[[], VLVPipeline], size: BatchSize, tally: Tally
    ) -> Iterator[list[Row]]:
        if self.refused:
            tally.failed += len(self.refused)
            yield [self._row(x, x.error) for x in self.refused]
        if not self.todo:
            return
        pipe = load()
        tally.restart()
        by_id = {captioned.id: captioned for captioned in self.todo}
        records = [present(captioned.record, "record") for captioned in self.todo]
        with Reader(records, pipe.image_size, pipe.framing) as reader:
            while batch := reader.take(size.now):
                good = [item for item in batch if item.error is None and item.image is not None]
                found = iter(size.run(lambda items: self._judge(pipe, items, by_id), good))
                rows = []
                for item in batch:
                    verdict = next(found) if item in good else item.error or _no_image(item.record)
                    tally.failed += isinstance(verdict, str)
                    tally.done += not isinstance(verdict, str)
                    rows.append(self._row(by_id[item.record.id], verdict))
                yield rows

    def _judge(
        self, pipe: VLVPipeline, items: Sequence[Opened], by_id: dict[str, Captioned]
    ) -> list[Verdict | str]:
        """Verdicts, or why there is none: one image whose loss is not finite spoils no other."""
        captions = [present(by_id[item.record.id].caption, "caption") for item in items]
        try:
            found: list[Verdict] = pipe.verify(
                [present(item.image, "image") for item in items],
                captions,
                read_claims=self.read_claims,
                calibration=self.settings.calibration,
                **asdict(self.settings.scoring),
            )
        except ConfigError as error:
            if len(items) == 1:
                return [f"{items[0].record.name}: {error}"]
            return [row for item in items for row in self._judge(pipe, [item], by_id)]
        return list(found)

    def _row(self, captioned: Captioned, verdict: Verdict | str | None) -> Row:
        row: Row = dict.fromkeys(self.settings.columns)
        row |= {
            "id": captioned.id,
            "file_name": None if captioned.record is None else captioned.record.name,
            "caption": captioned.caption,
            "model": self.settings.model,
            "seed": self.settings.scoring.seed,
        }
        if verdict is None or isinstance(verdict, str):
            return row | {"error": verdict}
        self.unread += self.settings.claims is not None and not verdict.claims
        self.divided += verdict.num_chunks > 1
        row |= verdict_columns(verdict)
        return row | {"fixed": verdict.fixed} if self.settings.fix else row


def verdict_columns(verdict: Verdict) -> Row:
    """A verdict as the table has it."""
    return {
        "score": verdict.score,
        "doubt": verdict.doubt,
        "sentences": [_stretch(x) for x in verdict.sentences],
        "claims": [_stretch(x) | _claim(x) for x in verdict.claims],
        "n_chunks": verdict.num_chunks,
    }


def _limited(captioned: Captioned) -> Captioned:
    num = len((captioned.caption or "").split())
    if captioned.error is not None or num <= MOST_WORDS:
        return captioned
    name = captioned.id if captioned.record is None else captioned.record.name
    why = f"{name}: the caption has {num} words; up to {MOST_WORDS} are judged"
    return type(captioned)(captioned.id, captioned.record, captioned.caption, why)


def _no_image(record: Record) -> str:
    return f"{record.name}: this is a caption embedding; captions are compared with images"


def _stretch(x: Doubt) -> Row:
    return {"text": x.text, "start": x.start, "end": x.end, "doubt": round(x.probability, 4)}


def _claim(x: ClaimDoubt) -> Row:
    return {"fact": x.name, "instead": x.instead if x.change > 0 else None}
