"""Where a caption makes its claims, and which of them are right."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlv.toyworld.language import (
    RELATIONS,
    WORDS,
    Claims,
    compare,
    pair_objects,
    parse,
    true_claims,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlv.toyworld.scene import Scene

_BREAK = re.compile(r"[.;,]|\band (?=a\b)|\bof (?=a\b)", re.IGNORECASE)
_RELATION = re.compile(rf"\bthe .*\bis (?:{'|'.join(RELATIONS)}) the \w+", re.IGNORECASE)


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
    >>> scene = sample_scene(0, 0, "test")  # a large matte yellow sphere
    >>> text = "A photo of a large red ball."
    >>> [(text[mark.start : mark.end], mark.right) for mark in mark_claims(text, scene)]
    [('photo', True), ('large', True), ('red', False), ('ball', True)]

    Args:
        caption: Text of any form; what states nothing is not marked.
        scene: The truth.

    Returns:
        The marks in the order of the text; none overlap.
    """
    claims, truth = parse(caption), true_claims(scene)
    marks = [
        Mark(start, end, truth.scene.get(fact) == value)
        for fact, value in claims.scene.items()
        for start, end in _find(fact, value, caption)
    ]
    paired = [real for _, real in pair_objects(claims.objects, truth.objects)]
    paired += [{}] * len(claims.objects)  # more objects than the comparison counts are all wrong
    places = [clause for clause in _clauses(caption) if parse(clause[1]).objects]
    for (start, clause), stated, real in zip(places, claims.objects, paired, strict=False):
        marks += _mark_object(clause, start, stated, real)
    marks += _mark_relations(caption, scene)
    return _without_overlaps(marks)


def _clauses(caption: str) -> Iterator[tuple[int, str]]:
    """The parts of a caption between which the parser breaks it, each with its position."""
    start = 0
    for stop in _BREAK.finditer(caption):
        yield start, caption[start : stop.start()]
        start = stop.end()
    yield start, caption[start:]


def _find(fact: str, value: str, text: str) -> list[tuple[int, int]]:
    """Every place where a text states a fact, in full phrases or, in a list of tags, by the bare word."""
    phrases = (*WORDS[fact][value], f"{value} light", f"{value} view", value)
    for phrase in sorted(phrases, key=len, reverse=True):
        found = re.finditer(rf"\b{re.escape(phrase)}\b", text, re.IGNORECASE)
        if spans := [match.span() for match in found]:
            return spans
    return []


def _mark_object(
    clause: str, start: int, stated: dict[str, str], real: dict[str, str]
) -> list[Mark]:
    spans = {fact: _find(fact, value, clause)[:1] for fact, value in stated.items()}
    return [
        Mark(start + first, start + last, real.get(fact) == stated[fact])
        for fact, places in spans.items()
        for first, last in places
    ]


def _mark_relations(caption: str, scene: Scene) -> list[Mark]:
    marks = []
    for start, clause in _clauses(caption):
        place, relations = _RELATION.search(clause), parse(clause).relations
        if place and relations:
            right = compare(Claims(relations=relations), scene).correct > 0
            marks.append(Mark(start + place.start(), start + place.end(), right))
    return marks


def _without_overlaps(marks: list[Mark]) -> list[Mark]:
    """In the order of the text; of two that overlap the longer stays."""
    kept: list[Mark] = []
    for mark in sorted(marks, key=lambda m: m.start - m.end):
        if all(mark.end <= other.start or other.end <= mark.start for other in kept):
            kept.append(mark)
    return sorted(kept, key=lambda m: m.start)
