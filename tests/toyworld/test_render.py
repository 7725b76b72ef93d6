from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.toyworld.world import make_scene, make_solid
from vlv.toyworld.render import PALETTE, SIZE_PX, Rendering, image_box, project, render
from vlv.toyworld.scene import (
    COLOURS,
    MATERIALS,
    SHAPES,
    STYLES,
    TIMES,
    Scene,
    Solid,
    sample_scene,
)

NUM_SCENES = 200
PIXELS = "fcfd931d7b2bf393"  # of the first NUM_SCENES test scenes of seed 7
LEAST_PIXELS = 40
LEAST_SHARE = 0.6


@pytest.fixture(scope="module")
def rendered() -> list[tuple[Scene, Rendering]]:
    scenes = [sample_scene(5, index, "val") for index in range(NUM_SCENES)]
    return [(scene, render(scene)) for scene in scenes]


def mean_colour(scene: Scene) -> NDArray[np.float64]:
    picture = render(scene)
    return np.asarray(picture.image[picture.objects == 0].mean(0))


def test_the_same_scene_gives_the_same_bytes(rendered: list[tuple[Scene, Rendering]]) -> None:
    for scene, first in rendered[:5]:
        again = render(Scene.from_dict(scene.to_dict()))
        assert first.image.tobytes() == again.image.tobytes()
        assert first.objects.tobytes() == again.objects.tobytes()


def digest_of(number: int) -> str:
    """Hash of the pixels of some scenes."""
    digest = hashlib.sha256()
    for index in range(number):
        digest.update(render(sample_scene(7, index, "test")).image.tobytes())
    return digest.hexdigest()[:16]


def test_other_processors_give_the_same_bytes() -> None:
    code = f"from tests.toyworld.test_render import digest_of; print(digest_of({NUM_SCENES}))"
    older = {"OPENBLAS_CORETYPE": "Nehalem", "NPY_DISABLE_CPU_FEATURES": "X86_V4 X86_V3 AVX512_ICL"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | older,
        capture_output=True,
        text=True,
        check=True,
    )
    assert digest_of(NUM_SCENES) == done.stdout.strip() == PIXELS


def test_format(rendered: list[tuple[Scene, Rendering]]) -> None:
    for scene, picture in rendered:
        assert picture.image.shape == (SIZE_PX, SIZE_PX, 3)
        assert picture.image.dtype == np.uint8
        assert picture.objects.min() == -1
        assert picture.objects.max() == len(scene.solids) - 1


def test_other_sizes() -> None:
    scene = make_scene()
    picture = render(scene, size=32, supersample=1)
    assert picture.image.shape == (32, 32, 3)
    left, top, right, bottom = image_box(scene, scene.solids[0], size=32)
    rows, columns = np.nonzero(picture.objects == 0)
    assert left <= columns.min() < columns.max() < right
    assert top <= rows.min() < rows.max() < bottom


def test_every_solid_owns_enough_pixels(rendered: list[tuple[Scene, Rendering]]) -> None:
    for scene, picture in rendered:
        counts = [int((picture.objects == k).sum()) for k in range(len(scene.solids))]
        assert min(counts) >= LEAST_PIXELS, scene


def test_solids_never_hide_each_other_almost_fully(
    rendered: list[tuple[Scene, Rendering]],
) -> None:
    for scene, picture in [pair for pair in rendered if len(pair[0].solids) == 3][:40]:
        for k, solid in enumerate(scene.solids):
            alone = render(replace(scene, solids=(solid,)), supersample=2).objects == 0
            assert (picture.objects == k).sum() >= LEAST_SHARE * alone.sum(), (scene, k)


def test_the_box_holds_every_pixel_of_its_solid(rendered: list[tuple[Scene, Rendering]]) -> None:
    for scene, picture in rendered:
        for k, solid in enumerate(scene.solids):
            left, top, right, bottom = image_box(scene, solid)
            outside = picture.objects == k
            assert outside[top:bottom, left:right].any()
            outside[top:bottom, left:right] = False
            assert not outside.any(), (scene, k)


