"""Words that captions must not have, and words that they should: whole words, in capitals or not."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from vlv.errors import ConfigError

_MOST_WORDS = 50
_LONGEST_WORD = 100
_WORD = re.compile(r"\w")


def checked_words(name: str, given: object) -> tuple[str, ...]:
    """Words without repetition.

    Args:
        name: Of the argument.
        given: A word or several, each of which may be a phrase.

    Raises:
        ConfigError: They are something else.
    """
    words = [given] if isinstance(given, str) else given
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{name} is {given!r:.60}; give a word, or a list of words")
    found: dict[str, str] = {}
    for word in (" ".join(word.split()) for word in words):
        if not 0 < len(word) <= _LONGEST_WORD:
            raise ConfigError(
                f"{name} holds {word!r:.60}; a word has 1 to {_LONGEST_WORD} characters, not only spaces"
            )
        found.setdefault(word.casefold(), word)
    if len(found) > _MOST_WORDS:
        raise ConfigError(f"{name} holds {len(found)} words; name at most {_MOST_WORDS}")
    return tuple(found.values())


def check_agreement(include: Sequence[str], exclude: Sequence[str]) -> None:
    """Refuse words that nothing can satisfy.

    Raises:
        ConfigError: A word is to be there and not to be there.
    """
    for word in include:
        if lost := missing_words(exclude, word, there=True):
            raise ConfigError(
                f"{word!r} is to be included and {lost[0]!r} to be excluded; leave one out"
            )


def missing_words(words: Sequence[str], text: str, *, there: bool = False) -> tuple[str, ...]:
    """Those of some words that do not stand in a text, or that do.

    >>> missing_words(["red", "cube"], "Coloured cubes, RED."), missing_words(["red"], "A red.", there=True)
    (('cube',), ('red',))
    """
    return tuple(word for word in words if bool(pattern_of((word,)).search(text)) == there)


@lru_cache(maxsize=256)
def pattern_of(words: tuple[str, ...]) -> re.Pattern[str]:
    """Finds each of some words where no other word goes on around it."""
    return re.compile("|".join(map(_as_whole, words)), re.IGNORECASE)


def _as_whole(word: str) -> str:
    """An expression for a word."""
    text = r"\s+".join(map(re.escape, word.split()))
    before, after = (has_bounds(word[place]) for place in (0, -1))
    return ("(?<!\\w)" if before else "") + text + ("(?!\\w)" if after else "")


def has_bounds(character: str) -> bool:
    """Whether words end beside this character; scripts that write without spaces know no bounds."""
    return (
        _WORD.match(character) is not None and unicodedata.east_asian_width(character) not in "WF"
    )
