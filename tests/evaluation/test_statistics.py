from __future__ import annotations

import math

import numpy as np
import pytest

from vlv.evaluation import statistics
from vlv.evaluation.statistics import bootstrap_interval, estimate, paired_test


def test_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    low, high = bootstrap_interval(values, statistics.mean, seed=1, num=4000)
    margin = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - margin, abs=0.01)
    assert high == pytest.approx(values.mean() + margin, abs=0.01)


def test_interval_equals_redrawing_rows_one_by_one() -> None:
    rows = np.random.default_rng(0).integers(1, 9, size=(30, 2)).astype(float)
    draws = np.random.default_rng(5).integers(30, size=(200, 30))
    ratios = [rows[d, 0].sum() / rows[d, 1].sum() for d in draws]
    found = bootstrap_interval(rows, statistics.ratio, seed=5, num=200)
    assert found == pytest.approx(tuple(np.quantile(ratios, (0.025, 0.975))))


def test_interval_is_drawn_in_pieces_without_a_difference_in_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.arange(100.0)
    whole = bootstrap_interval(values, statistics.mean, seed=0)
    monkeypatch.setattr(statistics, "_DRAWS_AT_ONCE", 1000)
    pieces = bootstrap_interval(values, statistics.mean, seed=0)
    assert pieces == pytest.approx(whole)


def test_a_paired_ratio_is_narrower_than_its_parts() -> None:
    hard = np.random.default_rng(0).uniform(1, 9, size=500)  # what is hard for one is for both
    ones = np.ones(500)
    columns = np.stack((0.9 * hard, ones, hard, ones), 1)
    ratio = estimate(columns, statistics.ratio_of_ratios, seed=0)
    share = estimate(columns[:, :2], statistics.ratio, seed=0)
    assert ratio.value == pytest.approx(0.9)
    assert ratio.high - ratio.low < 1e-9 < share.high - share.low


def test_seed_decides() -> None:
    values = np.random.default_rng(0).normal(size=50)
    first, again, other = (bootstrap_interval(values, statistics.mean, seed=s) for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("statistic", "columns", "value"),
    [
        (statistics.mean, [[1.0], [2.0]], 1.5),
        (statistics.ratio, [[1, 2], [2, 2]], 0.75),
        (statistics.complement, [[1, 2], [2, 2]], 0.25),
        (statistics.f1, [[8, 10, 6], [2, 0, 1]], 2 * 7 / 20),
        (statistics.ratio_of_f1, [[8, 10, 6, 8, 10, 9]], 6 / 9),
        (statistics.recovered, [[0.26, 0.14, 0.17]], 0.75),
    ],
)
def test_statistics_by_hand(
    statistic: statistics.Statistic, columns: list[list[float]], value: float
) -> None:
    found = estimate(columns, statistic, seed=0)
    assert found.value == pytest.approx(value)
    assert found.n == len(columns)


def test_there_is_no_way_to_a_text_that_does_not_help() -> None:
    assert math.isnan(estimate([[0.26, 0.27, 0.28]], statistics.recovered, seed=0).value)


def test_nothing_to_measure_is_nan() -> None:
    found = estimate([[0, 0], [0, 0]], statistics.ratio, seed=0)
    assert math.isnan(found.value)
    assert math.isnan(found.low)
    with pytest.raises(ValueError, match="at least one"):
        estimate([], statistics.mean, seed=0)


def test_a_paired_test_sees_what_two_intervals_do_not() -> None:
    """Images differ a lot, the runs differ little and always the same way."""
    rng = np.random.default_rng(0)
    theirs = rng.normal(0, 10, size=200)
    ours = theirs + 0.5 + rng.normal(0, 1, size=200)
    found = paired_test(ours, theirs, statistics.mean, seed=0)
    assert found.difference.value == pytest.approx((ours - theirs).mean())
    assert 0 < found.difference.low < found.difference.high
    assert found.p == pytest.approx(1 / 1001)
    assert paired_test(theirs, ours, statistics.mean, seed=0).difference.high < 0


def test_the_permutation_test_is_exact_where_it_can_be_counted() -> None:
    """Four images, all differences +1: of 16 permutations two are as large."""
    found = paired_test(np.ones(4), np.zeros(4), statistics.mean, seed=0, num=8000)
    assert found.p == pytest.approx(2 / 16, abs=0.01)


def test_p_is_even_where_nothing_differs() -> None:
    rng = np.random.default_rng(0)
    found = [
        paired_test(rng.normal(size=40), rng.normal(size=40), statistics.mean, 0, 200).p
        for _ in range(100)
    ]
    assert 0.01 <= np.mean(np.array(found) < 0.1) <= 0.2


def test_a_paired_test_of_a_ratio() -> None:
    ours, theirs = np.array([[2, 4], [0, 0], [3, 4]]), np.array([[1, 4], [0, 0], [2, 4]])
    found = paired_test(ours, theirs, statistics.ratio, seed=0, num=200)
    assert found.difference.value == pytest.approx(2 / 8)
    with pytest.raises(ValueError, match="one shape"):
        paired_test(ours, theirs[:2], statistics.ratio, seed=0)
