"""Where a caption makes its claims, and which of them are right."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlv.toyworld.language import (
    CLAUSE_END,
    NOUN,
    REFERENCE,
    RELATION,
    Claims,
    compare,
    pair_objects,
    parse,
    true_claims,
)
from vlv.toyworld.words import SCENE_FACTS, WORDS, phrases_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vlv.toyworld.scene import Scene

_VALUES = {fact: phrases_of(fact) for fact in WORDS}


def _any_of(phrases: Mapping[str, str]) -> re.Pattern[str]:
    longest_first = sorted(map(re.escape, phrases), key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(longest_first)})\b")


_PHRASES = {fact: _any_of(phrases) for fact, phrases in _VALUES.items()}
_BEFORE = re.compile(rf"({REFERENCE.pattern}) is $")
_AFTER = re.compile(rf" ({REFERENCE.pattern})")


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
    parts = [part for start, clause in _pieces(CLAUSE_END, text) for part in _parts(start, clause)]
    described = [(start, said) for start, said in parts if NOUN.search(said)]
    pairs = pair_objects(claims.objects, truth.objects)
    for (start, said), (stated, real) in zip(described, pairs, strict=False):
        marks += _mark(said, start, stated, real)
    for start, clause in _pieces(CLAUSE_END, text):
        marks += _mark_relations(clause, start, scene)
    return _without_overlaps(marks)


def _blank(match: re.Match[str]) -> str:
    return " " * len(match[0])


def _pieces(between: re.Pattern[str], text: str) -> Iterator[tuple[int, str]]:
    """What stands between the matches of a pattern, each piece with its position."""
    start = 0
    for stop in [*between.finditer(text), re.search(r"\Z", text)]:
        assert stop is not None, "every text has an end"
        yield start, text[start : stop.start()]
        start = stop.end()


def _parts(start: int, clause: str) -> Iterator[tuple[int, str]]:
    """The parts of a clause that may add an object each, with blanks where others are referred to."""
    for offset, part in _pieces(RELATION, clause):
        yield start + offset, REFERENCE.sub(_blank, part)


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


def _mark_relations(clause: str, start: int, scene: Scene) -> Iterator[Mark]:
    """Mark the words of each relation, with the objects that they refer to."""
    relations = parse(clause).relations
    for match, relation in zip(RELATION.finditer(clause), relations, strict=False):
        before = _BEFORE.search(clause[: match.start()])
        after = _AFTER.match(clause, match.end())
        first = before.start(1) if before else match.start()
        last = after.end(1) if after else match.end()
        right = compare(Claims(relations=(relation,)), scene).correct > 0
        yield Mark(start + first, start + last, right)


def _without_overlaps(marks: list[Mark]) -> list[Mark]:
    """In the order of the text; of two that overlap the longer stays."""
    kept: list[Mark] = []
    for mark in sorted(marks, key=lambda m: m.start - m.end):
        if all(mark.end <= other.start or other.end <= mark.start for other in kept):
            kept.append(mark)
    return sorted(kept, key=lambda m: m.start)
