"""Distances between two sets of images by their features: Frechet (FID) and kernel (KID).

They compare sets, not pairs: whether the right image was generated for each caption does not enter. But a set of
reconstructions is paired with its originals, image by image, and an estimator that takes the two sets for independent
then calls them closer than they are; `paired` says so.
Shapes: N and M images, D feature width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlv.evaluation.statistics import Estimate, resample_counts

Array = NDArray[np.float64]
Features = NDArray[np.float32] | NDArray[np.float64]

FEWEST_FOR_KERNEL = 100
"""With fewer images the interval of a kernel distance is as wide as the distances that one wants to compare."""
_ROWS = 2048
"""Rows of features that are looked at together; what is remembered does not grow with N."""


class Moments(NamedTuple):
    """Mean and covariance of feature vectors."""

    mean: Array
    """(D,)."""
    covariance: Array
    """(D, D), with N - 1."""

    @classmethod
    def of(cls, features_ND: Features, weights_N: Array | None = None) -> Moments:
        """Those of all rows, each counted as often as its weight says.

        Rows are read in pieces and in float64: a memory-mapped file may be larger than memory. The mean comes first, for far
        from the origin sums of squares would lose every digit.
        """
        weights = np.ones(len(features_ND)) if weights_N is None else weights_N
        pieces = [slice(i, i + _ROWS) for i in range(0, len(features_ND), _ROWS)]
        total = weights.sum()
        mean = sum(weights[p] @ np.asarray(features_ND[p], np.float64) for p in pieces) / total
        scatter = np.zeros((features_ND.shape[1],) * 2)
        for piece in pieces:
            offset = (features_ND[piece] - mean) * np.sqrt(weights[piece])[:, None]
            scatter += offset.T @ offset
        return cls(mean, scatter / (total - 1))


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
    return _distance(Moments.of(a), Moments.of(b))


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
            _distance(Moments.of(a, of_a), Moments.of(b, of_b))
            for of_a, of_b in zip(weights_a, weights_b, strict=True)
        ],
        ddof=1,
    )
    value = _distance(Moments.of(a), Moments.of(b))
    margin = 1.96 * float(spread)
    return Estimate(value, max(0.0, value - margin), value + margin, min(len(a), len(b)))


def kernel_distance(
    features_a_ND: Features, features_b_ND: Features, *, paired: bool = False
) -> float:
    """Kernel distance (KID, Binkowski et al. 2018, equation 4): unbiased squared MMD with the kernel (x.y / D + 1)^3.

    Unbiased at any N, so it is read beside the Frechet distance of small sets; it may be slightly negative.

    Args:
        features_a_ND: (N, D).
        features_b_ND: (M, D).
        paired: Row i of both sets belongs to one sample, as an original and its reconstruction do; M is N. Such pairs are
            more alike than two random images, so the cross term leaves them out as the other terms leave out i = j.
    """
    a, b = (np.asarray(x, np.float64) for x in _checked(features_a_ND, features_b_ND))
    if paired and len(a) != len(b):
        raise ValueError(f"paired sets have one size, got {len(a)} and {len(b)}")
    cross = _kernel(a, b)
    between = _off_diagonal_mean(cross) if paired else float(cross.mean())
    return _off_diagonal_mean(_kernel(a, a)) + _off_diagonal_mean(_kernel(b, b)) - 2 * between


def kernel_estimate(
    features_a_ND: Features,
    features_b_ND: Features,
    seed: int,
    subsets: int = 100,
    size: int = 1000,
    *,
    paired: bool = False,
) -> Estimate:
    """`kernel_distance` averaged over random subsets, as KID is published, with 1.96 standard errors on either side.

    Both sets give subsets of m images without replacement: `size`, or half of the smaller set; of paired sets the same
    rows. The standard error is that of the jackknife that leaves out the other n - m (Shao and Wu 1989):
    sqrt(m / (n - m)) times the spread of the subsets.
    """
    a, b = _checked(features_a_ND, features_b_ND)
    n = min(len(a), len(b))
    m = max(2, min(size, n // 2))
    rng = np.random.default_rng(seed)

    def subset() -> float:
        rows = np.sort(rng.choice(len(a), m, replace=False))
        others = rows if paired else np.sort(rng.choice(len(b), m, replace=False))
        return kernel_distance(a[rows], b[others], paired=paired)

    drawn = [subset() for _ in range(subsets)]
    value = float(np.mean(drawn))
    margin = 1.96 * float(np.std(drawn, ddof=1)) * (m / max(1, n - m)) ** 0.5
    return Estimate(value, value - margin, value + margin, n)


def frechet_excess(
    reference_MD: Features, features_ND: Features, originals_ND: Features, seed: int, num: int = 30
) -> Estimate:
    """How much farther images are from a reference than their own originals are, by `frechet_distance`.

    The bias of a finite set is in both distances and cancels, and so does what the pairs share. The interval is 1.96
    bootstrap standard errors on either side; a resample redraws images and originals together, and the reference.

    Args:
        reference_MD: Features of M further images, independent of the originals.
        features_ND: Of the images.
        originals_ND: Of the originals in the same order.
        seed: Of the resamples.
        num: How many.
    """
    images, originals = _checked(features_ND, originals_ND)
    rng = np.random.default_rng(seed)

    def excess(own: Array | None, of_reference: Array | None) -> float:
        reference = Moments.of(reference_MD, of_reference)
        return _distance(reference, Moments.of(images, own)) - _distance(
            reference, Moments.of(originals, own)
        )

    counts = resample_counts(len(images), num, rng), resample_counts(len(reference_MD), num, rng)
    spread = float(np.std([excess(own, of) for own, of in zip(*counts, strict=True)], ddof=1))
    value = excess(None, None)
    return Estimate(value, value - 1.96 * spread, value + 1.96 * spread, len(images))


def _kernel(x: Array, y: Array) -> Array:
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def _off_diagonal_mean(matrix: Array) -> float:
    n = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (n * (n - 1)))


def _distance(a: Moments, b: Moments) -> float:
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    shift = np.square(a.mean - b.mean).sum()
    return max(0.0, float(shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross))


def too_few_images(n: int, width: int) -> str | None:
    """Which distances of n images with features of this width say nothing, and why; None where both can be given.

    >>> too_few_images(16, 512)
    'no FID and no KID of 16 images: a KID takes 100, a FID as many as there are features, 512'
    """
    if n >= width:
        return None
    if n < FEWEST_FOR_KERNEL:
        needs = f"a KID takes {FEWEST_FOR_KERNEL}, a FID as many as there are features, {width}"
        return f"no FID and no KID of {n} images: {needs}"
    return f"no FID of {n} images: with fewer images than features ({width}) it is mostly bias; read the KID"


def _checked(a: Features, b: Features) -> tuple[Features, Features]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features are (N, D) and (M, D), got {a.shape} and {b.shape}")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"two images of each set are needed, got {len(a)} and {len(b)}")
    return a, b
