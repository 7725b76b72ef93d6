"""Caption many images with a teacher: what is missing, and the way to make it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Protocol

from vlv.errors import BudgetError, ConfigError, DataError
from vlv.jobs.tally import Tally
from vlv.jobs.teacher.checks import FAULTS, Wanted
from vlv.jobs.teacher.files import Files, State, TeacherOutput, wide_row
from vlv.jobs.teacher.prompts import check_fields
from vlv.jobs.wording import Wording

if TYPE_CHECKING:
    from vlv.data.records import Record
    from vlv.endpoint import Answer
    from vlv.jobs.formats import Row
    from vlv.jobs.inputs import Opened
    from vlv.jobs.teacher.prompts import Prompt

SECOND_TEMPERATURE = 0.7
"""Least temperature of a second try: the likeliest answer was no caption."""


@dataclass(frozen=True)
class Asking:
    """How a teacher is asked, and what counts as a caption.

    Attributes:
        max_tokens: Longest answer, in the teacher's tokens; None is what the teacher allows.
        temperature: Of the sampling; None leaves it to an endpoint, and is the likeliest answer elsewhere.
        seed: Of the sampling; each further try has another.
        tries: How often an image is asked about before the answer counts as failed.
        wanted: What a caption must be.
        wording: What is done to its text.
    """

    max_tokens: int | None = 512
    temperature: float | None = None
    seed: int = 0
    tries: int = 2
    wanted: Wanted = field(default_factory=Wanted)
    wording: Wording = field(default_factory=Wording)

    def __post_init__(self) -> None:
        if (self.max_tokens or 1) < 1 or self.tries < 1:
            raise ConfigError(
                f"max_tokens ({self.max_tokens}) and tries ({self.tries}) must be 1 or more"
            )
        if self.temperature is not None and self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 or more")

    def settings(self) -> dict[str, object]:
        """What the captions depend on."""
        found = asdict(self)
        return {**found.pop("wanted"), **found}

    def draw(self, attempt: int) -> tuple[float | None, int | None]:
        """Temperature and seed of a try, counted from 0; without chance there is no seed."""
        if attempt == 0:
            return self.temperature, (self.seed if self.temperature else None)
        return max(self.temperature or 0.0, SECOND_TEMPERATURE), self.seed + attempt

    def text(self, question: Question) -> str:
        """The prompt, with a reminder of what was wrong before."""
        if question.fault is None:
            return question.text
        return f"{question.text}\n{self.wanted.reminder(question.fault)}"


@dataclass(frozen=True)
class Item:
    """An image with something to do.

    Attributes:
        index: Its number among the inputs.
        record: Where it lies.
        prompts: What is still to be asked.
        tries: Number of earlier tries that gave no caption, by name of the prompt.
    """

    index: int
    record: Record
    prompts: tuple[Prompt, ...]
    tries: dict[str, int]


@dataclass
class Question:
    """An image and a prompt on the way to a caption.

    Attributes:
        item: The image.
        prompt: Which one.
        opened: The file.
        text: The prompt for this image.
        tries: Answers so far, those of earlier runs among them.
        left: Answers that may still come in this run.
        fault: What was wrong with the latest, as a key of `FAULTS`.
    """

    item: Item
    prompt: Prompt
    opened: Opened
    text: str
    tries: int
    left: int
    fault: str | None = None


class Teacher(Protocol):
    """What makes the captions: an endpoint, or a model on this machine."""

    name: str
    """Of the model, for the column ``model``."""

    def settings(self) -> dict[str, object]:
        """What the captions depend on, besides prompts and `Asking`."""

    def run(self, job: TeacherJob, items: Iterator[Item]) -> None:
        """Make the captions: `TeacherJob.ask` and `TeacherJob.take` for each prompt, then what `TeacherJob.finish` returns."""


class TeacherJob:
    """The captions that are asked for, those that are there, and the way to make the rest.

    Building it reads and checks, and writes nothing.

    Args:
        records: Images to caption, in the order of the output.
        prompts: What to ask of each.
        asking: How.
        teacher: Whom.
        output: What is written.

    Attributes:
        tally: Counts of images.
        left: Why the job stopped before its end; None when it did not.

    Raises:
        OutputError: The output cannot be used as it stands.
        DataError: A field of a prompt occurs in no record.
    """

    def __init__(
        self,
        records: Sequence[Record],
        prompts: Sequence[Prompt],
        asking: Asking,
        teacher: Teacher,
        output: TeacherOutput,
    ) -> None:
        check_fields(prompts, records)
        self.records, self.prompts, self.asking, self.teacher = records, prompts, asking, teacher
        settings = {
            **teacher.settings(),
            "prompts": {prompt.name: prompt.text for prompt in prompts},
            **asking.settings(),
        }
        self.state = State(output, settings)
        self._files = Files(records, prompts, output)
        self._size = output.shard_size
        self._open = [0] * -(-len(records) // self._size)  # images of each shard that are not done
        self.tally = Tally()
        self.left: str | None = None
        self._report: Callable[[str | None], None] = lambda error: None
        self._skip: Callable[[], None] = lambda: None

    def run(
        self,
        report: Callable[[str | None], None] = lambda error: None,
        skip: Callable[[], None] = lambda: None,
    ) -> Tally:
        """Make the captions that are missing, then the files.

        Args:
            report: Receives the error of each image that was worked on, or None.
            skip: Called for each image whose captions are there.

        Raises:
            EndpointError: The endpoint cannot be reached or refuses us; what was answered is kept.
            OutputError: Something cannot be written; what was answered before is kept.
        """
        self._report, self._skip = report, skip
        for index in range(len(self.records)):
            self._open[index // self._size] += 1
        try:
            self.state.open()
            self.tally.restart()
            try:
                self.teacher.run(self, self._items())
            except BudgetError as error:
                self.left = str(error)
            for shard in range(len(self._open)) if self._files.has_shards else ():
                self._write_shard(shard)
            self._files.finish(self.row, len(self._open))
        finally:
            self.state.close()
        return self.tally

    def _items(self) -> Iterator[Item]:
        for index, record in enumerate(self.records):
            if (why := self._files.collision(record)) is not None:
                self.tally.failed += 1
                self._report(why)
            elif self._files.keeps(record):
                self._count_skipped()
            elif (item := self._item(index, record)) is not None:
                yield item
                continue
            else:
                self._count_skipped()
            self._open[index // self._size] -= 1

    def _item(self, index: int, record: Record) -> Item | None:
        """What is missing of an image; None where nothing is."""
        rows = [(prompt, self.state.get(record, prompt)) for prompt in self.prompts]
        missing = [(prompt, row) for prompt, row in rows if self.state.is_missing(row)]
        if not missing:
            return None
        tries = {prompt.name: row["tries"] for prompt, row in missing if row is not None}
        return Item(index, record, tuple(prompt for prompt, _ in missing), tries)

    def _count_skipped(self) -> None:
        self.tally.skipped += 1
        self._skip()

    # What a teacher calls -------------------------------------------------------------------------

    def ask(self, item: Item, prompt: Prompt, opened: Opened) -> Question | None:
        """What to ask about an image; None where it cannot be asked, which its row says then."""
        tries = item.tries.get(prompt.name, 0)
        question = Question(item, prompt, opened, "", tries, self.asking.tries)
        try:
            if opened.error is not None:
                raise DataError(opened.error)
            question.text = prompt.render(item.record)
        except DataError as error:
            self.fail(question, str(error))
            return None
        return question

    def take(self, question: Question, answer: Answer) -> bool:
        """Take an answer; returns whether it is no caption and is to be asked for again."""
        question.tries += 1
        question.left -= 1
        question.fault = self.asking.wanted.fault(answer)
        if question.fault is None:
            self._keep(question, answer)
        elif question.left:
            return True
        else:
            name, tries = question.item.record.name, self.asking.tries
            said = " ".join((answer.refusal or answer.text).split())[:80]
            why = FAULTS[question.fault]
            self.fail(
                question, f"{name}: the answer is no caption, {why} ({tries} tries): {said!r}"
            )
        return False

    def fail(self, question: Question, error: str) -> None:
        """Write down why there is no caption."""
        self._keep(question, None, error)

    def _keep(self, question: Question, answer: Answer | None, error: str | None = None) -> None:
        width, height = question.opened.size or (None, None)
        row: Row = {
            "caption": answer and self.asking.wording.apply(" ".join(answer.text.split())),
            "n_tokens": answer and answer.completion_tokens,
            "finish_reason": answer and answer.finish_reason,
            "model": self.teacher.name,
            "tries": question.tries,
            "width": width,
            "height": height,
            "sha256": question.opened.sha256,
            "error": error,
        }
        self.state.put(question.item.record, question.prompt, row)

    def finish(self, item: Item) -> Callable[[], None] | None:
        """Count an image whose rows are written; returns what writes its shard, when that is complete."""
        rows = [self.state.get(item.record, prompt) for prompt in self.prompts]
        errors = [row["error"] for row in rows if row is not None and row["error"] is not None]
        self.tally.failed += bool(errors)
        self.tally.done += not errors
        self._report(errors[0] if errors else None)
        shard = item.index // self._size
        self._open[shard] -= 1
        if self._open[shard] or not self._files.has_shards:
            return None
        return lambda: self._write_shard(shard)

    def row(self, record: Record) -> Row | None:
        """One image with its captions for all prompts; None where one is missing."""
        rows = [self.state.get(record, prompt) for prompt in self.prompts]
        complete = [row for row in rows if row is not None]
        if len(complete) < len(rows):
            return None
        return wide_row(record, self.prompts, complete, self.asking.seed)

    def _write_shard(self, shard: int) -> None:
        records = self.records[shard * self._size : (shard + 1) * self._size]
        self._files.write_shard(shard, [(r, row) for r in records if (row := self.row(r))])

    def num_left(self) -> int:
        """Images that were not worked on."""
        return len(self.records) - self.tally.done - self.tally.failed - self.tally.skipped
