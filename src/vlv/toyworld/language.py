"""What texts say: a parser that reads captions back into claims, and counts them against the truth."""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from vlv.toyworld.scene import COLOURED_STYLES, COLUMNS, Scene, Solid
from vlv.toyworld.words import (
    NAME_FACTS,
    OBJECT_FACTS,
    RELATIONS,
    SCENE_FACTS,
    UNKNOWN_SHAPE,
    WORDS,
    phrases_of,
)

Facts = dict[str, str]
"""Fact name to value."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What a caption (or a scene, or an inspector) says."""

    scene: Facts = field(default_factory=dict)
    """For `SCENE_FACTS`."""
    objects: tuple[Facts, ...] = ()
    """For every object the stated `OBJECT_FACTS`."""
    relations: tuple[tuple[str, str, str], ...] = ()
    """(object, relation, object) with the relations left, right, front, behind; an object is what names it, such as
    `cube` or `small red cube`."""
    contradictions: tuple[str, ...] = ()
    """The fact's name for every further value that was stated of a thing that has one already."""


def true_claims(scene: Scene) -> Claims:
    """Everything about a scene that can be seen and said."""
    coloured = scene.style in COLOURED_STYLES
    hidden = () if coloured else ("ground", "time")
    facts = {name: getattr(scene, name) for name in SCENE_FACTS if name not in hidden}
    objects = tuple(
        {f: getattr(solid, f) for f in OBJECT_FACTS if coloured or f != "colour"}
        for solid in scene.solids
    )
    return Claims(facts, objects)


def holds(relation: str, a: Solid, b: Solid) -> bool:
    """Whether a stands left, right, front or behind of b."""
    if relation == "left":
        return COLUMNS.index(a.column) < COLUMNS.index(b.column)
    if relation == "right":
        return COLUMNS.index(a.column) > COLUMNS.index(b.column)
    return (a.row, b.row) == (("front", "back") if relation == "front" else ("back", "front"))


def name_of(facts: Facts) -> str:
    """What names an object, in the order of `NAME_FACTS`: `small red cube`."""
    return " ".join(
        [facts[fact] for fact in NAME_FACTS[:-1] if fact in facts]
        + [facts.get("shape", UNKNOWN_SHAPE)]
    )


# --- reading ------------------------------------------------------------------------------------

_PHRASES = {kind: phrases_of(kind) for kind in WORDS}


def _any_of(phrases: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(phrases, key=len, reverse=True)))


_SAID = {kind: re.compile(rf"\b(?:{_any_of(table)})\b") for kind, table in _PHRASES.items()}
_TAG_SCENE = {
    **{word: (kind, word) for kind in ("style", "ground", "time") for word in WORDS[kind]},
    **{f"{side} light": ("light", side) for side in WORDS["light"]},
    **{f"{height} view": ("view", height) for height in WORDS["view"]},
}
_NOUNS = (*_PHRASES["shape"], UNKNOWN_SHAPE)
_AFTER_NOUN = "|".join(f"(?<={noun}) " for noun in _NOUNS)
_OF = r"(?<!left )(?<!right )(?<!front )\bof "
CLAUSE_END = re.compile(rf"[.;,]|(?:\band |{_OF}|{_AFTER_NOUN})(?=an?\b)")
"""Where the parser breaks prose: each clause speaks of one object at most, or of two and their relation."""
RELATION = re.compile(rf"\b(?:{_any_of(RELATIONS)})(?= (?:an?|the)\b)")
_ADJECTIVE = _any_of(p for fact in NAME_FACTS[:-1] for p in _PHRASES[fact])
REFERENCE = re.compile(rf"\bthe (?:(?:{_ADJECTIVE}) )*(?:{_any_of((*_NOUNS, 'other'))})\b")
"""Words that speak of an object without adding one."""
NOUN = re.compile(rf"\b(?:{_any_of(_NOUNS)})\b")


def parse(caption: str) -> Claims:
    """Read a caption of any form back into claims.

    Text that says nothing adds nothing, nor does a sentence that breaks off before its noun. Of a
    thing that is given several values of one fact the first stands; the others are contradictions.

    >>> parse("A red cube left of a blue sphere.").relations
    (('red cube', 'left', 'blue sphere'),)
    """
    text = re.sub(r"\s+", " ", caption.lower()).strip()
    return _parse_tags(text) if _is_tags(text) else _parse_prose(text)


