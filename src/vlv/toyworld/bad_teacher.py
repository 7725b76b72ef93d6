"""A teacher who errs: what stage 2 learns from wrong captions, stage 3 may undo."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Literal

import numpy as np

from vlv.toyworld.scene import COLOURS, MATERIALS, SHAPES, SIZES, Scene, Solid

Mistakes = Literal["random", "systematic"]
_VALUES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "material": MATERIALS}


def mistaken(scene: Scene, share: float, how: Mistakes, rng: np.random.Generator) -> Scene:
    """The scene as a bad teacher sees it.

    Args:
        scene: As it is.
        share: Of the attributes of objects that are wrong, on average.
        how: "random" takes any other value, "systematic" always the same one for a value, such as cube for every sphere.
        rng: One draw for each attribute decides, and a second one chooses.
    """
    return replace(scene, solids=tuple(_mistaken(x, share, how, rng) for x in scene.solids))


def _mistaken(solid: Solid, share: float, how: Mistakes, rng: np.random.Generator) -> Solid:
    wrong: dict[str, str] = {}
    for name, values in _VALUES.items():
        errs, choice = rng.random() < share, int(rng.integers(1, len(values)))
        if errs:
            step = choice if how == "random" else 1
            wrong[name] = values[(values.index(getattr(solid, name)) + step) % len(values)]
    return Solid(**{**asdict(solid), **wrong})
