"""Ask a model about images, a question at a time, into a table; resumable at any point."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from vlv.data.records import DAMAGED, Absent, BadRecord, Columns, Record
from vlv.data.source import Source
from vlv.data.tables import make_entry
from vlv.errors import ConfigError, DataError
from vlv.jobs.caption_files import read_table
from vlv.jobs.inputs import Reader, embeddings
from vlv.jobs.table import fill, open_table
from vlv.jobs.tally import Tally
from vlv.models.arguments import present
from vlv.models.asking import Answer, check_answers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from vlv.data.records import Entry
    from vlv.jobs.formats import Row
    from vlv.jobs.inputs import BatchSize, Opened
    from vlv.jobs.table import OnExisting
    from vlv.models.pipeline import VLVPipeline

COLUMNS: dict[str, type] = {
    "id": str,
    "file_name": str,
    "question": str,
    "answer": str,
    "yes": float,  # probability of yes against no, where the answer is one of them
    "finish_reason": str,  # "stop": the model ended the answer; "length": it was cut off
    "model": str,
    "error": str,
}
KEY = ("id", "file_name", "question")
_QUESTION = "question"


@dataclass(frozen=True)
class Asked:
    """A question about an image."""

    record: Record
    question: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies it in the table."""
        return self.record.id, self.record.name, self.question


def ask_of_all(records: Sequence[Record], questions: Sequence[str]) -> list[Asked]:
    """Every question about every image.

    Raises:
        ConfigError: A question is empty.
    """
    if not all(question.strip() for question in questions):
        raise ConfigError("a question is empty; ask something")
    return [Asked(record, q) for record in records for q in dict.fromkeys(questions)]


def read_questions(path: Path, columns: Columns, question_column: str | None = None) -> list[Asked]:
    """The rows of a table that names an image and a question each; a bad one comes back with an image that says why.

    Args:
        path: A .jsonl, .csv or .parquet file.
        columns: What the image is called, and where it may lie.
        question_column: What the question is called; "question" by default.

    Raises:
        DataError: The file cannot be read, or no row has a question.
    """
    name = question_column or _QUESTION
    asked = [_asked(entry, name) for entry in _entries(path, columns)]
    if not any(one.question for one in asked):
        raise DataError(
            f"{path}: no row has a {name}; name the column with --question-column, or ask on the command line"
        )
    return list({one.key: one for one in asked}.values())


def _entries(path: Path, columns: Columns) -> Iterator[Entry]:
    if path.suffix.lower() != ".csv":
        for part in Source([path], columns).parts():
            yield from part.entries()
        return
    for where, row in read_table(path):
        if isinstance(row, str):
            yield BadRecord(where, str(path), row, DAMAGED)
        else:
            yield make_entry(row, where, columns, path)


def _asked(entry: Entry, name: str) -> Asked:
    if isinstance(entry, BadRecord):
        return Asked(Record(entry.id, Absent(entry.source, entry.reason)), "")
    question = (entry.meta or {}).get(name)
    if isinstance(question, str) and question.strip():
        return Asked(entry, question)
    return Asked(Record(entry.id, Absent(entry.name, f"{entry.name}: its row has no {name}")), "")


@dataclass(frozen=True)
class AskSettings:
    """Everything that an answer depends on, besides image and question.

    Attributes:
        model: Name or folder of the model.
        revision: Its revision on the hub.
        max_new_tokens: Longest answer, in tokens of the language model; None is as of captions.
        dtype: Of the arithmetic.
        llm_bits: 8 or 4 for a quantised language model.
    """

    model: str
    revision: str | None = None
    max_new_tokens: int | None = None
    dtype: str = "float32"
    llm_bits: int | None = None


class AskJob:
    """The answers that are wanted, those that are there, and the way to make the rest.

    Building it reads and checks, and writes nothing.

    Attributes:
        todo: What will be asked.
        skipped: How many answers are there already.

    Raises:
        OutputError: The output cannot be used as it stands.
    """

    def __init__(
        self,
        asked: Sequence[Asked],
        settings: AskSettings,
        output: Path | None = None,
        on_existing: OnExisting = "skip",
    ) -> None:
        self.settings = settings
        self._table = open_table(output, COLUMNS, asdict(settings), on_existing, KEY)
        self.todo = [x for x in asked if self._table is None or x.key not in self._table]
        self.skipped = len(asked) - len(self.todo)

    def run(
        self,
        load: Callable[[], VLVPipeline],
        *,
        batch_size: BatchSize,
        report: Callable[[Sequence[Row]], None] = lambda rows: None,
    ) -> Tally:
        """Ask what is not answered yet.

        Args:
            load: Loads the model; called only when there is something to do.
            batch_size: Questions answered together.
            report: Receives the rows of each batch once they are on disk.

        Returns:
            The counts. An interruption leaves everything that was reported on disk.
        """
        tally = Tally(skipped=self.skipped)
        pipe = load() if self.todo else None
        if pipe is not None:  # before anything is written
            check_answers(present(pipe.caption_decoder, "caption_decoder"))
        tally.restart()
        fill(self._table, self._rows(pipe, batch_size, tally) if pipe is not None else (), report)
        return tally

    def _rows(self, pipe: VLVPipeline, size: BatchSize, tally: Tally) -> Iterator[list[Row]]:
        left = iter(self.todo)
        records = (asked.record for asked in self.todo)
        with Reader(records, pipe.image_size, pipe.framing) as reader:
            while batch := reader.take(size.now):
                asked_now = [next(left) for _ in batch]
                found = iter(self._answers(pipe, batch, asked_now, size))
                rows = []
                for item, asked in zip(batch, asked_now, strict=True):
                    given = next(found) if item.error is None else None
                    tally.failed += given is None
                    tally.done += given is not None
                    tally.truncated += given is not None and not given.finished
                    rows.append(self._row(item, asked, given))
                yield rows

    def _answers(
        self,
        pipe: VLVPipeline,
        batch: Sequence[Opened],
        asked: Sequence[Asked],
        size: BatchSize,
    ) -> list[Answer]:
        """Answers about the good images of a batch, each encoded once for all the questions about it."""
        good = [
            (item, one.question)
            for item, one in zip(batch, asked, strict=True)
            if item.error is None
        ]
        images = {item.record.source: item for item, _ in good}
        rows = {source: row for row, source in enumerate(images)}
        made = size.run(lambda items: list(embeddings(pipe, items)), list(images.values()))
        if not made:
            return []
        found = pipe.ask(
            z=[made[rows[item.record.source]] for item, _ in good],
            questions=[question for _, question in good],
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=size.now,
        )
        return found if isinstance(found, list) else [found]

    def _row(self, item: Opened, asked: Asked, given: Answer | None) -> Row:
        id, name, question = asked.key
        return {
            "id": id,
            "file_name": name,
            "question": question,
            "answer": given and given.text,
            "yes": given and given.yes,
            "finish_reason": given and ("stop" if given.finished else "length"),
            "model": self.settings.model,
            "error": item.error,
        }
