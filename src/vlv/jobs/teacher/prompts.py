"""What the teacher is asked: presets in our own words, and templates with fields of the record."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from vlv.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vlv.data.records import Record

PRESETS = {
    # in substance the teacher prompt of the paper's Fig. 7
    "exhaustive": (
        "Look at the image closely and describe everything in it, so that someone who cannot see it could "
        "picture it. Begin with the scene as a whole and its setting. Then go through the objects: what "
        "they are, how many, how large, and where they stand in relation to each other and to the frame. "
        "Of people and animals tell the appearance, clothing, expression, pose and what they do. Name "
        "colours, textures and materials, the light, where it comes from and the shadows it throws, the "
        "point of view, and the mood. Quote any text that can be read. Say only what can be seen: no "
        "guesses, no interpretation, no summary at the end. Answer in English with the description alone, "
        "as one paragraph of 130 to 220 words without line breaks, and do not begin with words such as "
        '"The image shows".'
    ),
    "short": (
        "Describe the image in one English sentence of at most 25 words: the main things in it, what they "
        'do, and where. Say only what can be seen, and do not begin with words such as "The image shows". '
        "Answer with the sentence alone."
    ),
    "tags": (
        "List what can be seen in the image as English tags: things, people, actions, colours, materials, "
        "setting, light and style. Answer with 10 to 30 tags in lower case, separated by commas, the most "
        "important first, and nothing else."
    ),
}

MAX_FIELD = 500
"""Characters of a field that go into a prompt."""

_FIELD = re.compile(r"\{(\w+)(?:\|([^{}]*))?\}")
_NO_FIELD = re.compile(r"\{[^{}]*\}?|\}")


@dataclass(frozen=True)
class Prompt:
    """One thing to ask of every image.

    Attributes:
        name: Of the column that its captions go to.
        text: The question; ``{field}`` is replaced by what is known of the record, ``{field|words}`` by the
            words where a record lacks the field.

    Raises:
        ConfigError: It is empty, or braces stand where no field is meant.
    """

    name: str
    text: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ConfigError(f"the prompt {self.name} is empty")
        if found := _NO_FIELD.search(_FIELD.sub("", self.text)):
            raise ConfigError(
                f"the prompt {self.name} holds {found[0]!r}, which is no field; write {{name}} or {{name|default}}"
            )

    @property
    def required_fields(self) -> list[str]:
        """Fields without a default, in order."""
        return [name for name, default in _fields(self.text) if default is None]

    def render(self, record: Record) -> str:
        """The prompt for one record.

        Raises:
            DataError: The record lacks a field that has no default.
        """

        def value(match: re.Match[str]) -> str:
            found = field_of(record, match[1])
            if found is None and match[2] is None:
                raise DataError(
                    f"{record.name}: it has no field {match[1]!r} for the prompt {self.name}; "
                    f"write {{{match[1]}|words to use instead}}"
                )
            return str(match[2]) if found is None else found

        return _FIELD.sub(value, self.text).strip()


def _fields(text: str) -> list[tuple[str, str | None]]:
    return [(match[1], match[2]) for match in _FIELD.finditer(text)]


def read_prompts(given: Sequence[str]) -> list[Prompt]:
    """Prompts from the command line: names of presets, ``@FILE``, or the text itself.

    >>> [prompt.name for prompt in read_prompts(["short", "What is it?"])]
    ['short', 'own']

    Raises:
        ConfigError: A file cannot be read, a prompt is empty, or two have the same name.
    """
    prompts: list[Prompt] = []
    for text in given:
        if text in PRESETS:
            prompt = Prompt(text, PRESETS[text])
        elif text.startswith("@"):
            prompt = Prompt(_column(Path(text[1:]).stem), _read(Path(text[1:])))
        elif re.fullmatch(r"\w+", text):
            raise ConfigError(
                f"there is no prompt {text!r}; name one of {', '.join(PRESETS)}, @FILE, or write a whole sentence"
            )
        else:
            number = sum(one.name.startswith("own") for one in prompts) + 1
            prompt = Prompt("own" if number == 1 else f"own{number}", text)
        if prompt.name in {one.name for one in prompts}:
            raise ConfigError(f"two prompts are called {prompt.name}; rename a file")
        prompts.append(prompt)
    return prompts


def _column(stem: str) -> str:
    return re.sub(r"\W+", "_", stem) or "own"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prompt file {path} cannot be read ({error})") from error


def check_fields(prompts: Iterable[Prompt], records: Sequence[Record]) -> None:
    """Make sure that every field of the prompts occurs in the data at all.

    Raises:
        DataError: No record has one of them.
    """
    for prompt in prompts:
        for name in prompt.required_fields:
            if not any(field_of(record, name) is not None for record in records):
                known = sorted({*_ALWAYS, *(records[0].meta or {})}) if records else []
                raise DataError(
                    f"no record has the field {name!r} of the prompt {prompt.name}; "
                    f"the first one has {', '.join(known)}"
                )


_ALWAYS = ("file_name", "folder", "id")


def field_of(record: Record, name: str) -> str | None:
    """A field of a record as text on one line; None where it has none.

    ``alt`` is the text that came with the image, wherever it stands; lists are joined by commas.
    """
    path = PurePosixPath(record.id)
    meta = record.meta or {}
    value: Any = meta.get(name)
    if name == "file_name":
        value = PurePosixPath(record.name).name
    elif name == "folder":
        value = path.parent.name
    elif name == "id":
        value = record.id
    elif name == "caption":
        value = record.caption
    elif name == "alt" and value is None:
        value = next((meta[key] for key in ("alt_text", "TEXT") if meta.get(key)), record.caption)
    if isinstance(value, list):
        value = ", ".join(str(item) for item in value)
    text = "" if value is None or isinstance(value, dict) else " ".join(str(value).split())
    return text[:MAX_FIELD] or None
