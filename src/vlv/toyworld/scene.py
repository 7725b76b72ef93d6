"""Scenes: what is in an image, as data with ground truth.

One to three solids stand in distinct columns (left, middle, right), each in the front or the back
row, so that no object hides another almost fully and every statement about the layout is either
plainly true or plainly false. World axes: x to the right, y away from the camera, z up; the ground
is z = 0; lengths are in world units (a large object is about 2.2 wide).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from vlv.errors import ConfigError
from vlv.storage import Json

SHAPES = ("sphere", "cube", "cylinder", "cone")
COLOURS = ("red", "yellow", "green", "turquoise", "blue", "purple")
SIZES = ("small", "large")
MATERIALS = ("matte", "shiny", "striped")
COLUMNS = ("left", "middle", "right")
ROWS = ("front", "back")
STYLES = ("photo", "cartoon", "sketch", "sepia")
GROUNDS = ("grass", "sand", "snow")
TIMES = ("day", "sunset", "night")
LIGHTS = ("left", "right")
VIEWS = ("low", "high")
MOST_SCENES = 10_000_000
"""That are asked for at once; more is a mistake, and would not fit into memory."""
SPLITS = ("train", "val", "test", "composition", "any")

COLOURED_STYLES = ("photo", "cartoon")
"""Styles in which colours, the ground and the time of day can be seen."""

HELD_OUT = (("sphere", "green"), ("cube", "turquoise"), ("cone", "purple"))
"""Pairs of shape and colour that no image of `train`, `val` and `test` shows.

`composition` holds one in each scene. In `any` they are as frequent as other pairs: it teaches the inspector, which must
be able to report them, and gives the language model texts without images.
"""

RADIUS = {"small": 0.78, "large": 1.15}
HALF_HEIGHT = {"sphere": 1.0, "cube": 0.85, "cylinder": 0.9, "cone": 0.95}
HALF_WIDTH = {"sphere": 1.0, "cube": 0.85, "cylinder": 0.8, "cone": 1.0}

Split = Literal["train", "val", "test", "composition", "any"]


@dataclass(frozen=True, slots=True)
class Solid:
    """One object: its attributes in words and its place in numbers."""

    shape: str
    colour: str
    size: str
    material: str
    column: str
    row: str
    x: float
    y: float
    yaw: float
    """Rotation about the vertical axis in radians, in [0, pi/2)."""

    @property
    def radius(self) -> float:
        """Scale of the unit solid in world units."""
        return RADIUS[self.size]

    @property
    def centre(self) -> tuple[float, float, float]:
        """Centre of the 3-D box (x, y, z)."""
        return (self.x, self.y, self.radius * HALF_HEIGHT[self.shape])

    @property
    def extent(self) -> tuple[float, float, float]:
        """Edge lengths of the 3-D box (width, depth, height) before rotation by `yaw`."""
        width = 2 * self.radius * HALF_WIDTH[self.shape]
        return (width, width, 2 * self.radius * HALF_HEIGHT[self.shape])


@dataclass(frozen=True, slots=True)
class Scene:
    """A complete scene; the renderer needs nothing else."""

    solids: tuple[Solid, ...]
    style: str
    ground: str
    time: str
    light: str
    view: str
    light_azimuth: float
    """Angle of the light off the viewing direction in radians, positive to the side of `light`."""
    camera_height: float
    phase: float
    """Where the hills on the horizon stand, in radians."""

    def to_dict(self) -> Json:
        """The scene as plain JSON data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Json) -> Self:
        """Read back what `to_dict` wrote."""
        solids = tuple(Solid(**solid) for solid in data["solids"])
        return cls(**{**data, "solids": solids})


def sample_scene(seed: int, index: int, split: Split = "train") -> Scene:
    """Draw scene `index` of a split.

    The split is part of the random seed, so two splits share no scene; scenes of `train`, `val` and
    `test` hold none of the pairs in `HELD_OUT`, those of `composition` one, those of `any` all sorts.

    Raises:
        ConfigError: if the split is unknown.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    style = _choose(rng, STYLES, (0.45, 0.25, 0.15, 0.15))
    time = _choose(rng, TIMES, (0.4, 0.3, 0.3)) if style in COLOURED_STYLES else "day"
    view = _choose(rng, VIEWS)
    height = rng.uniform(1.9, 2.3) if view == "low" else rng.uniform(4.3, 4.9)
    return Scene(
        solids=_sample_solids(rng, split),
        style=style,
        ground=_choose(rng, GROUNDS),
        time=time,
        light=_choose(rng, LIGHTS),
        view=view,
        light_azimuth=float(rng.uniform(0.85, 1.2)),
        camera_height=float(height),
        phase=float(rng.uniform(0, 2 * math.pi)),
    )


def _choose(
    rng: np.random.Generator, values: tuple[str, ...], p: tuple[float, ...] | None = None
) -> str:
    return values[int(rng.choice(len(values), p=p))]


_PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
_SEEN = tuple(pair for pair in _PAIRS if pair not in HELD_OUT)


def _sample_solids(rng: np.random.Generator, split: Split) -> tuple[Solid, ...]:
    count = int(rng.choice((1, 2, 3), p=(0.25, 0.4, 0.35)))
    columns = sorted(rng.choice(len(COLUMNS), size=count, replace=False).tolist())
    novel = int(rng.integers(count)) if split == "composition" else -1
    usual = _PAIRS if split == "any" else _SEEN
    return tuple(
        _sample_solid(rng, COLUMNS[column], HELD_OUT if position == novel else usual)
        for position, column in enumerate(columns)
    )


def _sample_solid(
    rng: np.random.Generator, column: str, pairs: tuple[tuple[str, str], ...]
) -> Solid:
    shape, colour = pairs[int(rng.integers(len(pairs)))]
    row = _choose(rng, ROWS)
    spread = 2.15 if row == "front" else 2.5
    return Solid(
        shape=shape,
        colour=colour,
        size=_choose(rng, SIZES),
        material=_choose(rng, MATERIALS),
        column=column,
        row=row,
        x=float((COLUMNS.index(column) - 1) * spread + rng.uniform(-0.2, 0.2)),
        y=float((-0.7 if row == "front" else 1.7) + rng.uniform(-0.25, 0.25)),
        yaw=float(rng.uniform(0, math.pi / 2)),
    )
