"""What is done to the text of a caption: cut to a length, and words put around it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlv.errors import ConfigError

_SENTENCE = re.compile(r"[^.!?]*[.!?]+[\"')\]]*\s*")


@dataclass(frozen=True)
class Wording:
    """The words that training wants in a caption, besides those of the model.

    Attributes:
        prefix: Text before the caption, as it is.
        suffix: Text behind it, as it is.
        trigger: Word that a caption begins with, and a comma; not where the caption names it already.
        max_words: Most words of the caption itself; it is cut after a sentence where one fits.

    Raises:
        ConfigError: ``max_words`` is below 1.
    """

    prefix: str | None = None
    suffix: str | None = None
    trigger: str | None = None
    max_words: int | None = None

    def __post_init__(self) -> None:
        if self.max_words is not None and self.max_words < 1:
            raise ConfigError(f"max_words is {self.max_words}; it must be 1 or more")

    def apply(self, text: str) -> str:
        """The caption as it is written.

        >>> Wording(trigger="sks", max_words=4, suffix=" #").apply("A red cube. It is far away.")
        'sks, A red cube. #'
        """
        if self.max_words is not None:
            text = shorten(text, self.max_words)
        text = f"{self.prefix or ''}{text}{self.suffix or ''}"
        if self.trigger and not _names(text, self.trigger):
            text = f"{self.trigger}, {text}"
        return text


def _names(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def shorten(text: str, max_words: int) -> str:
    """At most `max_words` words of a text: whole sentences where one fits, else as many words.

    >>> shorten("One two. Three four five.", 4), shorten("One two three, four five.", 3)
    ('One two.', 'One two three.')
    """
    if len(text.split()) <= max_words:
        return text
    kept, count = "", 0
    for sentence in _SENTENCE.findall(text):
        count += len(sentence.split())
        if count > max_words:
            break
        kept += sentence
    return kept.strip() or " ".join(text.split()[:max_words]).rstrip(",;:-") + "."
