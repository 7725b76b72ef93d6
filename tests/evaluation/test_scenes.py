from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from tests.evaluation.support import make_inspector
from vlv.evaluation.scenes import (
    box_errors,
    held_out_pairs,
    inspect,
    make_world,
    object_counts,
    shuffle_words,
)
from vlv.toyworld.inspector import Report
from vlv.toyworld.language import Claims, true_claims
from vlv.toyworld.render import render
from vlv.toyworld.scene import Scene, Solid, sample_scene


def scene(*solids: Solid, style: str = "photo") -> Scene:
    return dataclasses.replace(sample_scene(0, 0, "test"), solids=solids, style=style)


CUBE = Solid("cube", "red", "large", "matte", "left", "front", x=-2.0, y=-0.7, yaw=0.1)
CONE = Solid("cone", "blue", "small", "shiny", "right", "back", x=2.5, y=1.7, yaw=0.0)


def report(truth: Scene, **changes: str) -> Report:
    claims = true_claims(truth)
    first, *others = claims.objects
    boxes = tuple((solid.x, solid.y, solid.yaw) for solid in truth.solids)
    return Report(Claims(claims.scene, ({**first, **changes}, *others)), boxes)


def test_a_perfect_report() -> None:
    truth = scene(CUBE, CONE)
    np.testing.assert_array_equal(object_counts([report(truth)], [truth]), [[2, 2, 3, 3]])
    np.testing.assert_allclose(box_errors([report(truth)], [truth]), [[0, 0, 2, 0, 1]])


def test_one_wrong_attribute_makes_an_object_wrong() -> None:
    truth = scene(CUBE, CONE)
    np.testing.assert_array_equal(
        object_counts([report(truth, material="shiny")], [truth]), [[1, 2, 3, 3]]
    )


def test_missing_and_extra_objects_are_wrong() -> None:
    both, one = scene(CUBE, CONE), scene(CUBE)
    np.testing.assert_array_equal(object_counts([report(one)], [both]), [[1, 2, 2, 3]])
    np.testing.assert_array_equal(object_counts([report(both)], [one]), [[1, 2, 2, 3]])
    moved = report(one, column="middle")
    np.testing.assert_array_equal(object_counts([moved], [one]), [[0, 2, 1, 3]])


def test_a_cube_looks_the_same_after_a_quarter_turn() -> None:
    truth = scene(CUBE)
    seen = dataclasses.replace(report(truth), boxes=((-1.5, -0.5, math.pi / 2 - 0.1),))
    x, y, found, turn, cubes = box_errors([seen], [truth])[0]
    assert (x, y, found, cubes) == pytest.approx((0.5, 0.2, 1, 1))
    assert turn == pytest.approx(math.degrees(0.2))


def test_held_out_pairs() -> None:
    green = dataclasses.replace(CUBE, shape="sphere", colour="green")
    truth = scene(green, CONE)
    claims = true_claims(truth)
    wrong = Claims(claims.scene, ({**claims.objects[0], "colour": "red"},))
    sketch = scene(green, style="sketch")
    found = held_out_pairs([claims, wrong, true_claims(sketch)], [truth, truth, sketch])
    np.testing.assert_array_equal(found, [[1, 1], [0, 1], [0, 0]])


def test_worlds_are_reproducible_and_part_of_each_other() -> None:
    small, large = (make_world("test", 7, range(n), 64) for n in (3, 5))
    assert large.scenes[:3] == small.scenes
    assert large.captions[:3] == small.captions
    assert large.seeds[:3] == small.seeds
    assert len(set(large.seeds)) == 5
    torch.testing.assert_close(large.pixels[:3], small.pixels)
    rendering = render(small.scenes[1])
    np.testing.assert_array_equal(small.pixels[1].permute(1, 2, 0), rendering.image)
    np.testing.assert_array_equal(small.objects[1], rendering.objects >= 0)
    assert make_world("test", 8, range(3), 64).scenes != small.scenes


def test_shuffled_captions_keep_their_words() -> None:
    texts = ["a red cube on the left", "a cone"]
    shuffled = shuffle_words(texts, seed=0)
    assert [sorted(t.split()) for t in shuffled] == [sorted(t.split()) for t in texts]
    assert shuffled != texts
    assert shuffled == shuffle_words(texts, seed=0)


def test_inspection_does_not_depend_on_the_batches() -> None:
    inspector, world = make_inspector(), make_world("test", 1, range(5), 64)
    one, two = (
        inspect(inspector, (world.floats(slice(i, i + n)) for i in range(0, 5, n)), world.scenes)
        for n in (5, 2)
    )
    np.testing.assert_array_equal(one.counts, two.counts)
    np.testing.assert_allclose(one.features, two.features, atol=1e-5)
    assert one.features.shape == (5, 4 * 16)
    torch.testing.assert_close(two.examples, world.pixels)
