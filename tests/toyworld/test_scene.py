from __future__ import annotations

import json
from typing import get_args

import pytest

from vlv.errors import ConfigError
from vlv.toyworld.scene import (
    COLOURED_STYLES,
    COLOURS,
    COLUMNS,
    HALF_HEIGHT,
    HELD_OUT,
    SHAPES,
    SPLITS,
    STYLES,
    TIMES,
    Scene,
    Split,
    sample_scene,
)


def sample(split: Split, num: int = 300, seed: int = 0) -> list[Scene]:
    return [sample_scene(seed, index, split) for index in range(num)]


def test_the_same_numbers_give_the_same_scene() -> None:
    assert sample("val", 20) == sample("val", 20)
    assert sample_scene(0, 3) != sample_scene(0, 4)
    assert sample_scene(0, 3) != sample_scene(1, 3)


def test_splits_share_no_scene() -> None:
    splits: tuple[Split, ...] = get_args(Split)
    assert splits == SPLITS
    seen = [scene for split in splits for scene in sample(split)]
    assert len(set(seen)) == len(seen)


def novel_pairs(scene: Scene) -> int:
    return sum((solid.shape, solid.colour) in HELD_OUT for solid in scene.solids)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_held_out_pairs_are_held_out(split: Split) -> None:
    assert not any(novel_pairs(scene) for scene in sample(split, 1000))


def test_any_scene_may_hold_any_pair() -> None:
    found = {(s.shape, s.colour) for scene in sample("any", 1000) for s in scene.solids}
    assert len(found) == len(SHAPES) * len(COLOURS)


def test_held_out_shapes_and_colours_occur_in_many_other_pairs() -> None:
    for number, values in enumerate((SHAPES, COLOURS)):
        for value in values:
            assert sum(pair[number] == value for pair in HELD_OUT) <= 1


def test_every_scene_of_composition_holds_one_held_out_pair() -> None:
    scenes = sample("composition")
    assert all(novel_pairs(scene) == 1 for scene in scenes)
    found = {(s.shape, s.colour) for scene in scenes for s in scene.solids}
    assert found >= set(HELD_OUT)


def test_scenes_survive_json() -> None:
    for scene in sample("train", 50):
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_solids_stand_in_columns_of_their_own_from_left_to_right() -> None:
    for scene in sample("train"):
        columns = [COLUMNS.index(solid.column) for solid in scene.solids]
        assert columns == sorted(set(columns))
        xs = [solid.x for solid in scene.solids]
        assert xs == sorted(xs)


def test_all_kinds_of_scene_occur() -> None:
    scenes = sample("train")
    assert {len(scene.solids) for scene in scenes} == {1, 2, 3}
    assert {scene.style for scene in scenes} == set(STYLES)
    assert {scene.time for scene in scenes} == set(TIMES)
    assert {s.time for s in scenes if s.style not in COLOURED_STYLES} == {"day"}


def test_solids_rest_on_the_ground() -> None:
    for solid in sample_scene(0, 3).solids:
        assert solid.centre[2] == solid.radius * HALF_HEIGHT[solid.shape]
        assert solid.extent[2] == 2 * solid.centre[2]
        assert solid.extent[0] == solid.extent[1]


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(
        ConfigError, match="'tests'; choose one of train, val, test, composition, any"
    ):
        sample_scene(0, 0, "tests")  # type: ignore[arg-type]
