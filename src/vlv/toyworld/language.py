"""The words of the world: a grammar that describes scenes and a parser that reads captions back.

Three forms, as Florence-2 has three caption tasks: `short` names the objects, `tags` states
everything in a fixed terse order, `detailed` states everything in varied sentences and order.
What cannot be seen is never said: no colours, ground or time of day in a sketch or a sepia print.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vlv.errors import ConfigError
from vlv.toyworld.scene import COLOURED_STYLES, COLUMNS, Scene, Solid

Form = Literal["short", "tags", "detailed"]
FORMS: tuple[Form, ...] = ("short", "tags", "detailed")

WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "sphere": ("sphere", "ball"),
        "cube": ("cube", "block"),
        "cylinder": ("cylinder", "drum"),
        "cone": ("cone",),
    },
    "colour": {c: (c,) for c in ("red", "yellow", "green", "turquoise", "blue", "purple")},
    "size": {"small": ("small", "little"), "large": ("large", "big")},
    "material": {
        "matte": ("matte", "dull"),
        "shiny": ("shiny", "glossy"),
        "striped": ("striped", "banded"),
    },
    "column": {
        "left": ("on the left", "at the left"),
        "middle": ("in the middle", "in the centre"),
        "right": ("on the right", "at the right"),
    },
    "row": {
        "front": ("in front", "in the foreground"),
        "back": ("at the back", "in the background"),
    },
    "style": {
        "photo": ("photo", "photograph"),
        "cartoon": ("cartoon", "comic"),
        "sketch": ("pencil sketch", "pencil drawing"),
        "sepia": ("sepia print", "sepia picture"),
    },
    "ground": {
        "grass": ("a meadow", "a grassy plain"),
        "sand": ("a desert", "a sandy plain"),
        "snow": ("a snowfield", "a snowy plain"),
    },
    "time": {
        "day": ("by day", "in daylight"),
        "sunset": ("at sunset", "at dusk"),
        "night": ("at night", "by night"),
    },
    "light": {
        "left": ("lit from the left", "light comes from the left"),
        "right": ("lit from the right", "light comes from the right"),
    },
    "view": {
        "high": ("seen from above", "seen from high up"),
        "low": ("seen from a low angle", "seen from low down"),
    },
}
"""Every fact and the phrases that state it; the first phrase is the plainest."""

SCENE_FACTS = ("style", "ground", "time", "light", "view")
OBJECT_FACTS = ("shape", "colour", "size", "material", "column", "row")
RELATIONS = {
    "to the left of": "left",
    "to the right of": "right",
    "in front of": "front",
    "behind": "behind",
}


@dataclass(frozen=True, slots=True)
class Claims:
    """What a caption (or a scene, or an inspector) says."""

    scene: dict[str, str] = field(default_factory=dict)
    """Fact name to value, for `SCENE_FACTS`."""
    objects: tuple[dict[str, str], ...] = ()
    """For every object the stated `OBJECT_FACTS`."""
    relations: tuple[tuple[str, str, str], ...] = ()
    """(object, relation, shape) with the relations left, right, front, behind; the object is a shape
    such as `cube`, or a size and a shape such as `small cube`."""
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


def describe(scene: Scene, form: Form, rng: np.random.Generator) -> str:
    """Write a caption of a scene.

    Raises:
        ConfigError: if the form is unknown.
    """
    if form == "short":
        return _short(scene, rng)
    if form == "tags":
        return _tags(scene)
    if form == "detailed":
        return _detailed(scene, rng)
    raise ConfigError(f"unknown caption form {form!r}; choose one of {', '.join(FORMS)}")


def _say(kind: str, value: str, rng: np.random.Generator) -> str:
    options = WORDS[kind][value]
    return options[int(rng.integers(len(options)))]


def _noun(claims: dict[str, str], facts: tuple[str, ...], rng: np.random.Generator) -> str:
    return " ".join(["a", *(_say(fact, claims[fact], rng) for fact in facts if fact in claims)])


def _short(scene: Scene, rng: np.random.Generator) -> str:
    claims = true_claims(scene)
    nouns = [_noun(solid, ("colour", "shape"), rng) for solid in claims.objects]
    return f"A {_say('style', scene.style, rng)} of {_join(nouns)}."


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _tags(scene: Scene) -> str:
    claims = true_claims(scene)
    facts = claims.scene
    head = [facts["style"], *(facts[f] for f in ("ground", "time") if f in facts)]
    head += [f"{facts['light']} light", f"{facts['view']} view"]
    objects = [
        " ".join(o[f] for f in ("size", "material", "colour", "shape", "column", "row") if f in o)
        for o in claims.objects
    ]
    return ", ".join(head + objects)


def _detailed(scene: Scene, rng: np.random.Generator) -> str:
    head = _opening(scene, rng)
    body = _objects(scene, rng)
    sentences = [head, body]
    if len(scene.solids) == 2 and rng.random() < 0.5:
        sentences.append(_relation(scene, rng))
    if rng.random() < 0.25:
        sentences = [*sentences[1:], head]
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def _opening(scene: Scene, rng: np.random.Generator) -> str:
    facts = true_claims(scene).scene
    style = _say("style", scene.style, rng)
    place = [_say(f, facts[f], rng) for f in ("ground", "time") if f in facts]
    subject = f"a {style} of {' '.join(place)}" if place else f"a {style}"
    extras = [_say("view", scene.view, rng), WORDS["light"][scene.light][0]]
    if rng.random() < 0.5:
        extras.reverse()
    if rng.random() < 0.3:
        extras.remove(WORDS["light"][scene.light][0])
        return f"{subject}, {extras[0]}. {_capital(WORDS['light'][scene.light][1])}"
    return f"{subject}, {', '.join(extras)}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _objects(scene: Scene, rng: np.random.Generator) -> str:
    claims = list(true_claims(scene).objects)
    order = rng.permutation(len(claims))
    place_first = rng.random() < 0.5
    phrases = [_object(claims[i], rng, place_first=place_first) for i in order]
    if place_first:
        phrases[0] = phrases[0].replace(" a ", (" is a ", " stands a ")[int(rng.integers(2))], 1)
    else:
        phrases[0] = ("there is ", "we see ")[int(rng.integers(2))] + phrases[0]
    joint = "; " if rng.random() < 0.3 else ", "
    return joint.join(phrases)


def _object(claims: dict[str, str], rng: np.random.Generator, *, place_first: bool) -> str:
    place = f"{_say('column', claims['column'], rng)} {_say('row', claims['row'], rng)}"
    noun = _noun(claims, ("size", "material", "colour", "shape"), rng)
    return f"{place} {noun}" if place_first else f"{noun} {place}"


def _relation(scene: Scene, rng: np.random.Generator) -> str:
    first, second = (scene.solids[i] for i in rng.permutation(2))
    kinds = [k for k in RELATIONS if _holds(RELATIONS[k], first, second)]
    kind = kinds[int(rng.integers(len(kinds)))]
    names = [_say("shape", solid.shape, rng) for solid in (first, second)]
    if first.shape == second.shape:  # "the cone is behind the cone" would say nothing
        return f"the {_say('size', first.size, rng)} {names[0]} is {kind} the other"
    return f"the {names[0]} is {kind} the {names[1]}"


def _holds(relation: str, a: Solid, b: Solid) -> bool:
    if relation == "left":
        return COLUMNS.index(a.column) < COLUMNS.index(b.column)
    if relation == "right":
        return COLUMNS.index(a.column) > COLUMNS.index(b.column)
    return (a.row, b.row) == (("front", "back") if relation == "front" else ("back", "front"))


# --- reading ------------------------------------------------------------------------------------

_PHRASES = {
    kind: {phrase: value for value, phrases in table.items() for phrase in phrases}
    for kind, table in WORDS.items()
}


def _any_of(phrases: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(phrases, key=len, reverse=True)))


_SAID = {kind: re.compile(rf"\b(?:{_any_of(table)})\b") for kind, table in _PHRASES.items()}
_TAG_SCENE = {
    **{word: (kind, word) for kind in ("style", "ground", "time") for word in WORDS[kind]},
    **{f"{side} light": ("light", side) for side in WORDS["light"]},
    **{f"{height} view": ("view", height) for height in WORDS["view"]},
}
_AFTER_NOUN = "|".join(f"(?<={noun}) " for noun in _PHRASES["shape"])
CLAUSE_END = re.compile(rf"[.;,]|(?:\band |\bof |{_AFTER_NOUN})(?=a\b)")
"""Where the parser breaks prose: each clause speaks of one object at most."""
_QUALIFIED = rf"(?:({_any_of(_PHRASES['size'])}) )?({_any_of(_PHRASES['shape'])})\b"
_RELATION = re.compile(
    rf"\bthe {_QUALIFIED} is ({_any_of(RELATIONS)}) the (other|{_any_of(_PHRASES['shape'])})\b"
)
REFERENCE = re.compile(rf"\bthe {_QUALIFIED}")
"""Words that speak of an object without adding one."""


def parse(caption: str) -> Claims:
    """Read a caption of any form back into claims.

    Text that says nothing adds nothing, nor does a sentence that breaks off before its noun. Of a
    thing that is given several values of one fact the first stands; the others are contradictions.
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
    objects, relations = [], []
    for clause in CLAUSE_END.split(text):
        relation = _parse_relation(clause)
        clause = REFERENCE.sub(" ", clause)  # "the cube" speaks of an object, "a cube" adds one
        if relation:
            relations.append(relation)
        elif _SAID["shape"].search(clause):
            found, repeated = _read_facts(clause, OBJECT_FACTS)
            objects.append(found)
            contradictions += repeated
    return Claims(scene, tuple(objects), tuple(relations), tuple(contradictions))


def _read_facts(text: str, kinds: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    return _first_values(
        {kind: [_PHRASES[kind][said] for said in _SAID[kind].findall(text)] for kind in kinds}
    )


def _first_values(stated: dict[str, list[str]]) -> tuple[dict[str, str], list[str]]:
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


def _parse_relation(clause: str) -> tuple[str, str, str] | None:
    match = _RELATION.search(clause)
    if not match:
        return None
    size, noun, kind, other = match.groups()
    shape = _PHRASES["shape"][noun]
    first = f"{_PHRASES['size'][size]} {shape}" if size else shape
    return first, RELATIONS[kind], shape if other == "other" else _PHRASES["shape"][other]


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
        _holds(kind, a, b)
        for a, b in itertools.permutations(scene.solids, 2)
        if first in (a.shape, f"{a.size} {a.shape}") and b.shape == second
    )
