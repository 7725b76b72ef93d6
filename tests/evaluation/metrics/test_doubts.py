"""Ranking, calibration and the logistic fit of doubts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlv.evaluation.metrics.doubts import (
    auroc,
    best_threshold,
    calibration_error,
    estimate_weighted,
    fit_logistic,
)


def test_auroc_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    scores, wrong = rng.integers(0, 6, 60).astype(float), rng.integers(0, 2, 60).astype(float)
    weights = rng.integers(0, 3, 60).astype(float)
    pairs = total = 0.0
    for a, is_wrong, w in zip(scores, wrong, weights, strict=True):
        for b, other, v in zip(scores, wrong, weights, strict=True):
            if is_wrong and not other:
                total += w * v
                pairs += w * v * ((a > b) + (a == b) / 2)
    assert auroc(scores, wrong, weights) == pytest.approx(pairs / total)
    assert math.isnan(auroc(scores, np.ones(60), weights))


def test_calibration_error_by_bins() -> None:
    p = np.array([0.05, 0.08, 0.91, 1.0])
    wrong = np.array([0.0, 1.0, 1.0, 1.0])
    expected = (abs(0.13 - 1) + abs(1.91 - 2)) / 4
    assert calibration_error(p, wrong, np.ones(4)) == pytest.approx(expected)


def test_the_fit_finds_the_model_that_made_the_data() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20_000, 2))
    p = 1 / (1 + np.exp(-(1.5 * x[:, 0] - 0.5 * x[:, 1] - 1)))
    wrong = (rng.random(len(p)) < p).astype(float)
    weights, bias, loss = fit_logistic(x, wrong)
    np.testing.assert_allclose([*weights, bias], [1.5, -0.5, -1], atol=0.08)
    assert loss == pytest.approx(-np.where(wrong > 0, np.log(p), np.log(1 - p)).mean(), abs=0.01)
    assert calibration_error(p, wrong, np.ones(len(p))) < 0.01
    separable = fit_logistic(np.array([[-1.0], [1.0]]), np.array([0.0, 1.0]))
    assert np.isfinite(separable[0]).all()


def test_intervals_resample_images() -> None:
    p = np.array([0.1, 0.9, 0.2, 0.8, 0.3, 0.7])
    wrong = np.array([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    found = estimate_weighted(auroc, p, wrong, np.array([0, 0, 4, 4, 9, 9]), seed=0)
    assert found.n == 3
    assert found.value == pytest.approx(8 / 9)
    assert found.low <= found.value <= found.high
    assert estimate_weighted(auroc, p[:0], wrong[:0], np.array([], int), seed=0).n == 0


def test_the_threshold_with_the_best_f1() -> None:
    p, wrong = np.array([0.1, 0.2, 0.6, 0.9]), np.array([0.0, 0.0, 1.0, 1.0])
    assert best_threshold(p, wrong) == pytest.approx(0.4)
    assert best_threshold(p, np.zeros(4)) == 0.5
