"""Claims of captions in place: which are right, and what else they could be."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from vlv.toyworld.claims import find_claims, mark_claims
from vlv.toyworld.language import compare, parse
from vlv.toyworld.scene import sample_scene
from vlv.toyworld.words import WORDS
from vlv.toyworld.writing import FORMS, Form, describe


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [0, 1], ids=["its own scene", "another scene"])
def test_marks_agree_with_the_counts(form: Form, seed: int) -> None:
    for index in range(60):
        text = describe(sample_scene(0, index, "test"), form, np.random.default_rng(index))
        scene = sample_scene(seed, index, "test")
        marks, counts = mark_claims(text, scene), compare(parse(text), scene)
        assert len(marks) == counts.stated
        assert sum(mark.right for mark in marks) == counts.correct
        assert all(a.end <= b.start for a, b in pairwise(marks))
        assert seed or all(mark.right for mark in marks)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("A photo of a red blue ball.", ["red", "blue"]),
        ("A photo of a yellow ball and a yellow ball.", ["yellow", "ball"]),
        ("A cartoon photo of a yellow ball. The cube is shiny.", ["cartoon", "photo"]),
        ("A photo of a ball. The ball is behind the cone.", ["The ball is behind the cone"]),
        ("photo, snow, left light, big matte yellow sphere middle back", ["snow", "back"]),
    ],
)
def test_surplus_and_contradictory_claims_are_wrong(text: str, wrong: list[str]) -> None:
    scene = sample_scene(0, 0, "test")
    marks, counts = mark_claims(text, scene), compare(parse(text), scene)
    assert [text[mark.start : mark.end] for mark in marks if not mark.right] == wrong
    assert counts.stated - counts.correct == len(wrong)
    assert counts.correct == sum(mark.right for mark in marks)


@pytest.mark.parametrize(
    "text", ["", "\ufffd\u0130 cone cone, cone; cone. a cone cone, cone, cone", "the"]
)
def test_marks_survive_babble(text: str) -> None:
    marks = mark_claims(text, sample_scene(0, 1, "test"))
    assert all(text[mark.start : mark.end].strip() for mark in marks)


@pytest.mark.parametrize("form", FORMS)
def test_each_alternative_states_another_value(form: Form) -> None:
    for index in range(30):
        text = describe(sample_scene(0, index, "test"), form, np.random.default_rng(index))
        claims = find_claims(text)
        assert len(claims) == compare(parse(text), sample_scene(0, index, "test")).stated
        for claim in claims:
            values = 2 if claim.name == "relation" else len(WORDS[claim.name])
            assert len(set(claim.alternatives)) == values - 1
            for other in claim.alternatives:
                changed = parse(text[: claim.start] + other + text[claim.end :])
                assert changed != parse(text)
                assert len(changed.objects) == len(parse(text).objects)


@pytest.mark.parametrize(
    ("text", "place", "alternatives"),
    [
        ("A comic of a big ball.", 0, ("photograph", "pencil drawing", "sepia picture")),
        ("At the left stands a drum.", 0, ("In the centre", "At the right")),
        ("The ball is behind a cone.", 0, ("The ball is in front of",)),
        ("photo, snow, left light", 2, ("right light",)),
        ("a cone in the sand", 1, ("in the grass", "in the snow")),
    ],
)
def test_alternatives_keep_the_manner_of_speaking(
    text: str, place: int, alternatives: tuple[str, ...]
) -> None:
    assert find_claims(text)[place].alternatives == alternatives


def test_other_languages_make_no_claims() -> None:
    assert (
        find_claims(
            "Ein roter W\u00fcrfel steht links. \u4e00\u4e2a\u7ea2\u8272\u7684\u7acb\u65b9\u4f53"
        )
        == []
    )
