"""The filter language of the workbench: which images are shown.

```
red cube                 both words, in the caption or the name
"red cube" or sphere     this phrase, or that word
not caption:*cube*sky*   wildcards; caption:, name: and path: look at one thing alone
tag:cat                  a tag as a whole, of captions that are tags with commas
words:<20 chars:>=300    also tags:, tokens: (CLIP), doubt: and score: (of vlv verify)
(a or b) not c
```
"""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vlv.errors import ConfigError

MAX_LENGTH = 1000
_MAX_DEPTH = 30
_TOKEN = re.compile(
    r"""\s*(?: (?P<paren>[()])
             | (?P<field>[A-Za-z]+):(?=\S)
             | "(?P<quoted>(?:[^"\\]|\\.)*)"
             | (?P<word>[^\s()]+) )""",
    re.VERBOSE,
)
_COMPARISON = re.compile(r"(<=|>=|!=|==|=|<|>)?(-?\d+(?:\.\d+)?)")
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
}


class Subject(Protocol):
    """What a filter looks at."""

    @property
    def path(self) -> str:
        """Of the image, below the folder."""

    @property
    def caption(self) -> str:
        """Empty where there is none."""

    def number(self, name: str) -> float | None:
        """``tokens``, ``doubt`` or ``score``; None where it is not known."""


Filter = Callable[[Subject], bool]
_TEXTS: dict[str, Callable[[Subject], str]] = {
    "caption": lambda x: x.caption,
    "name": lambda x: x.path.rpartition("/")[2],
    "path": lambda x: x.path,
}
_NUMBERS: dict[str, Callable[[Subject], float | None]] = {
    "words": lambda x: len(x.caption.split()),
    "chars": lambda x: len(x.caption),
    "tags": lambda x: len(tags_of(x.caption)),
    "tokens": lambda x: x.number("tokens"),
    "doubt": lambda x: x.number("doubt"),
    "score": lambda x: x.number("score"),
}
FIELDS = (*_TEXTS, "tag", *_NUMBERS)


def tags_of(caption: str) -> list[str]:
    """What stands between commas.

    >>> tags_of("a cat, grey ,")
    ['a cat', 'grey']
    """
    return [tag for part in caption.split(",") if (tag := part.strip())]


def parse_filter(text: str) -> Filter | None:
    """Read a filter; None where it is empty.

    Raises:
        ConfigError: It makes no sense, in a sentence that says where.
    """
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"the filter has {len(text)} characters; up to {MAX_LENGTH} are read")
    tokens = _split(text)
    if not tokens:
        return None
    parser = _Parser(tokens)
    found = parser.either(0)
    if parser.ahead is not None:
        raise ConfigError(f'the filter has a ")" without "(" (piece {parser.position + 1})')
    return found


@dataclass(frozen=True)
class _Token:
    text: str
    field: str | None = None
    is_plain: bool = False
    """Neither quoted nor with a field: may be `and`, `or`, `not` or a parenthesis."""

    def means(self, *words: str) -> bool:
        return self.is_plain and self.text.lower() in words


def _split(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    position, field = 0, None
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ConfigError(f"the filter cannot be read from {text[position:].strip()[:20]!r} on")
        position = match.end()
        if (quoted := match["quoted"]) is not None:
            tokens.append(_Token(re.sub(r"\\(.)", r"\1", quoted), field))
        elif match["paren"] is not None or match["word"] is not None:
            found = match["paren"] or match["word"]
            if match["word"] is not None and found.startswith('"'):
                raise ConfigError("a quotation mark of the filter is never closed")
            tokens.append(_Token(found, field, is_plain=field is None))
        else:
            field = match["field"].lower()
            if field not in FIELDS:
                raise ConfigError(
                    f'the filter knows no "{field}:"; it knows {", ".join(FIELDS)} (quote a text with a colon)'
                )
            continue
        field = None
    return tokens


class _Parser:
    """Recursive descent: either > both > negated > term."""

    def __init__(self, tokens: Sequence[_Token]) -> None:
        self._tokens, self.position = tokens, 0

    @property
    def ahead(self) -> _Token | None:
        return self._tokens[self.position] if self.position < len(self._tokens) else None

    def either(self, depth: int) -> Filter:
        if depth > _MAX_DEPTH:
            raise ConfigError(f"the filter is nested more than {_MAX_DEPTH} deep")
        parts = [self._both(depth)]
        while self._takes("or"):
            parts.append(self._both(depth))
        return parts[0] if len(parts) == 1 else lambda x: any(part(x) for part in parts)

    def _both(self, depth: int) -> Filter:
        parts = [self._negated(depth)]
        while self._takes("and") or not (self.ahead is None or self.ahead.means("or", ")")):
            parts.append(self._negated(depth))
        return parts[0] if len(parts) == 1 else lambda x: all(part(x) for part in parts)

    def _negated(self, depth: int) -> Filter:
        negates = False
        while self._takes("not"):
            negates = not negates
        part = self._term(depth)
        return (lambda x: not part(x)) if negates else part

    def _term(self, depth: int) -> Filter:
        token = self.ahead
        if token is None or token.means("and", "or", ")"):
            after = f'after "{self._tokens[self.position - 1].text}"' if self.position else ""
            raise ConfigError(f"the filter lacks a condition {after}".strip())
        self.position += 1
        if not token.means("("):
            return _condition(token)
        inner = self.either(depth + 1)
        if not self._takes(")"):
            raise ConfigError('the filter has a "(" without ")"')
        return inner

    def _takes(self, word: str) -> bool:
        if self.ahead is None or not self.ahead.means(word):
            return False
        self.position += 1
        return True


def _condition(token: _Token) -> Filter:
    if token.field in _NUMBERS:
        return _comparison(token.field, token.text)
    if token.field == "tag":
        matches_tag = re.compile(fnmatch.translate(token.text.casefold())).match
        return lambda x: any(matches_tag(tag) for tag in tags_of(x.caption.casefold()))
    contains = _searcher(token.text)
    if token.field is None:
        return lambda x: contains(x.caption) or contains(x.path)
    text_of = _TEXTS[token.field]
    return lambda x: contains(text_of(x))


def _searcher(text: str) -> Callable[[str], bool]:
    wanted = text.casefold()
    if not any(sign in wanted for sign in "*?"):
        return lambda where: wanted in where.casefold()
    matches = re.compile(fnmatch.translate(f"*{wanted}*")).match
    return lambda where: matches(where.casefold()) is not None


def _comparison(field: str, text: str) -> Filter:
    match = _COMPARISON.fullmatch(text)
    if match is None:
        raise ConfigError(f'"{field}:{text}" compares with no number; write {field}:>20')
    compare, limit = _OPERATORS[match[1] or "="], float(match[2])
    number_of = _NUMBERS[field]

    def holds(x: Subject) -> bool:
        value = number_of(x)
        return value is not None and compare(value, limit)

    return holds
