"""Find and replace in captions, and what it would change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from vlv.errors import ConfigError

Piece = tuple[str, str]
"""What becomes of a stretch of text (``kept``, ``removed`` or ``added``), and the text."""


@dataclass(frozen=True)
class Replacement:
    r"""What is to be replaced.

    Attributes:
        find: The text that is looked for.
        to: What stands in its place.
        whole_words: Leave alone what is a part of a longer word.
        match_case: Tell capitals from small letters.
        is_pattern: `find` is a regular expression; ``\1`` in `to` is its first group.

    Raises:
        ConfigError: There is nothing to look for, or the expression is none.
    """

    find: str
    to: str = ""
    whole_words: bool = False
    match_case: bool = False
    is_pattern: bool = False

    def __post_init__(self) -> None:
        if not self.find:
            raise ConfigError("there is nothing to look for; write the text that is to be replaced")
        try:
            always = re.compile(f"(?:{self._pattern.pattern})|", self._pattern.flags)
            always.sub(self._template, "")  # complain of a wrong template now
        except (re.error, IndexError, RecursionError, OverflowError) as error:
            raise ConfigError(f"the regular expression cannot be used ({error})") from error

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        text = self.find if self.is_pattern else re.escape(self.find)
        if self.whole_words:
            text = rf"(?<!\w)(?:{text})(?!\w)"
        return re.compile(text, 0 if self.match_case else re.IGNORECASE)

    @property
    def _template(self) -> str:
        return self.to if self.is_pattern else self.to.replace("\\", r"\\")

    def apply(self, caption: str) -> str:
        """The caption with everything replaced.

        >>> Replacement("cube", "box", whole_words=True).apply("A cube. Cubes.")
        'A box. Cubes.'
        """
        return self._pattern.sub(self._template, caption)

    def pieces(self, caption: str) -> Iterator[Piece]:
        """The caption in pieces: what stays, what goes, and what comes in its place."""
        end = 0
        for match in self._pattern.finditer(caption):
            yield "kept", caption[end : match.start()]
            yield "removed", match[0]
            yield "added", match.expand(self._template)
            end = match.end()
        yield "kept", caption[end:]
