"""What pictures that were drawn from sentences are asked."""

from __future__ import annotations

import numpy as np

from vlv.toyworld.language import Claims, parse, true_claims
from vlv.toyworld.probes import (
    facts_shown,
    feature_distances,
    plain_sentences,
    relation_sentences,
    relations_shown,
)
from vlv.toyworld.scene import sample_scene


def test_relation_sentences_are_true_and_tell_the_place_by_a_relation_alone() -> None:
    scenes, texts = relation_sentences(60, 5)
    shown = relations_shown(texts, [true_claims(scene) for scene in scenes])
    assert shown.tolist() == [[1, 1, 1]] * 60
    claims = [parse(text) for text in texts]
    assert all(len(c.objects) == 2 and len(c.relations) == 1 for c in claims)
    assert not any({"column", "row"} & facts.keys() for c in claims for facts in c.objects)
    assert {c.relations[0][1] for c in claims} == {"left", "right", "front", "behind"}
    assert (scenes, texts) == relation_sentences(60, 5)


def test_a_picture_with_its_objects_exchanged_does_not_show_the_relation() -> None:
    text = "A photo of a red cube left of a blue sphere."
    cube = {"shape": "cube", "colour": "red", "row": "front"}
    ball = {"shape": "sphere", "colour": "blue", "row": "back"}
    right = Claims(objects=(cube | {"column": "left"}, ball | {"column": "middle"}))
    wrong = Claims(objects=(cube | {"column": "right"}, ball | {"column": "middle"}))
    other = Claims(
        objects=(cube | {"column": "left", "colour": "green"}, ball | {"column": "right"})
    )
    shown = relations_shown([text] * 3, [right, wrong, other])
    assert shown.tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    behind = relations_shown(["a blue sphere behind a red cube"], [right])
    assert behind.tolist() == [[1, 1, 1]]


def test_facts_of_plain_sentences_are_found_in_true_pictures() -> None:
    scenes = [sample_scene(5, row, "test") for row in range(80)]
    texts = plain_sentences(80, 5)
    facts = facts_shown(texts, [true_claims(scene) for scene in scenes])
    assert (facts[:, 0] == facts[:, 1]).all()
    assert (facts[:, 2] == facts[:, 3]).all()
    assert facts[:, 3].tolist() == [len(scene.solids) for scene in scenes]


def test_missing_surplus_and_wrong_objects_count() -> None:
    text = "A cartoon of a red cube and a blue sphere."
    cube, ball = {"shape": "cube", "colour": "red"}, {"shape": "sphere", "colour": "blue"}
    pictures = [
        Claims({"style": "cartoon"}, (cube,)),
        Claims({"style": "photo"}, (cube, ball, cube)),
        Claims({"style": "cartoon"}, (cube, ball | {"colour": "green"})),
    ]
    facts = facts_shown([text] * 3, pictures)
    assert facts.tolist() == [[3, 5, 1, 2], [4, 5, 2, 3], [4, 5, 1, 2]]


def test_feature_distances() -> None:
    first = np.zeros((2, 4), np.float32)
    second = np.array([[3, 4, 0, 0], [0, 0, 0, 0]], np.float32)
    assert feature_distances(first, second).tolist() == [5, 0]