def _is_tags(text: str) -> bool:
    """A list of tags has no full stop and opens with the bare style or names the light's side."""
    first = text.partition(",")[0].strip()
    return "." not in text and (
        first in WORDS["style"] or bool(re.search(r"(left|right) light", text))
    )


def _parse_prose(text: str) -> Claims:
    scene, contradictions = _read_facts(text, SCENE_FACTS)
    for kind in SCENE_FACTS:
        text = _SAID[kind].sub(" ", text)
    objects: list[Facts] = []
    relations = []
    for clause in CLAUSE_END.split(text):
        mentions = [_mention(part) for part in RELATION.split(clause)]
        for mention in mentions:
            if mention is not None and mention.is_new:
                objects.append(mention.facts)
                contradictions += mention.contradictions
        kinds = [RELATIONS[said] for said in RELATION.findall(clause)]
        for kind, first, second in zip(kinds, mentions, mentions[1:], strict=False):
            if first is not None and second is not None:
                relations.append((name_of(first.facts), kind, _second_name(first, second)))
    return Claims(scene, tuple(objects), tuple(relations), tuple(contradictions))


@dataclass(frozen=True, slots=True)
class _Mention:
    """An object that a text speaks of."""

    facts: Facts
    contradictions: list[str]
    is_new: bool
    """Whether it was not spoken of before."""


def _mention(text: str) -> _Mention | None:
    reference = REFERENCE.search(text)
    rest = REFERENCE.sub(" ", text)  # "the cube" speaks of an object, "a cube" adds one
    if NOUN.search(rest):
        return _Mention(*_read_facts(rest, OBJECT_FACTS), is_new=True)
    if reference is None:
        return None
    return _Mention(_read_facts(reference[0], NAME_FACTS)[0], [], is_new=False)


def _second_name(first: _Mention, second: _Mention) -> str:
    """The name of what an object is compared with; `the other` is one of the same shape."""
    is_other = not second.is_new and not second.facts
    shape = {name: value for name, value in first.facts.items() if name == "shape"}
    return name_of(shape if is_other else second.facts)


def _read_facts(text: str, kinds: tuple[str, ...]) -> tuple[Facts, list[str]]:
    return _first_values(
        {kind: [_PHRASES[kind][said] for said in _SAID[kind].findall(text)] for kind in kinds}
    )


def _first_values(stated: dict[str, list[str]]) -> tuple[Facts, list[str]]:
    """Split the values of every fact into the first, and a contradiction for each other value."""
    first = {kind: values[0] for kind, values in stated.items() if values}
    return first, [kind for kind, values in stated.items() for _ in range(len(set(values)) - 1)]


def _parse_tags(text: str) -> Claims:
    parts = [part.strip() for part in text.split(",")]
    facts = [_TAG_SCENE[part] for part in parts if part in _TAG_SCENE]
    scene, contradictions = _first_values(
        {kind: [value for fact, value in facts if fact == kind] for kind in SCENE_FACTS}
    )
    objects = []
    for part in parts:
        stated = {fact: [w for w in part.split() if w in WORDS[fact]] for fact in OBJECT_FACTS}
        if part not in _TAG_SCENE and stated["shape"]:
            found, repeated = _first_values(stated)
            objects.append(found)
            contradictions += repeated
    return Claims(scene, tuple(objects), (), tuple(contradictions))


# --- counting -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClaimCounts:
    """How many claims were made, how many are there to be made, how many are right."""

    stated: int = 0
    true: int = 0
    correct: int = 0
    by_fact: tuple[tuple[str, int, int, int], ...] = ()
    """(fact, stated, true, correct) for every fact."""

    @property
    def precision(self) -> float:
        """Share of stated claims that are right; 1 when nothing was stated."""
        return self.correct / self.stated if self.stated else 1.0

    @property
    def recall(self) -> float:
        """Share of true claims that were stated: coverage."""
        return self.correct / self.true if self.true else 1.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        total = self.stated + self.true
        return 2 * self.correct / total if total else 1.0


