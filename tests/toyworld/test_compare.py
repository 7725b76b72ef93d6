"""Counting the claims of a caption against the truth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.toyworld.world import make_scene, make_solid
from vlv.toyworld.language import Claims, compare, pair_objects, parse, true_claims
from vlv.toyworld.scene import Scene, sample_scene

Objects = tuple[dict[str, str], ...]
ONE = make_scene(make_solid("cube", "red", "large", "matte", "left", "front"))
CUBE = true_claims(ONE).objects[0]
SAME = make_scene(make_solid(column="left"), make_solid(column="right"))


def numbers(claims: Claims, scene: Scene = ONE) -> tuple[int, int, int]:
    counts = compare(claims, scene)
    return counts.stated, counts.true, counts.correct


def test_the_truth_is_right() -> None:
    counts = compare(true_claims(ONE), ONE)
    assert (counts.stated, counts.true, counts.correct) == (11, 11, 11)
    assert (counts.precision, counts.recall, counts.f1) == (1, 1, 1)


def test_saying_nothing() -> None:
    counts = compare(Claims(), ONE)
    assert (counts.stated, counts.true, counts.correct) == (0, 11, 0)
    assert (counts.precision, counts.recall, counts.f1) == (1, 0, 0)


def test_counts_by_fact_add_up() -> None:
    scene = sample_scene(0, 7)
    counts = compare(
        parse("A photo of a desert, a small red cube, the cone is behind the cube."), scene
    )
    columns = list(zip(*counts.by_fact, strict=True))
    assert tuple(map(sum, columns[1:])) == (counts.stated, counts.true, counts.correct)
    assert columns[0][0] == "style"
    assert columns[0][-1] == "relation"


def test_one_wrong_fact() -> None:
    assert numbers(Claims(objects=(CUBE | {"colour": "blue"},))) == (6, 11, 5)


def test_objects_are_paired_so_that_most_facts_agree() -> None:
    scene = sample_scene(0, 0, "val")
    objects = true_claims(scene).objects
    assert compare(Claims(objects=objects[::-1]), scene).precision == 1


@pytest.mark.parametrize("surplus", [1, 3, 8, 400])
def test_surplus_objects_are_wrong(surplus: int) -> None:
    extra = {"shape": "cone", "colour": "blue", "column": "right"}
    others = tuple(extra | {"row": f"row {number}"} for number in range(surplus))
    stated, true, correct = numbers(Claims(objects=(*others, CUBE)))
    assert (stated, true, correct) == (6 + 4 * surplus, 11, 6)


@pytest.mark.parametrize("times", [2, 7])
def test_an_object_stated_again_is_wrong(times: int) -> None:
    assert numbers(Claims(objects=(CUBE,) * times)) == (6 * times, 11, 6)


def test_an_object_stated_again_does_not_stand_for_another() -> None:
    """Both cubes are large, matte, red and in front, but one was described twice and one not."""
    again = Claims(objects=(CUBE, CUBE))
    assert numbers(again, SAME) == (12, 17, 6)


def test_the_same_words_may_be_true_of_two_objects() -> None:
    counts = compare(parse("A photo of a red cube and a red block."), SAME)
    assert (counts.stated, counts.correct) == (5, 5)
    counts = compare(parse("A photo of a red cube, a red cube and a red block."), SAME)
    assert (counts.stated, counts.correct) == (7, 5)


def test_what_cannot_be_seen_is_wrong_when_stated() -> None:
    scene = make_scene(ONE.solids[0], style="sketch")
    counts = compare(parse("A pencil sketch of a meadow, a red cube"), scene)
    assert (counts.stated, counts.correct) == (4, 2)


def test_contradictions_are_wrong() -> None:
    counts = compare(parse("A photo by day, at night. A red blue cube."), ONE)
    assert (counts.stated, counts.correct) == (6, 4)
    assert compare(parse("A photo at night, by day."), ONE).correct == 1


def relation(first: str, kind: str, second: str, times: int = 1) -> Claims:
    return Claims(relations=((first, kind, second),) * times)


@pytest.mark.parametrize(
    ("claims", "right"),
    [
        (relation("cube", "left", "cone"), True),
        (relation("cube", "right", "cone"), False),
        (relation("cube", "front", "cone"), True),
        (relation("cone", "behind", "cube"), True),
        (relation("cone", "front", "cube"), False),
        (relation("large cube", "left", "cone"), True),
        (relation("small cube", "left", "cone"), False),
        (relation("cube", "left", "cube"), False),
        (relation("sphere", "left", "cone"), False),
        (relation("cube", "left", "cone", times=3), True),
        (relation("cube", "right", "cone", times=3), False),
    ],
)
def test_relations(claims: Claims, right: bool) -> None:
    scene = make_scene(ONE.solids[0], make_solid("cone", column="right", row="back"))
    assert numbers(claims, scene) == (1, 17 + right, right)


def agreement(pairs: list[tuple[dict[str, str], dict[str, str]]]) -> int:
    return sum(len(a.items() & b.items()) for a, b in pairs)


def best_agreement(mine: Objects, real: Objects) -> int:
    size = max(len(mine), len(real))
    padded = [*real, *[{}] * (size - len(real))]
    orders = itertools.permutations(range(size), len(mine))
    return max(agreement([(m, padded[i]) for m, i in zip(mine, o, strict=True)]) for o in orders)


def test_the_pairing_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        mine, real = (
            tuple({f: str(rng.integers(3)) for f in ("shape", "colour", "size")} for _ in range(n))
            for n in (int(rng.integers(6)), int(rng.integers(1, 4)))
        )
        mine = tuple(said for i, said in enumerate(mine) if said not in mine[:i])
        pairs = pair_objects(mine, real)
        assert agreement(pairs) == best_agreement(mine, real)
        assert [said for said, _ in pairs[: len(mine)]] == list(mine)
        assert sorted(map(str, (truth for _, truth in pairs if truth))) == sorted(map(str, real))
