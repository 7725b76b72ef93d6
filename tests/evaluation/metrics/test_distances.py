from __future__ import annotations

import math

import numpy as np
import pytest

from vlv.evaluation.metrics.distances import (
    Moments,
    frechet_distance,
    frechet_estimate,
    frechet_excess,
    kernel_distance,
    kernel_estimate,
    too_few_images,
)


def exact_gaussian(n: int, cov: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Rows whose sample mean and covariance are exactly those given."""
    x = np.random.default_rng(0).normal(size=(n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return x @ np.linalg.cholesky(cov).T + mean


def test_a_set_has_no_distance_from_itself() -> None:
    x = np.random.default_rng(0).normal(size=(200, 16)) * np.logspace(0, 3, 16)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-4)


def test_shifted_gaussians() -> None:
    cov = np.array([[2.0, 0.5], [0.5, 1.0]])
    a = exact_gaussian(100, cov, np.zeros(2))
    b = exact_gaussian(80, cov, np.array([3.0, 4.0]))
    assert frechet_distance(a, b) == pytest.approx(25)


def test_scaled_gaussians() -> None:
    """Commuting covariances: the sum of (sqrt(a) - sqrt(b))^2 over the axes."""
    a = exact_gaussian(100, np.diag([4.0, 9.0]), np.zeros(2))
    b = exact_gaussian(100, np.diag([1.0, 16.0]), np.zeros(2))
    assert frechet_distance(a, b) == pytest.approx((2 - 1) ** 2 + (3 - 4) ** 2)


@pytest.mark.parametrize("degrees", [30, 90])
def test_rotated_covariance(degrees: float) -> None:
    """Two dimensions: tr (A B)^1/2 = sqrt(tr AB + 2 sqrt(det A det B))."""
    a = np.diag([9.0, 1.0])
    turn = math.radians(degrees)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    b = rotation @ a @ rotation.T
    cross = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    x, y = (exact_gaussian(60, cov, np.zeros(2)) for cov in (a, b))
    assert frechet_distance(x, y) == pytest.approx(20 - 2 * cross)
    assert frechet_distance(y, x) == pytest.approx(20 - 2 * cross)


def test_fewer_images_than_features() -> None:
    x = np.random.default_rng(0).normal(size=(10, 40)).astype(np.float32)
    assert frechet_distance(x, x + 2) == pytest.approx(160, rel=1e-4)


def test_estimate_holds_the_distance_and_its_spread() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 4)), rng.normal(size=(300, 4)) + 0.5
    found = frechet_estimate(a, b, seed=0)
    assert found.value == pytest.approx(frechet_distance(a, b))
    assert found.low < found.value < found.high
    assert found.low < 1.0 < found.high  # 4 x 0.5^2
    assert found == frechet_estimate(a, b, seed=0)


def test_kernel_distance_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    same = [kernel_distance(rng.normal(size=(40, 6)), rng.normal(size=(40, 6))) for _ in range(200)]
    assert np.mean(same) == pytest.approx(0, abs=3 * np.std(same) / math.sqrt(200))
    assert kernel_distance(rng.normal(size=(40, 6)), rng.normal(size=(40, 6)) + 1) > max(same)


def test_unusable_sets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(3, 4\)"):
        frechet_distance(np.zeros((3, 2)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="two images"):
        kernel_distance(np.zeros((1, 2)), np.zeros((3, 2)))


def test_moments_far_from_the_origin() -> None:
    """Where sums of squares would lose every digit, and in more than one piece."""
    x = np.random.default_rng(0).normal(size=(5000, 5)) + 1e6
    moments = Moments.of(x)
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance, np.cov(x.T), atol=1e-8)


def test_a_weight_is_a_repetition() -> None:
    x = np.random.default_rng(0).normal(size=(4000, 3))  # more than one piece
    weights = np.random.default_rng(1).integers(0, 3, 4000)
    weighted, repeated = Moments.of(x, weights.astype(float)), Moments.of(x.repeat(weights, 0))
    np.testing.assert_allclose(weighted.mean, repeated.mean, rtol=1e-12)
    np.testing.assert_allclose(weighted.covariance, repeated.covariance, rtol=1e-12)


def test_the_definition_of_the_published_implementations() -> None:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 sqrtm(S_a S_b)) on shared features, as pytorch-fid and torch-fidelity."""
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)) + rng.normal() for _ in "ab")
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_by_its_definition() -> None:
    a, b = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [2.0, 0.0]])

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 2 + 1) ** 3)

    cross = np.mean([k(x, y) for x in a for y in b])
    expected = k(a[0], a[1]) + k(b[0], b[1]) - 2 * cross
    assert kernel_distance(a, b) == pytest.approx(expected)


