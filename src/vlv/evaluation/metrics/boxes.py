"""How far the 3-D boxes of two images of one scene lie apart (paper, section 4.4.1 and Table 6).

The paper takes the L1 deviation of angle, centre and scale between boxes "with identical labels"; it states neither the units
nor what becomes of boxes without a partner. Here the pairs are those of the least total distance of the centres within a label
(Hungarian method), an axis counts as one number, and boxes without a partner are counted beside the deviations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlv.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Box:
    """One labelled 3-D box."""

    label: str
    centre: tuple[float, float, float]
    scale: tuple[float, float, float]
    """Edge lengths, in the unit of the centre."""
    angle: float
    """About the vertical axis, in radians."""
    period: float = 2 * np.pi
    """Turns by so much look the same: pi / 2 for a cube; 0 where no turn can be seen."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far the boxes of one image lie from those of another."""

    angle: float
    """Sum over pairs whose turn can be seen of the smaller angle between the two, in radians."""
    num_angles: int
    """Pairs whose turn can be seen."""
    centre: float
    """Sum over pairs of the mean |difference| of the three coordinates."""
    scale: float
    """Sum over pairs of the mean |difference| of the three edge lengths."""
    pairs: int
    missing: int
    """Boxes of the first image without a partner."""
    extra: int
    """Boxes of the second without one."""


def match_boxes(first: Sequence[Box], second: Sequence[Box]) -> list[tuple[Box, Box]]:
    """Pair boxes of one label so that the sum of the L1 distances of their centres is least.

    Raises:
        ConfigError: SciPy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ConfigError('matching boxes needs scipy: pip install "vlv[eval]"') from None
    pairs: list[tuple[Box, Box]] = []
    for label in dict.fromkeys(box.label for box in first):
        ours = [box for box in first if box.label == label]
        theirs = [box for box in second if box.label == label]
        if theirs:
            cost = [[_distance(a.centre, b.centre) for b in theirs] for a in ours]
            rows, columns = linear_sum_assignment(np.array(cost))
            pairs += [(ours[i], theirs[j]) for i, j in zip(rows, columns, strict=True)]
    return pairs


def deviation(first: Sequence[Box], second: Sequence[Box]) -> Deviation:
    """Compare the boxes of a image with those of the original.

    >>> cube = Box("cube", (0, 0, 1), (2, 2, 2), angle=0.1)
    >>> moved = Box("cube", (0.3, 0, 1), (2, 2, 2.6), angle=0.1 - 2 * np.pi)
    >>> found = deviation([cube], [moved, Box("ball", (0, 0, 0), (1, 1, 1), 0)])
    >>> round(found.angle, 9), round(found.centre, 9), round(found.scale, 9), found.missing, found.extra
    (0.0, 0.1, 0.2, 0, 1)
    """
    pairs = match_boxes(first, second)
    turns = [
        turn(a.angle, b.angle, min(a.period, b.period)) for a, b in pairs if a.period and b.period
    ]
    return Deviation(
        angle=float(sum(turns)),
        num_angles=len(turns),
        centre=sum(_distance(a.centre, b.centre) for a, b in pairs),
        scale=sum(_distance(a.scale, b.scale) for a, b in pairs),
        pairs=len(pairs),
        missing=len(first) - len(pairs),
        extra=len(second) - len(pairs),
    )


def turn(a: float, b: float, period: float) -> float:
    """Smaller angle between two turns that look the same after `period`.

    >>> round(turn(0.1, 2 * np.pi - 0.1, 2 * np.pi), 6), round(turn(0.1, 1.5, np.pi / 2), 6)
    (0.2, 0.170796)
    """
    rest = abs(a - b) % period
    return float(min(rest, period - rest))


def _distance(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 3
