"""From judgements to scores: Bradley-Terry strengths of captioners, and the agreement of raters.

Shapes: P players (captioners), R raters, U units (captions).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlv.evaluation.statistics import LEVEL, Estimate, resample_counts

Array = NDArray[np.float64]
Level = Literal["ordinal", "interval"]

_MAX_ROUNDS = 10_000


def bradley_terry(wins_PP: ArrayLike) -> Array:
    """Strengths p with P(i beats j) = p_i / (p_i + p_j), at the greatest likelihood.

    Found by minorisation-maximisation (Hunter 2004, equation 3): p_i becomes w_i / sum_j n_ij / (p_i + p_j), with w_i the wins
    of i and n_ij the comparisons of i and j.

    Args:
        wins_PP: (..., P, P), how often i beat j; a tie is half a win of either.

    Returns:
        (..., P), without unit, geometric mean 1. A player that never won has 0 and one that never lost infinity, in the sense that
        no finite strengths are likeliest; then every strength is NaN, as it is where the comparisons fall into two groups.

    Raises:
        ValueError: The matrix is not square or has negative entries.
    """
    wins = np.array(wins_PP, np.float64)
    if wins.ndim < 2 or wins.shape[-1] != wins.shape[-2] or (wins < 0).any():
        raise ValueError(f"wins are a square matrix of counts, got the shape {wins.shape}")
    wins[..., range(wins.shape[-1]), range(wins.shape[-1])] = 0
    strengths = np.full(wins.shape[:-1], np.nan)
    finite = _strongly_connected(wins > 0)
    played, won = (wins + wins.swapaxes(-1, -2))[finite], wins.sum(-1)[finite]
    p = np.ones(won.shape)
    for _ in range(_MAX_ROUNDS if p.size else 0):
        new = won / (played / (p[:, :, None] + p[:, None])).sum(-1)
        new /= np.exp(np.log(new).mean(-1, keepdims=True))
        settled = np.abs(new / p - 1).max() < 1e-12
        p = new
        if settled:
            break
    strengths[finite] = p
    return strengths


def bradley_terry_estimates(outcomes_NPP: ArrayLike, seed: int, num: int = 1000) -> list[Estimate]:
    """`bradley_terry` with percentile intervals of a bootstrap over images.

    Half a win each way is added to every pair that was compared, in the whole and in each resample, so that strengths stay
    finite where one side won every time; it draws them together by half a comparison.

    Args:
        outcomes_NPP: (N, P, P), for every image how often i beat j; a tie is half a win of both.
        seed: Of the resamples.
        num: How many.

    Returns:
        One per player.
    """
    outcomes = np.asarray(outcomes_NPP, np.float64)
    n, players = len(outcomes), outcomes.shape[1]
    compared = (outcomes + outcomes.transpose(0, 2, 1)).sum(0) > 0
    prior = compared / 2
    counts = resample_counts(n, num, np.random.default_rng(seed))  # (R, N)
    totals = (counts @ outcomes.reshape(n, -1)).reshape(num, players, players)
    whole = bradley_terry(outcomes.sum(0) + prior)
    drawn = bradley_terry(totals + prior)
    low, high = np.nanquantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
    rows = zip(whole.tolist(), low.tolist(), high.tolist(), strict=True)
    return [Estimate(value, least, most, n) for value, least, most in rows]


def _strongly_connected(edges: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether a chain of wins leads from every player to every other, (...) of (..., P, P)."""
    players = edges.shape[-1]
    reach = edges | np.eye(players, dtype=bool)
    for _ in range(players.bit_length()):
        reach = (reach.astype(np.int64) @ reach.astype(np.int64)) > 0
    return np.asarray(reach.all((-1, -2)))


def krippendorff_alpha(ratings_RU: ArrayLike, level: Level) -> float:
    """Agreement of raters beyond chance (Krippendorff 2011): 1 - observed over expected disagreement.

    1 is perfect agreement, 0 that of chance, below 0 systematic disagreement. Units with fewer than two ratings say nothing
    and are left out.

    Args:
        ratings_RU: (R, U), NaN where a rater did not rate a unit.
        level: What a difference of two ratings is: "interval" the squared difference; "ordinal" the squared number of ratings
            between the two, each counted half.

    Returns:
        Without unit; NaN where no two ratings can be compared, or all are the same.
    """
    ratings = np.asarray(ratings_RU, np.float64)
    ratings = ratings[:, (~np.isnan(ratings)).sum(0) > 1]
    values = np.unique(ratings[~np.isnan(ratings)])
    counts = (ratings[:, :, None] == values).sum(0).astype(np.float64)  # (U, values)
    if len(values) < 2:
        return float("nan")
    pairs = np.einsum("uc,uk->uck", counts, counts)
    pairs -= counts[:, :, None] * np.eye(len(values))  # a rating is not paired with itself
    coincidences = (pairs / (counts.sum(1) - 1)[:, None, None]).sum(0)
    margin = coincidences.sum(1)
    expected = np.outer(margin, margin) - np.diag(margin)
    place = values if level == "interval" else np.cumsum(margin) - margin / 2
    difference = np.square(place[:, None] - place)
    observed = (coincidences * difference).sum()
    return float(1 - (margin.sum() - 1) * observed / (expected * difference).sum())
