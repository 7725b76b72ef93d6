from __future__ import annotations

import math

import numpy as np
import pytest

from vlv.evaluation.frechet import frechet_distance, frechet_estimate, kernel_distance


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
