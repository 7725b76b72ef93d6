"""How good probabilities of being wrong are: do they rank (AUROC), are they calibrated (ECE), and the logistic fit.

Shapes: N cases, F features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vlv.evaluation.statistics import Array, Estimate, percentile_interval, resample_counts

BINS = 10
_STEPS = 100  # of Newton's method, which needs about ten

Weighted = Callable[[Array, Array, Array], float]
"""A figure of probabilities (N,), whether each case is wrong (N,), and how often it counts (N,)."""


def auroc(scores: Array, wrong: Array, weights: Array) -> float:
    """Probability that a wrong case has a higher score than a right one, ties counted half; NaN without both kinds.

    >>> auroc(np.array([0.1, 0.4, 0.4]), np.array([0.0, 0.0, 1.0]), np.ones(3))
    0.75
    """
    _, group = np.unique(scores, return_inverse=True)
    bad = np.bincount(group, weights * wrong)
    good = np.bincount(group, weights * (1 - wrong))
    below = np.cumsum(good) - good
    pairs = bad.sum() * good.sum()
    return float((bad * (below + good / 2)).sum() / pairs) if pairs else float("nan")


def calibration_error(probabilities: Array, wrong: Array, weights: Array) -> float:
    """Expected calibration error (Naeini 2015): |mean probability - share of wrong cases| in 10 equal bins, weighted.

    >>> calibration_error(np.array([0.25, 0.25]), np.array([0.0, 1.0]), np.ones(2))
    0.25
    """
    place = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    gaps = np.bincount(place, weights * (probabilities - wrong), BINS)
    return float(np.abs(gaps).sum() / weights.sum()) if weights.sum() else float("nan")


def estimate_weighted(
    figure: Weighted,
    values: Array,
    wrong: Array,
    image: NDArray[np.intp],
    seed: int,
    num: int = 500,
) -> Estimate:
    """A figure of cases with a bootstrap interval over the images that they belong to.

    Args:
        figure: Such as `auroc`.
        values: Scores or probabilities, (N,).
        wrong: 1 or 0, (N,).
        image: Number of the image of each case, (N,).
        seed: Of the resamples.
        num: Resamples.
    """
    if not len(values):
        nothing = float("nan")
        return Estimate(nothing, nothing, nothing, 0)
    _, rows = np.unique(image, return_inverse=True)
    n = int(rows.max()) + 1
    counts = resample_counts(n, num, np.random.default_rng(seed))
    drawn = np.array([figure(values, wrong, row[rows]) for row in counts])
    value = figure(values, wrong, np.ones(len(values)))
    return Estimate(value, *percentile_interval(drawn), n)


def fit_logistic(features: Array, wrong: Array, ridge: float = 1.0) -> tuple[Array, float, float]:
    """Fit a logistic regression by Newton's method.

    Args:
        features: (N, F).
        wrong: 1 or 0, (N,).
        ridge: Strength of the Gaussian prior on the weights, not on the bias.

    Returns:
        Weights (F,), the bias, and the mean negative log-likelihood.
    """
    x = np.hstack([features, np.ones((len(features), 1))])
    penalty = np.diag([ridge] * features.shape[1] + [1e-6])
    theta = np.zeros(x.shape[1])
    for _ in range(_STEPS):
        p = _sigmoid(x @ theta)
        gradient = x.T @ (wrong - p) - penalty @ theta
        curvature = (x * (p * (1 - p))[:, None]).T @ x + penalty
        step = np.linalg.solve(curvature, gradient)
        theta = theta + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    p = np.clip(_sigmoid(x @ theta), 1e-12, 1 - 1e-12)
    loss = -np.where(wrong > 0, np.log(p), np.log(1 - p)).mean()
    return theta[:-1], float(theta[-1]), float(loss)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -500, 500))))


def best_threshold(probabilities: Array, wrong: Array) -> float:
    """The probability from which calling a case wrong gives the highest F1; 0.5 where no case is wrong."""
    if not wrong.any():
        return 0.5
    candidates = np.unique(probabilities)
    f1 = [
        2 * wrong[probabilities >= x].sum() / ((probabilities >= x).sum() + wrong.sum())
        for x in candidates
    ]
    row = int(np.argmax(f1))
    before = candidates[row - 1] if row else 0.0
    return float((before + candidates[row]) / 2)
