"""What teaches instructions is true, and the form of a text is recognised."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.toyworld.world import make_scene, make_solid
from vlv.data.source import find_records
from vlv.toyworld.dataset import Layout, render_shards
from vlv.toyworld.language import compare, parse, true_claims
from vlv.toyworld.questions import Question, ask_at_length
from vlv.toyworld.scene import COLUMNS, Scene, sample_scene
from vlv.toyworld.styles import STYLES, is_written_as, texts_of, write


def asked(scenes: list[Scene]) -> list[tuple[Scene, Question]]:
    return [
        (scene, question)
        for number, scene in enumerate(scenes)
        for question in ask_at_length(scene, np.random.default_rng(number))
    ]


def test_captions_are_true_and_have_the_form_of_their_style(scenes: list[Scene]) -> None:
    for number, scene in enumerate(scenes):
        captions = texts_of(scene, np.random.default_rng(number))["captions"]
        assert tuple(captions) == STYLES
        for style, text in captions.items():
            assert compare(parse(text), scene).precision == 1
            assert is_written_as(style, text), (style, text)
        for style, other in (("tags", "short"), ("short", "detailed"), ("detailed", "tags")):
            assert not is_written_as(style, captions[other]), (style, captions[other])
        assert not is_written_as("prompt", captions["detailed"])


def test_what_is_known_is_true(scenes: list[Scene]) -> None:
    for number, scene in enumerate(scenes):
        known = texts_of(scene, np.random.default_rng(number))["known"].split(", ")
        assert 1 <= len(known) <= 3
        truth = true_claims(scene)
        for tag in known:
            words = set(tag.split())
            is_object = any(words <= set(facts.values()) for facts in truth.objects)
            assert is_object or tag in (truth.scene.get("ground"), truth.scene.get("time"))


def test_a_partial_caption_has_any_length() -> None:
    lengths = Counter()
    for number in range(300):
        scene = sample_scene(3, number)
        text = write("partial", scene, np.random.default_rng(number))
        assert len(parse(text).objects) <= len(scene.solids)
        lengths[len(text.split()) // 5] += 1
    assert all(lengths[fifth] > 5 for fifth in range(8)), "of 0 to 39 words"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("text", ["", "yes", "red", "A photo of", "a , b"])
def test_no_text_of_another_kind_has_the_form_of_a_style(style: str, text: str) -> None:
    assert not is_written_as(style, text)


def test_questions_have_true_answers_and_many_forms(scenes: list[Scene]) -> None:
    answers: dict[str, Counter[str]] = {}
    for scene, question in asked(scenes):
        text = question.question.lower()
        shapes = [solid.shape for solid in scene.solids]
        if text.startswith("how many ") and "object" not in text:
            count = shapes.count(text.split()[2].rstrip("?").removesuffix("s"))
            assert question.answer == ("zero", "one", "two", "three")[count]
        elif text.startswith("is anything "):
            colour = text.split()[2].rstrip("?")
            there = any(solid.colour == colour for solid in scene.solids)
            assert question.answer == ("yes" if there else "no")
        elif text.startswith("is the ") and question.answer in ("yes", "no"):
            first, second = (
                next(s for s in scene.solids if s.shape == word)
                for word in (text.split()[2], text.split()[-1].rstrip("?"))
            )
            columns = COLUMNS.index(first.column), COLUMNS.index(second.column)
            truth = {
                "left of": columns[0] < columns[1],
                "right of": columns[0] > columns[1],
                "in front of": (first.row, second.row) == ("front", "back"),
                "behind": (first.row, second.row) == ("back", "front"),
            }[" ".join(text.split()[3:-2])]
            assert question.answer == ("yes" if truth else "no"), text
        answers.setdefault(question.kind, Counter())[question.answer] += 1
    for kind in ("existence", "relation"):
        assert max(answers[kind].values()) < 0.7 * answers[kind].total()
    assert max(answers["count"].values()) < 0.5 * answers["count"].total()


def test_what_two_alike_would_make_ambiguous_is_not_asked() -> None:
    scene = make_scene(make_solid(column="left"), make_solid(column="right"))
    for seed in range(20):
        for question in ask_at_length(scene, np.random.default_rng(seed)):
            assert question.kind != "relation"


def test_rendered_records_hold_them(tmp_path: Path) -> None:
    plain, more = tmp_path / "plain", tmp_path / "more"
    render_shards(plain, Layout("val", 2, seed=3), 1)
    render_shards(more, Layout("val", 2, seed=3, instruct=True), 1)
    for index, (before, record) in enumerate(
        zip(find_records([plain]), find_records([more]), strict=True)
    ):
        assert record.caption == before.caption, "the plain caption stays as it was"
        assert record.meta is not None
        texts = texts_of(sample_scene(3, index, "val"), np.random.default_rng([3, index, 8]))
        assert {name: record.meta[name] for name in texts} == json.loads(json.dumps(texts))
