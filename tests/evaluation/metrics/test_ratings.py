from __future__ import annotations

import numpy as np
import pytest

from vlv.evaluation.metrics.ratings import (
    bradley_terry,
    bradley_terry_estimates,
    krippendorff_alpha,
)

# Four teams, the worked example of the English Wikipedia's article on the model.
WINS = np.array([[0, 2, 0, 1], [3, 0, 5, 0], [0, 3, 0, 1], [4, 0, 3, 0]])
STRENGTHS = [0.640, 1.043, 0.660, 2.270]

# Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, section D: four observers, twelve units.
NAN = float("nan")
OBSERVERS = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)


def test_strengths_of_the_worked_example() -> None:
    assert bradley_terry(WINS) == pytest.approx(STRENGTHS, abs=5e-4)


def test_strengths_equal_those_of_evalica() -> None:
    evalica = pytest.importorskip("evalica")
    rng = np.random.default_rng(0)
    names = list("abcde")
    games = [tuple(rng.choice(5, 2, replace=False)) for _ in range(300)]
    wins = np.zeros((5, 5))
    for a, b in games:
        wins[a, b] += 1
    found = evalica.bradley_terry(
        [names[a] for a, _ in games], [names[b] for _, b in games], [evalica.Winner.X] * len(games)
    ).scores
    theirs = np.array([found[name] for name in names])
    assert bradley_terry(wins) == pytest.approx(theirs / np.exp(np.log(theirs).mean()), rel=1e-3)


@pytest.mark.parametrize("wins", [[[0, 3], [0, 0]], [[0, 0], [0, 0]]])
def test_without_a_finite_answer_there_is_none(wins: list[list[int]]) -> None:
    assert np.isnan(bradley_terry(wins)).all()


def test_intervals_hold_the_strengths_and_stay_finite() -> None:
    always = np.zeros((30, 2, 2))
    always[:, 0, 1] = 1
    first, second = bradley_terry_estimates(always, seed=0, num=50)
    assert first.value == pytest.approx((30.5 / 0.5) ** 0.5)
    assert second.value == pytest.approx(1 / first.value)
    mixed = np.zeros((200, 2, 2))
    mixed[:140, 0, 1] = 1
    mixed[140:, 1, 0] = 1
    first, _ = bradley_terry_estimates(mixed, seed=0, num=200)
    assert first.low < first.value < first.high
    assert first.low**2 < 0.7 / 0.3 < first.high**2


@pytest.mark.parametrize(("level", "alpha"), [("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_worked_example(level: str, alpha: float) -> None:
    assert krippendorff_alpha(OBSERVERS, level) == pytest.approx(alpha, abs=5e-4)


def test_alpha_at_its_ends() -> None:
    agree = [[1, 2, 3, 4], [1, 2, 3, 4]]
    assert krippendorff_alpha(agree, "interval") == pytest.approx(1)
    assert krippendorff_alpha([[0, 1, 0, 1], [1, 0, 1, 0]], "ordinal") < 0
    assert np.isnan(krippendorff_alpha([[2, 2], [2, 2]], "interval"))
    assert np.isnan(krippendorff_alpha([[1, NAN], [NAN, 2]], "interval"))


def test_wins_are_counts() -> None:
    with pytest.raises(ValueError, match="square"):
        bradley_terry([[0, 1, 2], [1, 0, 2]])
