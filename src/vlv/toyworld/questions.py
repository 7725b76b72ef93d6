"""Questions about a scene whose answers are plain; what cannot be seen is not asked."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlv.toyworld.language import holds, true_claims
from vlv.toyworld.scene import COLOURED_STYLES, COLOURS, COLUMNS, SHAPES, Scene, Solid

Kind = Literal["existence", "count", "colour", "shape", "material", "relation", "style"]

_NUMBERS = ("zero", "one", "two", "three")


@dataclass(frozen=True, slots=True)
class Question:
    """One question and its only right answer, both in lower-case words."""

    kind: Kind
    question: str
    answer: str


def ask(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """All kinds of question that the scene can answer, one of each, in a fixed order."""
    claims = true_claims(scene).objects
    shapes = [solid["shape"] for solid in claims]
    questions = [
        _existence(shapes, scene, rng),
        Question("count", "how many objects are there?", _NUMBERS[len(claims)]),
        Question("style", "what kind of picture is it?", scene.style),
    ]
    unique = [solid for solid in claims if shapes.count(solid["shape"]) == 1]
    if unique:
        solid = unique[int(rng.integers(len(unique)))]
        name = solid["shape"]
        if "colour" in solid:
            questions.append(Question("colour", f"what colour is the {name}?", solid["colour"]))
        questions.append(
            Question("material", f"what is the surface of the {name} like?", solid["material"])
        )
    place = claims[int(rng.integers(len(claims)))]
    questions.append(
        Question("shape", f"what shape is the object on the {place['column']}?", place["shape"])
    )
    if len(unique) > 1:
        questions.append(_relation(unique, rng))
    return questions


def ask_at_length(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """More questions, in more words: what teaches and tests a model that answers.

    Beside those of `ask` it counts shapes and asks for a yes or no to relations and colours; half of the questions begin
    with a capital letter.
    """
    questions = [*ask(scene, rng), _count_of(scene, rng)]
    if scene.style in COLOURED_STYLES:
        questions.append(_colour_at_all(scene, rng))
    shapes = [solid.shape for solid in scene.solids]
    unique = [solid for solid in scene.solids if shapes.count(solid.shape) == 1]
    if len(unique) > 1:
        questions.append(_confirmed(unique, rng))
    return [_reworded(question, rng) for question in questions]


def _count_of(scene: Scene, rng: np.random.Generator) -> Question:
    """How often there is a shape; half of the time one that is there, or the answer would mostly be zero."""
    shapes = [solid.shape for solid in scene.solids]
    known = shapes if rng.random() < 0.5 else SHAPES
    shape = known[int(rng.integers(len(known)))]
    return Question("count", f"how many {shape}s are there?", _NUMBERS[shapes.count(shape)])


def _colour_at_all(scene: Scene, rng: np.random.Generator) -> Question:
    colours = [solid.colour for solid in scene.solids]
    known = colours if rng.random() < 0.4 else COLOURS
    colour = known[int(rng.integers(len(known)))]
    return Question("existence", f"is anything {colour}?", "yes" if colour in colours else "no")


def _confirmed(unique: list[Solid], rng: np.random.Generator) -> Question:
    """Whether one of two objects, each the only one of its shape, stands on a side of the other; yes as often as no."""
    first, second = (unique[i] for i in rng.permutation(len(unique))[:2])
    kinds = ("left", "right") if first.row == second.row else tuple(_SIDES)
    kind = kinds[int(rng.integers(len(kinds)))]
    text = f"is the {first.shape} {_SIDES[kind]} the {second.shape}?"
    return Question("relation", text, "yes" if holds(kind, first, second) else "no")


_SIDES: dict[str, str] = {
    "left": "left of",
    "right": "right of",
    "front": "in front of",
    "behind": "behind",
}
_OTHER_WORDS = {
    "is there a ": "do you see a ",
    "how many objects are there?": "how many objects?",
    "what colour is ": "which colour is ",
    "what kind of picture is it?": "what kind of image is this?",
}
"""Parts of questions, and what may stand in their place."""


def in_usual_words(question: str) -> str:
    """A question of `ask_at_length` as it was before it was reworded.

    >>> in_usual_words("How many cubes?"), in_usual_words("Do you see a cone?")
    ('how many cubes are there?', 'is there a cone?')
    """
    text = question[:1].lower() + question[1:]
    for usual, other in _OTHER_WORDS.items():
        text = text.replace(other, usual)
    if text.startswith("how many ") and not text.endswith(" are there?"):
        text = text.removesuffix("?") + " are there?"
    return text


def _reworded(question: Question, rng: np.random.Generator) -> Question:
    text = question.question
    if rng.random() < 0.3:
        for usual, other in _OTHER_WORDS.items():
            text = text.replace(usual, other)
        text = text.replace("s are there?", "s?") if text.startswith("how many ") else text
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return Question(question.kind, text, question.answer)


def _existence(shapes: list[str], scene: Scene, rng: np.random.Generator) -> Question:
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    if scene.style in COLOURED_STYLES and rng.random() < 0.5:
        colour = COLOURS[int(rng.integers(len(COLOURS)))]
        if rng.random() < 0.5:  # otherwise the answer would nearly always be no
            solid = scene.solids[int(rng.integers(len(scene.solids)))]
            shape, colour = solid.shape, solid.colour
        found = any((s.shape, s.colour) == (shape, colour) for s in scene.solids)
        return Question("existence", f"is there a {colour} {shape}?", "yes" if found else "no")
    return Question("existence", f"is there a {shape}?", "yes" if shape in shapes else "no")


def _relation(unique: list[dict[str, str]], rng: np.random.Generator) -> Question:
    pairs = list(itertools.permutations(unique, 2))
    a, b = pairs[int(rng.integers(len(pairs)))]
    answer = "left" if COLUMNS.index(a["column"]) < COLUMNS.index(b["column"]) else "right"
    text = f"is the {a['shape']} to the left or to the right of the {b['shape']}?"
    return Question("relation", text, answer)