def test_the_interval_of_subsets_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(400, 4)), rng.normal(size=(400, 4)) + 0.5
    found = kernel_estimate(a, b, seed=0, subsets=50)
    assert found.low < kernel_distance(a, b) < found.high
    assert found == kernel_estimate(a, b, seed=0, subsets=50)
    repeats = [
        kernel_distance(rng.normal(size=(400, 4)), rng.normal(size=(400, 4)) + 0.5)
        for _ in range(40)
    ]
    standard_error = (found.high - found.low) / 2 / 1.96
    assert standard_error == pytest.approx(np.std(repeats), rel=0.5)


def direct_kernel_distance(a: np.ndarray, b: np.ndarray, *, paired: bool) -> float:
    """By its sums, pair by pair."""

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    within = [
        np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
        for x in (a, b)
    ]
    cross = [k(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if not (paired and i == j)]
    return float(sum(within) - 2 * np.mean(cross))


def test_the_kernel_distance_of_pairs_by_its_sums() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(9, 4))
    b = a + rng.normal(size=(9, 4)) / 2
    for paired in (False, True):
        expected = direct_kernel_distance(a, b, paired=paired)
        assert kernel_distance(a, b, paired=paired) == pytest.approx(expected)
    assert kernel_distance(a, a, paired=True) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="one size"):
        kernel_distance(a, b[:8], paired=True)


def test_the_kernel_distance_of_pairs_is_unbiased() -> None:
    """Pairs that share all but noise are of one distribution; counted as independent they would come out closer than that."""
    rng = np.random.default_rng(0)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        common = rng.normal(size=(20, 6))
        return tuple(common + 0.1 * rng.normal(size=(20, 6)) for _ in "ab")  # type: ignore[return-value]

    sets = [draw() for _ in range(200)]
    found, naive = ([kernel_distance(a, b, paired=p) for a, b in sets] for p in (True, False))
    assert np.mean(found) == pytest.approx(0, abs=3 * np.std(found) / math.sqrt(200))
    assert np.mean(naive) < -3 * np.std(naive) / math.sqrt(200)


def test_subsets_of_pairs_keep_the_pairs() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(60, 4))
    found = kernel_estimate(a, a, seed=0, subsets=5, paired=True)
    assert found.value == pytest.approx(0, abs=1e-9)


def test_the_excess_of_images_that_are_their_originals_is_zero() -> None:
    rng = np.random.default_rng(0)
    reference, originals = rng.normal(size=(300, 4)), rng.normal(size=(60, 4))
    same = frechet_excess(reference, originals, originals, seed=0, num=5)
    assert same.value == same.low == same.high == pytest.approx(0)
    moved = frechet_excess(reference, originals + 1, originals, seed=0)
    direct = frechet_distance(reference, originals + 1) - frechet_distance(reference, originals)
    assert moved.value == pytest.approx(direct)
    assert moved.low > 0
    repeats = []
    for _ in range(40):
        reference, originals = rng.normal(size=(300, 4)), rng.normal(size=(60, 4))
        near, far = (frechet_distance(reference, originals + shift) for shift in (0, 1))
        repeats.append(far - near)
    standard_error = (moved.high - moved.low) / 2 / 1.96
    assert standard_error == pytest.approx(np.std(repeats), rel=0.5)


def test_few_images_have_no_distance() -> None:
    assert too_few_images(512, 512) is None
    assert too_few_images(511, 512) == (
        "no FID of 511 images: with fewer images than features (512) it is mostly bias; read the KID"
    )
    assert str(too_few_images(99, 512)).startswith("no FID and no KID of 99 images")
