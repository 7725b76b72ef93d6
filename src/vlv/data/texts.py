"""The texts of a record that teach a caption decoder: its caption, captions in other styles, questions with answers.

Beside the caption they stand in the metadata, whatever kind of source that comes from:

    captions            {STYLE: text}, or a column `caption_STYLE` for each
    question, answer    one question; or `questions`, a list of {"question": ..., "answer": ...}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlv.data.foreign import parse_json
from vlv.errors import DataError
from vlv.storage import Json

if TYPE_CHECKING:
    from vlv.data.records import Record

_COLUMN = "caption_"
_LONGEST_KNOWN = 2000


@dataclass(frozen=True, slots=True)
class Text:
    """One text, and what it answers."""

    instruction: str | None
    """None is a plain caption."""
    answer: str
    is_caption: bool = field(default=False, compare=False)
    """Whether it describes the image, at some length, rather than answering a question."""


@dataclass(frozen=True, slots=True)
class TextMix:
    """Which texts of records are taught, and how often.

    Attributes:
        caption: Weight of the plain caption.
        styles: Weight of each style of captions, by name.
        instructions: What is asked for each style, by name.
        questions: Weight of all questions about an image together.
        lengths: Share of the captions whose instruction states how many words they have.
        known_column: Field that tells what is known about an image, or None.
        known: Share of the captions that are told it.
    """

    caption: float = 1.0
    styles: Mapping[str, float] = field(default_factory=dict)
    instructions: Mapping[str, str] = field(default_factory=dict)
    questions: float = 0.0
    lengths: float = 0.0
    known_column: str | None = None
    known: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the plain caption is taught."""
        return not self.styles and not self.questions

    def of(self, where: object, caption: str | None, meta: Json | None) -> list[tuple[Text, float]]:
        """The texts of a record, each with its weight.

        Args:
            where: Name of the record, for an error.
            caption: Its caption.
            meta: Its metadata.

        Raises:
            DataError: It has none, or one that is no text.
        """
        if self.known_column is not None:
            known_of(where, (meta or {}).get(self.known_column))
        found = []
        if caption and self.caption:
            found.append((Text(None, caption, is_caption=True), self.caption))
        if not self.is_plain:
            found += self._others(where, meta or {})
        if not found:
            raise DataError(f"{where} has no {self._wanted()}")
        return found

    def _others(self, where: object, meta: Json) -> Iterator[tuple[Text, float]]:
        captions = styled_captions(where, meta) if self.styles else {}
        for name, weight in self.styles.items():
            if name in captions:
                yield Text(self.instructions[name], captions[name], is_caption=True), weight
        asked = questions_of(where, meta) if self.questions else []
        for question in asked:
            yield question, self.questions / len(asked)

    def _wanted(self) -> str:
        names = ["caption"] if self.caption else []
        names += [f"caption in the style {name}" for name in self.styles]
        names += ["question with its answer"] if self.questions else []
        return ", ".join(names[:-1]) + (" or " if names[1:] else "") + names[-1]


def styled_captions(where: object, meta: Json) -> dict[str, str]:
    """The captions of a record by style.

    Raises:
        DataError: They are no object of texts.
    """
    given = meta.get("captions")
    if isinstance(given, str):  # JSON within a column of texts
        given = parse_json(given, where)
    if isinstance(given, list):  # a map of Arrow, as pairs
        pairs = [pair for pair in given if isinstance(pair, list) and len(pair) == 2]
        given = dict(pairs) if len(pairs) == len(given) else given
    if given is not None and not isinstance(given, Mapping):
        raise DataError(f"{where}: captions must be an object that names a text for each style")
    columns = {
        name.removeprefix(_COLUMN): text
        for name, text in meta.items()
        if name.startswith(_COLUMN) and isinstance(text, str)
    }
    found = columns | {str(k): v for k, v in (given or {}).items() if v is not None}
    for name, text in found.items():
        if not isinstance(text, str):
            raise DataError(f"{where}: the caption in the style {name} is no text")
    return {name: text for name, text in found.items() if text.strip()}


def questions_of(where: object, meta: Json) -> list[Text]:
    """The questions about a record, with their answers.

    Raises:
        DataError: One of them is no text, or has no answer.
    """
    given = meta.get("questions", [])
    if isinstance(given, str):
        given = parse_json(given, where)
    if not isinstance(given, list) or not all(isinstance(one, Mapping) for one in given):
        raise DataError(
            f"{where}: questions must be a list of objects with a question and an answer"
        )
    if "question" in meta:
        given = [meta, *given]
    return [_question(where, one) for one in given]


def _question(where: object, values: Mapping[str, object]) -> Text:
    question, answer = values.get("question"), values.get("answer")
    if isinstance(answer, int | float):
        answer = ("no", "yes")[answer] if isinstance(answer, bool) else str(answer)
    for name, text in (("question", question), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: a question has no {name} that is a text")
    return Text(str(question), str(answer))


def known_about(record: Record, column: str | None) -> str | None:
    """What is known about an image; None where that is nothing.

    Args:
        record: With its metadata.
        column: The field that tells it: a text, or a list of them; `caption` is also the text beside an image.

    Raises:
        DataError: It is something else, or too long.
    """
    if column is None:
        return None
    meta = record.meta or {}
    return known_of(record.name, meta.get(column, record.caption if column == "caption" else None))


def known_of(where: object, value: object) -> str | None:
    """The text of a field that tells what is known; None where it is empty.

    Raises:
        DataError: It is no text, or too long.
    """
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str | int | float) for text in texts):
        raise DataError(f"{where}: what is known is neither a text nor a list of texts")
    known = " ".join(", ".join(map(str, texts)).split())
    if len(known) > _LONGEST_KNOWN:
        raise DataError(
            f"{where}: what is known has {len(known)} characters; give at most {_LONGEST_KNOWN}"
        )
    return known or None


def choose(texts: Sequence[tuple[Text, float]], count: int, draws: Sequence[float]) -> list[Text]:
    """Some of the texts, each likely by its weight and none twice before all were chosen.

    Args:
        texts: With their weights.
        count: How many.
        draws: As many uniform numbers in (0, 1) as there are texts (Efraimidis and Spirakis 2006).
    """
    keys = [draw ** (1 / weight) for (_, weight), draw in zip(texts, draws, strict=True)]
    order = sorted(range(len(texts)), key=keys.__getitem__, reverse=True)
    return [texts[order[place % len(order)]][0] for place in range(count)]
