"""Where a caption makes its claims, and which of them are right."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlv.toyworld.language import (
    CLAUSE_END,
    REFERENCE,
    RELATIONS,
    SCENE_FACTS,
    WORDS,
    Claims,
    compare,
    pair_objects,
    parse,
    true_claims,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vlv.toyworld.scene import Scene

_VALUES = {
    fact: {phrase: value for value, phrases in table.items() for phrase in phrases}
    for fact, table in WORDS.items()
}


def _any_of(phrases: Mapping[str, str]) -> re.Pattern[str]:
    longest_first = sorted(map(re.escape, phrases), key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(longest_first)})\b")


_PHRASES = {fact: _any_of(phrases) for fact, phrases in _VALUES.items()}
_RELATION = re.compile(rf"\bthe (?:\w+ )?\w+ is (?:{'|'.join(RELATIONS)}) the \w+")


@dataclass(frozen=True, slots=True)
class Mark:
    """A stretch of a caption that states a fact."""

    start: int
    end: int
    right: bool
    """Whether it is so in the scene."""


def mark_claims(caption: str, scene: Scene) -> list[Mark]:
    """Find the claims of a caption and judge them as `compare` counts them.

    >>> from vlv.toyworld.scene import sample_scene
    >>> scene = sample_scene(0, 0, "test")  # a photo of a large matte yellow sphere
    >>> text = "A photo of a large red ball."
    >>> [(text[mark.start : mark.end], mark.right) for mark in mark_claims(text, scene)]
    [('photo', True), ('large', True), ('red', False), ('ball', True)]

    Args:
        caption: Text of any form; what states nothing is not marked.
        scene: The truth.

    Returns:
        The marks in the order of the text; none overlap.
    """
    text = caption.lower() if len(caption.lower()) == len(caption) else caption
    claims, truth = parse(text), true_claims(scene)
    marks = _mark(text, 0, claims.scene, truth.scene)
    for fact in SCENE_FACTS:
        text = _PHRASES[fact].sub(_blank, text)
    clauses = list(_clauses(text))
    described = [(start, said) for start, said in clauses if _PHRASES["shape"].search(said)]
    pairs = pair_objects(claims.objects, truth.objects)
    for (start, said), (stated, real) in zip(described, pairs, strict=False):
        marks += _mark(said, start, stated, real)
    return _without_overlaps(marks + _mark_relations(text, scene))


def _blank(match: re.Match[str]) -> str:
    return " " * len(match[0])


def _clauses(text: str) -> Iterator[tuple[int, str]]:
    """The clauses that may add an object, each with its position, and blanks where others are referred to."""
    start = 0
    for stop in [*CLAUSE_END.finditer(text), re.search(r"\Z", text)]:
        assert stop is not None, "every text has an end"
        clause = text[start : stop.start()]
        if not parse(clause).relations:
            yield start, REFERENCE.sub(_blank, clause)
        start = stop.end()


def _mark(text: str, start: int, stated: Mapping[str, str], real: Mapping[str, str]) -> list[Mark]:
    """Mark where a text states facts: right is the value that counts, if it is the real one."""
    return [
        Mark(start + first, start + last, said == value == real.get(fact))
        for fact, value in stated.items()
        for first, last, said in _find(fact, value, text)
    ]


def _find(fact: str, value: str, text: str) -> list[tuple[int, int, str]]:
    """Every value of a fact in a text and its place; in a list of tags the bare words."""
    found = list(_PHRASES[fact].finditer(text))
    if found:
        return [(*match.span(), _VALUES[fact][match[0]]) for match in found]
    bare = re.compile(rf"\b{value}(?: light| view)?\b")
    return [(*match.span(), value) for match in bare.finditer(text)][:1]


def _mark_relations(text: str, scene: Scene) -> list[Mark]:
    marks = []
    for match in _RELATION.finditer(text):
        relations = parse(match[0]).relations
        if relations:
            right = compare(Claims(relations=relations), scene).correct > 0
            marks.append(Mark(*match.span(), right))
    return marks


def _without_overlaps(marks: list[Mark]) -> list[Mark]:
    """In the order of the text; of two that overlap the longer stays."""
    kept: list[Mark] = []
    for mark in sorted(marks, key=lambda m: m.start - m.end):
        if all(mark.end <= other.start or other.end <= mark.start for other in kept):
            kept.append(mark)
    return sorted(kept, key=lambda m: m.start)
