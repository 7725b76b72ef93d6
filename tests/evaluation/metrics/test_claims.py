"""Claims counted against scenes whose truth is known."""

from __future__ import annotations

import dataclasses

import numpy as np

from vlv.evaluation.metrics.claims import (
    FACTS,
    claim_counts,
    equal_tokens,
    facts_shown,
    object_counts,
    place_errors,
    relation_columns,
    relations_shown,
    unseen_pairs,
)
from vlv.toyworld.language import Claims, parse, true_claims
from vlv.toyworld.scene import HELD_OUT, Scene, Solid, sample_scene
from vlv.toyworld.writing import describe


def scene(*solids: Solid, style: str = "photo") -> Scene:
    return dataclasses.replace(sample_scene(0, 0, "test"), solids=solids, style=style)


CUBE = Solid("cube", "red", "large", "matte", "left", "front", x=-2.0, y=-0.7, yaw=0.1)
CONE = Solid("cone", "blue", "small", "shiny", "right", "back", x=2.5, y=1.7, yaw=0.0)


def seen(truth: Scene, **changes: str) -> Claims:
    claims = true_claims(truth)
    first, *others = claims.objects
    return Claims(claims.scene, ({**first, **changes}, *others))


def places(truth: Scene) -> list[tuple[float, float]]:
    return [(solid.x, solid.y) for solid in truth.solids]


def test_all_is_right() -> None:
    truth = scene(CUBE, CONE)
    np.testing.assert_array_equal(object_counts([seen(truth)], [truth]), [[2, 2, 3, 3]])
    np.testing.assert_allclose(place_errors([seen(truth)], [places(truth)], [truth]), [[0, 0, 2]])
    counts = claim_counts([seen(truth)], [truth])
    assert counts.shape == (1, len(FACTS), 3)
    assert (counts == counts[..., :1]).all()


def test_one_wrong_attribute_makes_an_object_wrong() -> None:
    truth = scene(CUBE, CONE)
    wrong = seen(truth, material="shiny")
    np.testing.assert_array_equal(object_counts([wrong], [truth]), [[1, 2, 3, 3]])


def test_missing_and_extra_objects_are_wrong() -> None:
    both, one = scene(CUBE, CONE), scene(CUBE)
    np.testing.assert_array_equal(object_counts([seen(one)], [both]), [[1, 2, 2, 3]])
    np.testing.assert_array_equal(object_counts([seen(both)], [one]), [[1, 2, 2, 3]])
    moved = seen(one, column="middle")
    np.testing.assert_array_equal(object_counts([moved], [one]), [[0, 2, 1, 3]])


def test_places_count_for_objects_in_their_columns() -> None:
    truth = scene(CUBE, CONE)
    found = place_errors([seen(truth)], [[(-1.5, -0.5), (2.5, 1.7)]], [truth])
    np.testing.assert_allclose(found, [[0.5, 0.2, 2]])
    moved = seen(truth, column="middle")
    np.testing.assert_allclose(place_errors([moved], [places(truth)], [truth]), [[0, 0, 1]])
    nothing = Claims(true_claims(truth).scene)
    np.testing.assert_array_equal(place_errors([nothing], [[]], [truth]), [[0, 0, 0]])


def test_unseen_pairs() -> None:
    shape, colour = HELD_OUT[0]
    odd = dataclasses.replace(CUBE, shape=shape, colour=colour)
    truth = scene(odd, CONE)
    claims = true_claims(truth)
    wrong = Claims(claims.scene, ({**claims.objects[0], "colour": "red"},))
    sketch = scene(odd, style="sketch")
    found = unseen_pairs([claims, wrong, true_claims(sketch)], [truth, truth, sketch])
    np.testing.assert_array_equal(found, [[1, 1], [0, 1], [0, 0]])


def test_nothing_to_count() -> None:
    assert claim_counts([], []).shape == (0, len(FACTS), 3)
    assert unseen_pairs([], []).shape == (0, 2)


def test_relations_stated() -> None:
    truth = scene(CUBE, CONE)
    texts = [
        "The cube is to the left of the cone.",
        "The cube is behind the cone.",
        "A cube.",
    ]
    found = relation_columns(claim_counts([parse(text) for text in texts], [truth] * 3))
    np.testing.assert_array_equal(found, [[1, 1], [0, 1], [0, 0]])


def test_relations_of_a_text_are_looked_for_in_its_image() -> None:
    truth = scene(CUBE, CONE)
    left, behind = (parse(f"The cube is {kind} the cone.") for kind in ("to the left of", "behind"))
    swapped = seen(truth, column="right", row="back")
    swapped = Claims({}, (swapped.objects[0], {**swapped.objects[1], "column": "left", "row": "front"}))  # fmt: skip
    views = [seen(truth), swapped, Claims({}, seen(truth).objects[:1])]
    np.testing.assert_array_equal(relations_shown([left] * 3, views), [[1, 1], [0, 1], [0, 1]])
    np.testing.assert_array_equal(relations_shown([behind] * 2, views[:2]), [[0, 1], [1, 1]])
    twins = scene(CUBE, dataclasses.replace(CUBE, size="small", column="right"))
    text = parse("The large cube is to the left of the other.")
    np.testing.assert_array_equal(relations_shown([text], [seen(twins)]), [[1, 1]])


def test_facts_of_plain_sentences_are_found_in_true_pictures() -> None:
    scenes = [sample_scene(5, row, "test") for row in range(80)]
    texts = [describe(s, "plain", np.random.default_rng([5, n])) for n, s in enumerate(scenes)]
    facts = facts_shown([parse(text) for text in texts], [true_claims(s) for s in scenes])
    assert (facts[:, 0] == facts[:, 1]).all()
    assert (facts[:, 2] == facts[:, 3]).all()
    assert facts[:, 3].tolist() == [len(s.solids) for s in scenes]


def test_missing_surplus_and_wrong_objects_count() -> None:
    text = parse("A cartoon of a red cube and a blue sphere.")
    cube, ball = {"shape": "cube", "colour": "red"}, {"shape": "sphere", "colour": "blue"}
    pictures = [
        Claims({"style": "cartoon"}, (cube,)),
        Claims({"style": "photo"}, (cube, ball, cube)),
        Claims({"style": "cartoon"}, (cube, ball | {"colour": "green"})),
    ]
    facts = facts_shown([text] * 3, pictures)
    assert facts.tolist() == [[3, 5, 1, 2], [4, 5, 2, 3], [4, 5, 1, 2]]


def test_tokens_are_compared_place_by_place() -> None:
    found = equal_tokens([[1, 2, 3, 4], [1, 2]], [[1, 9, 3], [2, 1, 2]])
    np.testing.assert_array_equal(found, [[2, 3], [0, 2]])
