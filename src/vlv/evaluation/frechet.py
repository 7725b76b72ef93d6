"""Distances between two sets of images, seen as two clouds of feature vectors.

Shapes: N and M images, D feature width. They compare sets, not pairs: whether the right image was drawn for each caption
does not enter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlv.evaluation.statistics import Estimate, resample_counts

Array = NDArray[np.float64]
Features = NDArray[np.float32] | NDArray[np.float64]


def frechet_distance(features_a_ND: Features, features_b_ND: Features) -> float:
    """Frechet distance of two Gaussians fitted to the features (Dowson and Landau 1982; as FID: Heusel et al. 2017).

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2), in squared units of the features. Covariances are those with
    N - 1. The square roots are taken of symmetric matrices by their eigenvalues in float64, so the result is real; negative
    eigenvalues are rounding and count as 0. The distance of finite sets is biased upwards, more so for small N: compare
    distances of sets of one size.

    Args:
        features_a_ND: (N, D), N at least 2.
        features_b_ND: (M, D).

    Raises:
        ValueError: The widths differ, or a set has fewer than two rows.
    """
    a, b = _checked(features_a_ND, features_b_ND)
    return _distance(_moments(a), _moments(b))


def frechet_estimate(
    features_a_ND: Features, features_b_ND: Features, seed: int, num: int = 30
) -> Estimate:
    """`frechet_distance` with an interval of 1.96 bootstrap standard errors on either side, both sets resampled.

    Resamples repeat images, which raises a Frechet distance; their spread is used and their level is not.
    """
    a, b = _checked(features_a_ND, features_b_ND)
    rng = np.random.default_rng(seed)
    weights_a, weights_b = (resample_counts(len(x), num, rng) for x in (a, b))
    spread = np.std(
        [
            _distance(_moments(a, wa), _moments(b, wb))
            for wa, wb in zip(weights_a, weights_b, strict=True)
        ],
        ddof=1,
    )
    value = _distance(_moments(a), _moments(b))
    margin = 1.96 * float(spread)
    return Estimate(value, max(0.0, value - margin), value + margin, min(len(a), len(b)))


def kernel_distance(features_a_ND: Features, features_b_ND: Features) -> float:
    """Kernel distance (KID, Binkowski et al. 2018, equation 4): unbiased squared MMD with the kernel (x.y / D + 1)^3.

    Unbiased at any N, so it is read beside the Frechet distance of small sets; it may be slightly negative.
    """
    a, b = _checked(features_a_ND, features_b_ND)
    within = (_off_diagonal_mean(_kernel(x, x)) for x in (a, b))
    return float(sum(within) - 2 * _kernel(a, b).mean())


def _kernel(x: Array, y: Array) -> Array:
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def _off_diagonal_mean(matrix: Array) -> float:
    n = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (n * (n - 1)))


def _moments(features: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """Mean (D,) and covariance (D, D); weights are how often each row counts."""
    weights = np.ones(len(features)) if weights is None else weights
    total = weights.sum()
    centre = weights @ features / total
    offset = (features - centre) * np.sqrt(weights)[:, None]
    return centre, offset.T @ offset / (total - 1)


def _distance(a: tuple[Array, Array], b: tuple[Array, Array]) -> float:
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    shift = np.square(mean_a - mean_b).sum()
    return max(0.0, float(shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))


def _checked(a: Features, b: Features) -> tuple[Array, Array]:
    x, y = (np.asarray(v, np.float64) for v in (a, b))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features are (N, D) and (M, D), got {x.shape} and {y.shape}")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"two images of each set are needed, got {len(x)} and {len(y)}")
    return x, y
