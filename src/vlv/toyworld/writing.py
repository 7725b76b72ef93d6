"""The texts of the world: a grammar that describes scenes.

Four forms. `short` names the objects, `tags` states everything in a fixed terse order, `detailed` states everything in
varied sentences and order: Florence-2's three caption tasks. `plain` is what people type: some of the attributes, in any
order, and where things are either not at all, or by their columns, or only by their relation to each other. Every text
names every object. What cannot be seen is never said: no colours, ground or time of day in a sketch or a sepia print.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Literal

import numpy as np

from vlv.errors import ConfigError
from vlv.toyworld.language import Facts, holds, true_claims
from vlv.toyworld.questions import ask
from vlv.toyworld.scene import Scene, Solid
from vlv.toyworld.words import NAME_FACTS, PLAIN, RELATIONS, UNKNOWN_SHAPE, WORDS

Form = Literal["short", "tags", "detailed", "plain"]
FORMS: tuple[Form, ...] = ("short", "tags", "detailed", "plain")

Write = Callable[[Scene, np.random.Generator], str]
"""A text of a scene."""

CAPTIONED = {
    "left": "to the left of",
    "right": "to the right of",
    "front": "in front of",
    "behind": "behind",
}
"""How captions say a relation; plain sentences have all the words of `RELATIONS`."""

Thing = tuple[Facts, Solid]
"""What is said of an object, and the object."""


def describe(scene: Scene, form: Form, rng: np.random.Generator) -> str:
    """Write a caption of a scene.

    Raises:
        ConfigError: if the form is unknown.
    """
    match form:
        case "short":
            return _short(scene, rng)
        case "tags":
            return _tags(scene)
        case "detailed":
            return _detailed(scene, rng)
        case "plain":
            return _plain(scene, rng)
    raise ConfigError(f"unknown caption form {form!r}; choose one of {', '.join(FORMS)}")


def _say(fact: str, value: str, rng: np.random.Generator) -> str:
    return _one(WORDS[fact][value], rng)


def _say_plainly(fact: str, value: str, rng: np.random.Generator) -> str:
    return _one((*WORDS[fact][value], *PLAIN.get(fact, {}).get(value, ())), rng)


def _one(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _noun(facts: Facts, rng: np.random.Generator, *, article: str = "a") -> str:
    """The object in words, its attributes in the usual order."""
    words = [_say(fact, facts[fact], rng) for fact in NAME_FACTS[:-1] if fact in facts]
    return _phrase(words, facts, rng, article)


def _phrase(words: list[str], facts: Facts, rng: np.random.Generator, article: str) -> str:
    noun = _say("shape", facts["shape"], rng) if "shape" in facts else UNKNOWN_SHAPE
    text = " ".join((*words, noun))
    return f"an {text}" if article == "a" and text[0] in "aeiou" else f"{article} {text}"


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _only(facts: Facts, names: tuple[str, ...]) -> Facts:
    return {name: facts[name] for name in names if name in facts}


# --- short and tags -------------------------------------------------------------------------------


def _short(scene: Scene, rng: np.random.Generator) -> str:
    claims = true_claims(scene)
    nouns = [_noun(_only(solid, ("colour", "shape")), rng) for solid in claims.objects]
    return f"A {_say('style', scene.style, rng)} of {_join(nouns)}."


def _tags(scene: Scene) -> str:
    claims = true_claims(scene)
    facts = claims.scene
    head = [facts["style"], *(facts[f] for f in ("ground", "time") if f in facts)]
    head += [f"{facts['light']} light", f"{facts['view']} view"]
    objects = [
        " ".join(o[f] for f in (*NAME_FACTS, "column", "row") if f in o) for o in claims.objects
    ]
    return ", ".join(head + objects)


# --- detailed -------------------------------------------------------------------------------------


def _detailed(scene: Scene, rng: np.random.Generator) -> str:
    head = _opening(scene, rng)
    sentences = [head, _objects(scene, rng)]
    if len(scene.solids) == 2 and rng.random() < 0.5:
        sentences.append(_relation(scene, rng))
    if rng.random() < 0.25:
        sentences = [*sentences[1:], head]
    return " ".join(_capital(sentence) + "." for sentence in sentences)


def _opening(scene: Scene, rng: np.random.Generator) -> str:
    facts = true_claims(scene).scene
    style = _say("style", scene.style, rng)
    place = [_say(f, facts[f], rng) for f in ("ground", "time") if f in facts]
    subject = f"a {style} of {' '.join(place)}" if place else f"a {style}"
    light, sentence = WORDS["light"][scene.light]
    extras = [_say("view", scene.view, rng), light]
    if rng.random() < 0.5:
        extras.reverse()
    if rng.random() < 0.3:
        extras.remove(light)
        return f"{subject}, {extras[0]}. {_capital(sentence)}"
    return f"{subject}, {', '.join(extras)}"


def _objects(scene: Scene, rng: np.random.Generator) -> str:
    claims = list(true_claims(scene).objects)
    order = rng.permutation(len(claims))
    place_first = rng.random() < 0.5
    phrases = [_object(claims[i], rng, place_first=place_first) for i in order]
    if place_first:
        verb = ("is", "stands")[int(rng.integers(2))]
        before, article, after = phrases[0].partition(" an " if " an " in phrases[0] else " a ")
        phrases[0] = f"{before} {verb}{article}{after}"
    else:
        phrases[0] = ("there is ", "we see ")[int(rng.integers(2))] + phrases[0]
    joint = "; " if rng.random() < 0.3 else ", "
    return joint.join(phrases)


def _object(facts: Facts, rng: np.random.Generator, *, place_first: bool) -> str:
    place = f"{_say('column', facts['column'], rng)} {_say('row', facts['row'], rng)}"
    noun = _noun(facts, rng)
    return f"{place} {noun}" if place_first else f"{noun} {place}"


def _relation(scene: Scene, rng: np.random.Generator) -> str:
    first, second = (scene.solids[i] for i in rng.permutation(2))
    kinds = [kind for kind in CAPTIONED if holds(kind, first, second)]
    how = CAPTIONED[kinds[int(rng.integers(len(kinds)))]]
    names = [_say("shape", solid.shape, rng) for solid in (first, second)]
    if first.shape == second.shape:  # "the cone is behind the cone" would say nothing
        return f"the {_say('size', first.size, rng)} {names[0]} is {how} the other"
    return f"the {names[0]} is {how} the {names[1]}"


# --- plain ----------------------------------------------------------------------------------------


def _plain(scene: Scene, rng: np.random.Generator) -> str:
    claims = true_claims(scene)
    chosen = _chosen(rng)
    order = rng.permutation(len(scene.solids))
    things = [(_only(claims.objects[i], chosen), scene.solids[i]) for i in order]
    text = _arranged(things, rng)
    return _with_surroundings(text, _plain_facts(claims.scene, rng), rng)


def _with_surroundings(text: str, facts: Facts, rng: np.random.Generator) -> str:
    """The objects, and what is said of the scene around them."""
    style = facts.pop("style", None)
    if style is not None:
        text = f"a {style} of {text}"
    elif rng.random() < 0.2:
        text = f"there is {text}"
    extras = [facts[name] for name in rng.permutation(sorted(facts))]
    if extras and rng.random() < 0.2:
        text = f"{extras.pop()}, {text}"
    joint = ", " if rng.random() < 0.5 else " "
    text = joint.join((text, *extras)) if len(extras) == 1 else ", ".join((text, *extras))
    return text if rng.random() < 0.1 else _capital(text) + "."


def _chosen(rng: np.random.Generator) -> tuple[str, ...]:
    """The attributes that a text tells of its objects."""
    if rng.random() < 0.04:  # a green object
        return ("colour", *(f for f in ("size", "material") if rng.random() < 0.5))
    shares = {"colour": 0.85, "size": 0.35, "material": 0.35}
    return (*(fact for fact, share in shares.items() if rng.random() < share), "shape")


def _plain_facts(facts: Facts, rng: np.random.Generator) -> Facts:
    shares = {"style": 0.5, "ground": 0.3, "time": 0.3, "light": 0.2, "view": 0.2}
    chosen = [fact for fact, share in shares.items() if fact in facts and rng.random() < share]
    said = {fact: _say_plainly(fact, facts[fact], rng) for fact in chosen}
    if "ground" in said and said["ground"].startswith("a "):
        said["ground"] = f"in {said['ground']}"
    if "light" in said:
        said["light"] = WORDS["light"][facts["light"]][0]
    return said


def _arranged(things: list[Thing], rng: np.random.Generator) -> str:
    """The objects, and where they stand: not said, by column and row, or by relation alone."""
    draw = rng.random()
    if draw < 0.2:
        return _join([_free(facts, rng) for facts, _ in things])
    if len(things) == 1 or draw < 0.4:
        return _placed(things, rng)
    return _related(things, rng)


def _free(facts: Facts, rng: np.random.Generator) -> str:
    """An object with its attributes in any order."""
    words = [_say(fact, facts[fact], rng) for fact in NAME_FACTS[:-1] if fact in facts]
    if rng.random() < 0.3:
        words = [words[i] for i in rng.permutation(len(words))]
    return _phrase(words, facts, rng, "a")


def _placed(things: list[Thing], rng: np.random.Generator) -> str:
    with_row = rng.random() < 0.4
    parts = []
    for facts, solid in things:
        place = _say("column", solid.column, rng)
        place += f" {_say('row', solid.row, rng)}" if with_row else ""
        parts.append(f"{_free(facts, rng)} {place}")
    return _join(parts)


def _related(things: list[Thing], rng: np.random.Generator) -> str:
    (first, a), (second, b) = things[:2]
    verb = ("", "is ")[int(rng.random() < 0.3)]
    text = f"{_free(first, rng)} {verb}{_how(a, b, rng)} {_free(second, rng)}"
    if len(things) == 2:
        return text
    third, c = things[2]
    everyone = [facts for facts, _ in things]
    anchors = [
        (name, solid) for facts, solid in things[:2] if (name := _name(facts, everyone, rng))
    ]
    if not anchors:
        return f"{text} and {_placed(things[2:], rng)}"
    name, solid = anchors[int(rng.integers(len(anchors)))]
    return f"{text} and {_free(third, rng)} {_how(c, solid, rng)} {name}"


def _how(first: Solid, second: Solid, rng: np.random.Generator) -> str:
    """Words for a relation that holds; the two pairs of directions are equally frequent where both do."""
    kinds = sorted({kind for kind in RELATIONS.values() if holds(kind, first, second)})
    kind = kinds[int(rng.integers(len(kinds)))]
    return _one(tuple(words for words, meant in RELATIONS.items() if meant == kind), rng)


def _name(facts: Facts, everyone: list[Facts], rng: np.random.Generator) -> str | None:
    """The shortest name, `the cube` or `the red cube`, that only one of the objects has; None if there is none."""
    if "shape" not in facts:
        return None
    for names in (("shape",), ("colour", "shape"), ("size", "shape"), ("material", "shape")):
        said = _only(facts, names)
        if (
            len(said) == len(names)
            and sum(said.items() <= other.items() for other in everyone) == 1
        ):
            return _noun(said, rng, article="the")
    return None


def describe_partly(scene: Scene, rng: np.random.Generator) -> str:
    """Write a caption of any length: some of the objects, each with as much around it as a draw says."""
    claims = true_claims(scene)
    richness = rng.random()  # from `a cube` to everything
    order = rng.permutation(len(scene.solids))[: 1 + int(rng.integers(len(scene.solids)))]
    names = ("size", "material", "colour")
    things = [
        (
            _only(claims.objects[i], (*(x for x in names if rng.random() < richness), "shape")),
            scene.solids[i],
        )
        for i in order
    ]
    parts = [_free(facts, rng) for facts, _ in things]
    if rng.random() < richness:
        parts = [
            f"{part} {_say('column', solid.column, rng)} {_say('row', solid.row, rng)}"
            for part, (_, solid) in zip(parts, things, strict=True)
        ]
    said = {name: _say(name, value, rng) for name, value in claims.scene.items()
        if name != "light" and rng.random() < richness}  # fmt: skip
    if "ground" in said and said["ground"].startswith("a "):
        said["ground"] = f"in {said['ground']}"
    if rng.random() < richness:
        said["light"] = WORDS["light"][scene.light][0]
    return _with_surroundings(_join(parts), said, rng)


# --- many texts -----------------------------------------------------------------------------------

TEXT_SHARES: dict[Form, float] = {"short": 0.1, "tags": 0.15, "detailed": 0.55, "plain": 0.2}
"""What the language model reads where a scene is described once."""


def write_mixed(scene: Scene, rng: np.random.Generator, shares: dict[Form, float]) -> str:
    """A text of a scene, its form drawn with the given shares."""
    form = rng.choice(len(FORMS), p=[shares.get(f, 0.0) for f in FORMS])
    return describe(scene, FORMS[form], rng)


def write_at_length(scene: Scene, rng: np.random.Generator) -> str:
    """What the language model reads of a scene: from that it learns to say in prose what stands tersely before it.

    Half of the texts say their scene twice, tersely and in prose; a quarter go on with questions.
    """
    draw = rng.random()
    if draw < 0.5:
        return f"{describe(scene, 'tags', rng)}\n{describe(scene, 'detailed', rng)}"
    caption = write_mixed(scene, rng, TEXT_SHARES)
    if draw < 0.75:
        return caption
    questions = ask(scene, rng)
    chosen = [questions[i] for i in rng.permutation(len(questions))[:2]]
    return caption + "".join(f"\n{q.question} {q.answer}" for q in chosen)


def write_several(
    write: Write, variants: int, seed: int, scenes: Sequence[Scene], first: int = 0
) -> list[str]:
    """Several texts of every scene, one after the other, that depend on the seed and the scene's number alone."""
    texts = []
    for number, scene in enumerate(scenes, first):
        rng = np.random.default_rng([seed, number])
        texts += [write(scene, rng) for _ in repeat(None, variants)]
    return texts
