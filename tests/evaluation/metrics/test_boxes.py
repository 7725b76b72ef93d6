from __future__ import annotations

import math

import pytest

from vlv.evaluation.metrics.boxes import Box, deviation, match_boxes


def box(label: str, x: float, angle: float = 0.0, size: float = 1.0, **more: float) -> Box:
    return Box(label, (x, 0.0, 0.0), (size, size, size), angle, **more)


def test_pairs_have_the_least_total_distance() -> None:
    """Nearest first would pair 1 with 0.9 and leave 0 with 5."""
    first, second = [box("cube", 0), box("cube", 1)], [box("cube", 0.9), box("cube", 5)]
    assert [(a.centre[0], b.centre[0]) for a, b in match_boxes(first, second)] == [(0, 0.9), (1, 5)]


def test_boxes_of_other_labels_are_no_partners() -> None:
    found = deviation([box("cube", 0), box("cone", 3)], [box("cube", 3), box("ball", 0)])
    assert (found.pairs, found.missing, found.extra) == (1, 1, 1)
    assert found.centre == pytest.approx(1)  # 3 on one of three axes


def test_deviations_add_up_over_pairs() -> None:
    first = [box("a", 0, 0.1, 2), box("b", 0, 0.0, 1)]
    second = [box("a", 0, 0.4, 1), box("b", 0.6, math.pi, 1)]
    found = deviation(first, second)
    assert found.angle == pytest.approx(0.3 + math.pi)
    assert found.centre == pytest.approx(0.2)
    assert found.scale == pytest.approx(1)


def test_a_cube_looks_the_same_after_a_quarter_turn() -> None:
    cube, ball = {"period": math.pi / 2}, {"period": 0.0}
    first = [box("cube", 0, 0.05, **cube), box("ball", 0, 1.0, **ball)]
    second = [box("cube", 0, math.pi / 2 - 0.05, **cube), box("ball", 0, 2.0, **ball)]
    found = deviation(first, second)
    assert (found.num_angles, found.pairs) == (1, 2)
    assert found.angle == pytest.approx(0.1)


def test_nothing_to_compare() -> None:
    found = deviation([], [box("cube", 0)])
    assert (found.pairs, found.missing, found.extra, found.centre) == (0, 0, 1, 0)
