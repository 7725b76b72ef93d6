"""Where a caption makes its claims, what else it could claim, and which claims are right."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlv.errors import ConfigError
from vlv.models.doubts import Claim, ReadClaims, no_claims
from vlv.toyworld.language import (
    CLAUSE_END,
    NOUN,
    REFERENCE,
    RELATION,
    Claims,
    Facts,
    compare,
    pair_objects,
    parse,
    true_claims,
)
from vlv.toyworld.words import PLAIN, RELATIONS, SCENE_FACTS, WORDS, phrases_of
from vlv.toyworld.writing import CAPTIONED

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
_OPPOSITE = {"left": "right", "right": "left", "front": "behind", "behind": "front"}


@dataclass(frozen=True, slots=True)
class Mark:
    """A stretch of a caption that states a fact."""

    start: int
    end: int
    right: bool
    """Whether it is so in the scene."""


@dataclass(frozen=True, slots=True)
class _Statement:
    """A stretch of a caption that states a fact, of whatever scene."""

    start: int
    end: int
    fact: str
    said: str
    """The value that it states."""
    counts: str
    """The value that counts, where several are stated."""
    thing: int | None = None
    """Number of the object; None for the scene and for relations."""
    relation: tuple[str, str, str] | None = None


def find_claims(caption: str) -> list[Claim]:
    """Find the claims of a caption, each with what could stand in its place.

    >>> [(claim.name, claim.alternatives) for claim in find_claims("A big cone.")]
    [('size', ('little',)), ('shape', ('sphere', 'cube', 'cylinder'))]

    Args:
        caption: Text of any form; what states nothing is no claim.

    Returns:
        The claims in the order of the text; none overlap.
    """
    found = []
    for x in _statements(caption):
        others = _alternatives(x, caption[x.start : x.end])
        found.append(Claim(x.start, x.end, x.fact, tuple(others)))
    return found


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
    truth = true_claims(scene)
    pairs = pair_objects(parse(caption).objects, truth.objects)

    def is_right(x: _Statement) -> bool:
        if x.relation is not None:
            return compare(Claims(relations=(x.relation,)), scene).correct > 0
        real = truth.scene if x.thing is None else pairs[x.thing][1]
        return x.said == x.counts == real.get(x.fact)

    return [Mark(x.start, x.end, is_right(x)) for x in _statements(caption)]


def _statements(caption: str) -> list[_Statement]:
    """In the order of the text; of two that overlap the longer stays."""
    text = caption.lower() if len(caption.lower()) == len(caption) else caption
    claims = parse(text)
    found = list(_state(text, 0, claims.scene, None))
    for fact in SCENE_FACTS:
        text = _PHRASES[fact].sub(_blank, text)
    parts = [part for start, clause in _pieces(CLAUSE_END, text) for part in _parts(start, clause)]
    described = [(start, said) for start, said in parts if NOUN.search(said)]
    for thing, ((start, said), facts) in enumerate(zip(described, claims.objects, strict=False)):
        found += _state(said, start, facts, thing)
    for start, clause in _pieces(CLAUSE_END, text):
        found += _relations(clause, start)
    kept: list[_Statement] = []
    for x in sorted(found, key=lambda x: x.start - x.end):
        if all(x.end <= other.start or other.end <= x.start for other in kept):
            kept.append(x)
    return sorted(kept, key=lambda x: x.start)


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


def _state(text: str, start: int, facts: Facts, thing: int | None) -> Iterator[_Statement]:
    """Where a text states the facts that were read of it."""
    for fact, value in facts.items():
        for first, last, said in _find(fact, value, text):
            yield _Statement(start + first, start + last, fact, said, value, thing)


def _find(fact: str, value: str, text: str) -> list[tuple[int, int, str]]:
    """Every value of a fact in a text and its place; in a list of tags the bare words."""
    found = list(_PHRASES[fact].finditer(text))
    if found:
        return [(*match.span(), _VALUES[fact][match[0]]) for match in found]
    bare = re.compile(rf"\b{value}(?: light| view)?\b")
    return [(*match.span(), value) for match in bare.finditer(text)][:1]


def _relations(clause: str, start: int) -> Iterator[_Statement]:
    """The words of each relation, with the objects that they refer to."""
    relations = parse(clause).relations
    for match, relation in zip(RELATION.finditer(clause), relations, strict=False):
        before = _BEFORE.search(clause[: match.start()])
        after = _AFTER.match(clause, match.end())
        first = before.start(1) if before else match.start()
        last = after.end(1) if after else match.end()
        said = RELATIONS[match[0]]
        yield _Statement(start + first, start + last, "relation", said, said, relation=relation)


def _alternatives(x: _Statement, words: str) -> Iterator[str]:
    """The same words with every other value of their fact."""
    said = words.lower()
    if x.relation is not None:
        match = RELATION.search(f"{said} a")  # what follows may lie outside of the words
        assert match is not None
        yield words[: match.start()] + CAPTIONED[_OPPOSITE[x.said]] + words[match.end() :]
        return
    for value, phrases in WORDS[x.fact].items():
        if value == x.said:
            continue
        other = said.replace(x.said, value)  # a bare word of a list of tags
        for table in (WORDS[x.fact], PLAIN.get(x.fact, {})):
            if said in (own := table.get(x.said, ())):
                others = table.get(value, phrases)
                other = others[min(own.index(said), len(others) - 1)]
                break
        yield other[0].upper() + other[1:] if words[:1].isupper() else other


def find_grammar(name: str | None) -> ReadClaims:
    """What reads claims by the name that a calibration has.

    Raises:
        ConfigError: No grammar has the name.
    """
    known: dict[str | None, ReadClaims] = {None: no_claims, "toyworld": find_claims}
    if name not in known:
        raise ConfigError(
            f"the calibration names the grammar {name}, which vlv does not know; use --claims none"
        )
    return known[name]