def compare(stated: Claims, scene: Scene) -> ClaimCounts:
    """Count the claims of a caption against the truth.

    Objects are paired so that most facts agree; every claim about an object that is left over is
    wrong, and so is every contradiction. A fact that cannot be seen (the colour of a sketched cube)
    counts as wrong when stated. Relations are no duty: a right one adds to both sides, a wrong one
    to the stated claims alone, a repeated one to nothing.
    """
    truth = true_claims(scene)
    rows: Counter[tuple[str, str]] = Counter()
    for fact in SCENE_FACTS:
        _count(rows, fact, stated.scene.get(fact), truth.scene.get(fact))
    for mine, real in pair_objects(stated.objects, truth.objects):
        for fact in OBJECT_FACTS:
            _count(rows, fact, mine.get(fact), real.get(fact))
    for fact in stated.contradictions:
        rows[fact, "stated"] += 1
    for relation in dict.fromkeys(stated.relations):
        right = _relation_true(relation, scene)
        rows["relation", "stated"] += 1
        rows["relation", "true"] += right
        rows["relation", "correct"] += right
    facts = (*SCENE_FACTS, *OBJECT_FACTS, "relation")
    by_fact = tuple((f, rows[f, "stated"], rows[f, "true"], rows[f, "correct"]) for f in facts)
    num_stated, num_true, num_correct = (
        sum(rows[fact, part] for fact in facts) for part in ("stated", "true", "correct")
    )
    return ClaimCounts(num_stated, num_true, num_correct, by_fact)


def _count(rows: Counter[tuple[str, str]], fact: str, mine: str | None, real: str | None) -> None:
    rows[fact, "stated"] += mine is not None
    rows[fact, "true"] += real is not None
    rows[fact, "correct"] += mine is not None and mine == real


def pair_objects(
    mine: tuple[dict[str, str], ...], real: tuple[dict[str, str], ...]
) -> list[tuple[dict[str, str], dict[str, str]]]:
    """Pair stated and real objects so that most facts agree; what is left over is paired with {}.

    The stated objects come first and keep their order. One that is stated more often than it is
    wholly true of real objects is left over from its second time on.
    """
    rows = _best_rows(mine, real)
    partner = {row: truth for row, truth in zip(rows, real, strict=True) if row is not None}
    missed = [truth for row, truth in zip(rows, real, strict=True) if row is None]
    return [(said, partner.get(row, {})) for row, said in enumerate(mine)] + [
        ({}, truth) for truth in missed
    ]


def _best_rows(
    mine: tuple[dict[str, str], ...], real: tuple[dict[str, str], ...]
) -> tuple[int | None, ...]:
    """For every real object the number of the stated one that stands for it, or None.

    Among the best candidates of each of the n real objects, n each, an optimal pairing can always be
    found, so that a long list of stated objects costs no more than a short one.
    """
    rows = _without_repetitions(mine, real)
    score: list[dict[int | None, int]] = [
        {row: len(mine[row].items() & truth.items()) for row in rows} for truth in real
    ]
    best = {
        row for scores in score for row in heapq.nlargest(len(real), rows, key=scores.__getitem__)
    }
    candidates = [*sorted(best), *[None] * (len(real) - len(best))]
    return max(
        itertools.permutations(candidates, len(real)),
        key=lambda chosen: sum(s.get(row, 0) for s, row in zip(score, chosen, strict=True)),
    )


def _without_repetitions(
    mine: tuple[dict[str, str], ...], real: tuple[dict[str, str], ...]
) -> list[int]:
    """Numbers of the stated objects, without what is stated more often than it is wholly true."""
    kept: list[int] = []
    for row, said in enumerate(mine):
        before = sum(mine[other] == said for other in kept)
        if before < max(1, sum(said.items() <= truth.items() for truth in real)):
            kept.append(row)
    return kept


def _relation_true(relation: tuple[str, str, str], scene: Scene) -> bool:
    first, kind, second = relation
    return any(
        _fits(first, a) and _fits(second, b) and holds(kind, a, b)
        for a, b in itertools.permutations(scene.solids, 2)
    )


def _fits(name: str, solid: Solid) -> bool:
    """Whether a name is one of an object's."""
    own = (*(getattr(solid, fact) for fact in NAME_FACTS), UNKNOWN_SHAPE)
    return all(word in own for word in name.split())
