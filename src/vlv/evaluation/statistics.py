"""Estimates with bootstrap intervals.

Every figure here is a function of sums over images: a share, a ratio of shares, an F1 score. So a resample of the images is
a row of counts, and all resamples are one matrix product. Shapes: N images, K columns, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""From the means of the columns, (..., K), to the figure, (...)."""

LEVEL = 0.95
"""Share of the resamples inside an interval."""
_DRAWS_AT_ONCE = 4_000_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its uncertainty; NaN where there was nothing to measure."""

    value: float
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    n: int
    """Images that were resampled."""


def mean(columns: Array) -> Array:
    """Mean of column 0."""
    return columns[..., 0]


def ratio(columns: Array) -> Array:
    """Sum of column 0 over sum of column 1: a share when column 1 counts the cases."""
    return columns[..., 0] / columns[..., 1]


def complement(columns: Array) -> Array:
    """1 - `ratio`."""
    return 1 - ratio(columns)


def ratio_of_ratios(columns: Array) -> Array:
    """(column 0 / column 1) / (column 2 / column 3), all of the same images: a paired comparison of two shares."""
    return ratio(columns) / ratio(columns[..., 2:])


def f1(columns: Array) -> Array:
    """Harmonic mean of precision and recall, from sums of (stated, true, correct): 2 correct / (stated + true)."""
    return 2 * columns[..., 2] / (columns[..., 0] + columns[..., 1])


def ratio_of_f1(columns: Array) -> Array:
    """F1 of columns 0 to 2 over F1 of columns 3 to 5."""
    return f1(columns) / f1(columns[..., 3:])


def recovered(columns: Array) -> Array:
    """Recovered share of the gain from loss a (column 0) to loss b (column 1) by loss c (column 2): (a - c) / (a - b).

    0 at a, 1 at b, above 1 below b; NaN where b is not below a, for then there is no gain.
    """
    gain = columns[..., 0] - columns[..., 1]
    return (columns[..., 0] - columns[..., 2]) / np.where(gain > 0, gain, np.nan)


def decibels(columns: Array) -> Array:
    """PSNR of the mean squared error in column 0, for pixels in [0, 1]."""
    return np.asarray(-10 * np.log10(columns[..., 0]))


def resample_counts(n: int, num: int, rng: np.random.Generator) -> Array:
    """How often each of n images occurs in each of `num` resamples with replacement, (num, n)."""
    draws = rng.integers(n, size=(num, n)) + np.arange(num)[:, None] * n
    counts = np.bincount(draws.ravel(), minlength=num * n).reshape(num, n)
    return counts.astype(np.float64)


def bootstrap_interval(
    values: ArrayLike, statistic: Statistic, seed: int, num: int = 1000
) -> tuple[float, float]:
    """Percentile interval of the bootstrap (Efron 1979): images are resampled with replacement, all columns of an image together.

    Args:
        values: (N,) or (N, K), one row per image; in a ratio the numerator and the denominator are two columns.
        statistic: From the means of the columns (..., K) to the figure (...).
        seed: Of the resamples.
        num: R, resamples.

    Returns:
        The two ends of the 95 % interval, in the unit of the figure; NaN where no resample gave a finite figure.

    >>> bootstrap_interval([2.0, 2.0, 2.0], mean, seed=0)
    (2.0, 2.0)
    """
    table = _table(values)
    rng = np.random.default_rng(seed)
    n = len(table)
    at_once = max(1, _DRAWS_AT_ONCE // n)
    figures = []
    for start in range(0, num, at_once):
        counts = resample_counts(n, min(at_once, num - start), rng)
        figures.append(_apply(statistic, counts @ table / n))
    return percentile_interval(np.concatenate(figures))


def percentile_interval(figures: Array) -> tuple[float, float]:
    """The 95 % interval of the figures of all resamples; NaN where none is finite."""
    finite = figures[np.isfinite(figures)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def estimate(values: ArrayLike, statistic: Statistic, seed: int, num: int = 1000) -> Estimate:
    """The figure of all images with its bootstrap interval; arguments as in `bootstrap_interval`."""
    table = _table(values)
    value = float(_apply(statistic, table.mean(0)))
    return Estimate(value, *bootstrap_interval(table, statistic, seed, num), len(table))


def figures_by_seed(values: ArrayLike, statistic: Statistic) -> Array:
    """The figure of each training by itself, (S,), of (S, N, K) values; NaN where there is nothing to divide by."""
    return _apply(statistic, np.asarray(values, np.float64).mean(1))


def estimate_over_seeds(
    values: ArrayLike, statistic: Statistic, seed: int, num: int = 1000
) -> Estimate:
    """A figure of several trainings that were measured on the same images, with one interval for both.

    The squares of two half-widths are added: that of Student's t over the trainings' own figures, which knows how few they are, and that
    of a bootstrap of the images, which all trainings share. Of one training only the latter is known.

    Args:
        values: (S, N, K), by training, image and column.
        statistic: From the means of the columns (..., K) to the figure (...).
        seed: Of the resamples.
        num: R, resamples.

    Returns:
        The estimate; n counts images.
    """
    table = np.asarray(values, np.float64)
    trainings, n, _ = table.shape
    images = estimate(table.mean(0), statistic, seed, num)
    if trainings == 1:
        return images
    from scipy.stats import t

    figures = figures_by_seed(table, statistic)
    over_seeds = t.ppf((1 + LEVEL) / 2, trainings - 1) * figures.std(ddof=1) / trainings**0.5
    low, high = (
        images.value + sign * float(np.hypot(over_seeds, bound - images.value))
        for sign, bound in ((-1, images.low), (1, images.high))
    )
    return Estimate(images.value, low, high, n)


@dataclass(frozen=True, slots=True)
class Paired:
    """How a figure of one run differs from that of another on the same images."""

    difference: Estimate
    """Ours minus theirs."""
    p: float
    """Of the two-sided permutation test; NaN where nothing could be compared."""


def paired_test(
    ours: ArrayLike, theirs: ArrayLike, statistic: Statistic, seed: int, num: int = 1000
) -> Paired:
    """Compare two runs on the same images: paired bootstrap interval and permutation test (Good 2005).

    In a permutation the two runs change places at random images. p is the share of permutations, the one found among them,
    whose difference is at least as large; with `num` permutations it cannot be less than 1 / (num + 1).

    Args:
        ours: (N,) or (N, K), one row per image.
        theirs: Likewise, of the same images in the same order.
        statistic: From the means of the columns (..., K) to the figure (...).
        seed: Of resamples and permutations.
        num: How many of each.

    Raises:
        ValueError: The shapes differ.

    >>> paired_test([1.0, 2.0], [1.0, 2.0], mean, seed=0).p
    1.0
    """
    a, b = _table(ours), _table(theirs)
    if a.shape != b.shape:
        raise ValueError(f"paired tables have one shape, got {a.shape} and {b.shape}")
    width = a.shape[1]

    def difference(columns: Array) -> Array:
        return statistic(columns[..., :width]) - statistic(columns[..., width:])

    found = estimate(np.hstack((a, b)), difference, seed, num)
    rng = np.random.default_rng([seed, 1])
    shift = (b - a) / len(a)
    swapped = []
    for start in range(0, num, max(1, _DRAWS_AT_ONCE // len(a))):
        rows = min(num - start, max(1, _DRAWS_AT_ONCE // len(a)))
        moved = rng.integers(2, size=(rows, len(a))).astype(np.float64) @ shift
        swapped.append(_apply(difference, np.hstack((a.mean(0) + moved, b.mean(0) - moved))))
    drawn = np.concatenate(swapped)
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn) or not np.isfinite(found.value):
        return Paired(found, float("nan"))
    as_large = int((np.abs(drawn) >= abs(found.value) - 1e-12).sum())
    return Paired(found, (as_large + 1) / (len(drawn) + 1))


def _table(values: ArrayLike) -> Array:
    table = np.asarray(values, np.float64)
    if not len(table):
        raise ValueError("an estimate needs at least one image")
    return table[:, None] if table.ndim == 1 else table


def _apply(statistic: Statistic, columns: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0: nothing to measure
        return np.asarray(statistic(columns))
