"""Questions about a scene whose answers are plain; what cannot be seen is not asked."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlv.toyworld.language import true_claims
from vlv.toyworld.scene import COLOURED_STYLES, COLOURS, COLUMNS, SHAPES, Scene

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