def test_boxes_are_not_much_larger_than_their_solids() -> None:
    for shape in SHAPES:
        scene = make_scene(make_solid(shape))
        rows, columns = np.nonzero(render(scene).objects == 0)
        seen = (np.ptp(columns) + 1) * (np.ptp(rows) + 1)
        left, top, right, bottom = image_box(scene, scene.solids[0])
        assert seen > 0.5 * (right - left) * (bottom - top)


def test_projection() -> None:
    scene = make_scene()
    points = np.array([(0, 0.9, 1.0), (-1, 0.9, 1.0), (0, 0.9, 2.0)], np.float32)
    centre, left, above = project(scene, points)
    np.testing.assert_allclose(centre, 32, atol=0.01)
    assert left[0] < 32
    assert above[1] < 32


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("style", ["photo", "cartoon"])
def test_colours_lie_apart_in_the_picture(style: str, time: str) -> None:
    means = {
        colour: mean_colour(make_scene(make_solid("sphere", colour), style=style, time=time))
        for colour in COLOURS
    }
    for a, b in combinations(COLOURS, 2):
        assert np.abs(means[a] - means[b]).max() > 30, (a, b, means[a], means[b])


def test_every_colour_has_a_paint() -> None:
    assert set(PALETTE) == set(COLOURS)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", SHAPES)
def test_materials_look_different(style: str, shape: str) -> None:
    pictures = [render(make_scene(make_solid(shape, material=m), style=style)) for m in MATERIALS]
    mask = pictures[0].objects == 0
    for a, b in combinations(pictures, 2):
        apart = np.abs(a.image.astype(int) - b.image.astype(int)).max(-1)[mask]
        assert (apart > 25).mean() > 0.08


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("light", "sign"), [("left", 1), ("right", -1)])
def test_the_side_of_the_light_shows(style: str, light: str, sign: int) -> None:
    picture = render(make_scene(make_solid("sphere"), style=style, light=light))
    tone, solid = picture.image.mean(-1), picture.objects == 0
    rows, columns = np.nonzero(solid)
    to_the_left = np.broadcast_to(np.arange(SIZE_PX) < columns.mean(), solid.shape)
    lit, dark = tone[solid & to_the_left].mean(), tone[solid & ~to_the_left].mean()
    assert sign * (lit - dark) > 8
    beside = np.zeros_like(solid)
    beside[rows.max() - 6 : rows.max()] = picture.objects[rows.max() - 6 : rows.max()] == -1
    lit, dark = tone[beside & to_the_left].mean(), tone[beside & ~to_the_left].mean()
    assert sign * (lit - dark) > 2, "the shadow falls on the far side"


def test_a_sketch_shows_neither_colour_nor_ground() -> None:
    pictures = [
        render(make_scene(make_solid(colour=c), style="sketch", ground=g)).image
        for c, g in (("red", "grass"), ("blue", "snow"))
    ]
    assert pictures[0].tobytes() == pictures[1].tobytes()


@pytest.mark.parametrize(
    ("style", "tint"), [("sketch", (1, 0.99, 0.96)), ("sepia", (1, 0.82, 0.58))]
)
def test_sketches_and_sepia_prints_have_one_hue(style: str, tint: tuple[float, ...]) -> None:
    scene = make_scene(make_solid("sphere", "red"), make_solid("cone", "turquoise", column="left"))
    picture = render(replace(scene, style=style)).image.astype(float)
    np.testing.assert_allclose(picture, picture[..., :1] * np.array(tint), atol=1.01)


def test_times_of_day_look_different() -> None:
    means = [render(make_scene(time=time)).image.mean((0, 1)) for time in TIMES]
    for a, b in combinations(means, 2):
        assert np.abs(a - b).max() > 30


def test_rows_and_sizes_show_in_the_box() -> None:
    def height(solid: Solid) -> int:
        _, top, _, bottom = image_box(make_scene(solid), solid)
        return bottom - top

    assert height(make_solid(size="large")) > 1.3 * height(make_solid(size="small"))
    assert height(make_solid(row="front")) > 1.1 * height(make_solid(row="back"))
