from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest

from tests.toyworld.world import make_scene, make_solid
from vlv.toyworld.questions import Question, ask
from vlv.toyworld.scene import COLOURED_STYLES, COLUMNS, Scene, Solid

ALWAYS = {"existence", "count", "style", "shape"}


def asked(scenes: list[Scene]) -> Iterator[tuple[Scene, Question]]:
    for number, scene in enumerate(scenes):
        for question in ask(scene, np.random.default_rng(number)):
            yield scene, question


def only(scene: Scene, shape: str) -> Solid:
    """The one solid of a shape: a question must not be about one of several."""
    (solid,) = [s for s in scene.solids if s.shape == shape]
    return solid


def answer(scene: Scene, question: str) -> str:
    """The answer, worked out from the words of the question and the scene alone."""
    if question == "how many objects are there?":
        return {1: "one", 2: "two", 3: "three"}[len(scene.solids)]
    if question == "what kind of picture is it?":
        return scene.style
    if match := re.fullmatch(r"is there a (?:(\w+) )?(\w+)\?", question):
        colour, shape = match.groups()
        found = [s for s in scene.solids if s.shape == shape and colour in (None, s.colour)]
        return "yes" if found else "no"
    if match := re.fullmatch(r"what colour is the (\w+)\?", question):
        return only(scene, match[1]).colour
    if match := re.fullmatch(r"what is the surface of the (\w+) like\?", question):
        return only(scene, match[1]).material
    if match := re.fullmatch(r"what shape is the object on the (\w+)\?", question):
        (solid,) = [s for s in scene.solids if s.column == match[1]]
        return solid.shape
    match = re.fullmatch(r"is the (\w+) to the left or to the right of the (\w+)\?", question)
    assert match, question
    a, b = (COLUMNS.index(only(scene, shape).column) for shape in match.groups())
    return "left" if a < b else "right"


def test_every_answer_is_right(scenes: list[Scene]) -> None:
    for scene, question in asked(scenes):
        assert question.answer == answer(scene, question.question), (scene, question)


def test_what_cannot_be_seen_is_not_asked(scenes: list[Scene]) -> None:
    for scene, question in asked(scenes):
        if scene.style not in COLOURED_STYLES:
            assert question.kind != "colour"
            assert question.kind != "existence" or len(question.question.split()) == 4


def test_every_kind_is_asked_at_most_once(scenes: list[Scene]) -> None:
    for number, scene in enumerate(scenes):
        kinds = [q.kind for q in ask(scene, np.random.default_rng(number))]
        assert len(kinds) == len(set(kinds))
        assert set(kinds) >= ALWAYS


def test_yes_and_no_are_both_likely(scenes: list[Scene]) -> None:
    answers = [q.answer for _, q in asked(scenes) if q.kind == "existence"]
    assert 0.3 < answers.count("yes") / len(answers) < 0.7


@pytest.mark.parametrize("seed", range(5))
def test_a_scene_of_equal_shapes_is_not_asked_about_one_of_them(seed: int) -> None:
    scene = make_scene(make_solid(column="left"), make_solid(column="right"))
    assert {q.kind for q in ask(scene, np.random.default_rng(seed))} == ALWAYS
