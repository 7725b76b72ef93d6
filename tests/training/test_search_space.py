"""A search space that is fitted to pairs of images and texts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vlv.errors import ConfigError, DataError
from vlv.models.search_net import Embedded
from vlv.models.search_space import FittedSpace
from vlv.search.space import max_sim
from vlv.training.search_space import FitPlan, Pairs, fit_search_space

PLAN = FitPlan(width=16, tokens=3, steps=400, batch_size=32, lr=3e-3)
N, L, D = 40, 3, 12


def pairs(*, with_variants: bool = False) -> Pairs:
    """Images whose tokens hold what their texts say, turned by a matrix, beside noise, which is another one in each variant."""
    rng = torch.Generator().manual_seed(0)
    facts = torch.randn(N, 2, D, generator=rng)
    turn = torch.linalg.qr(torch.randn(D, D, generator=rng))[0]
    first, second = (
        torch.cat([facts @ turn, 2 * torch.randn(N, L - 2, D, generator=rng)], 1) + 3
        for _ in range(2)
    )
    return Pairs(first, [[x, x[:1], x[1:]] for x in facts], second if with_variants else None)


def recall(space: FittedSpace, given: Pairs, queries: list[Embedded]) -> float:
    """Share of queries whose own image is the first of late interaction."""
    images = space.images(given.images).tokens
    right = [int(max_sim(query, images).argmax()) == n for n, query in enumerate(queries)]
    return sum(right) / len(right)


@pytest.mark.slow
def test_texts_find_their_images_after_fitting() -> None:
    given, losses = pairs(), list[float]()
    after = fit_search_space(given, PLAN, losses.append)
    before = fit_search_space(given, replace(PLAN, steps=1, lr=0.0))
    found = [
        recall(x, given, [x.text(some[kind]) for some in given.texts])
        for x in (after, before)
        for kind in (0, 1)
    ]
    assert min(found[:2]) > 0.9 > 0.5 > max(found[2:])
    assert len(losses) == PLAN.steps
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_images_find_their_content_in_another_form_where_such_pairs_were_given() -> None:
    given = pairs(with_variants=True)
    assert given.variants is not None
    with_pairs = fit_search_space(given, PLAN)
    untrained = fit_search_space(given, replace(PLAN, steps=1, lr=0.0))
    found = []
    for space in (with_pairs, untrained):
        queries = [Embedded(*x) for x in zip(*space.image_queries(given.variants), strict=True)]
        found.append(recall(space, given, queries))
    assert found[0] > 0.9 > 0.5 > found[1]


def test_without_variants_an_image_is_searched_for_as_it_is_found() -> None:
    space = fit_search_space(pairs(), replace(PLAN, steps=3))
    c = pairs().images
    assert all(torch.equal(*x) for x in zip(space.images(c), space.image_queries(c), strict=True))
    other = fit_search_space(pairs(with_variants=True), replace(PLAN, steps=3))
    assert not torch.equal(other.images(c).tokens, other.image_queries(c).tokens)


def test_the_same_seed_fits_the_same_space() -> None:
    hashes = [
        fit_search_space(pairs(), replace(PLAN, steps=3, seed=seed)).hash() for seed in (0, 0, 1)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_shapes_of_a_plan() -> None:
    space = fit_search_space(pairs(), replace(PLAN, steps=1, tokens=5, width=9))
    assert space.images(pairs().images).tokens.shape == (N, 5, 9)


def test_what_cannot_be_fitted() -> None:
    given = pairs()
    with pytest.raises(DataError, match="7 images with texts are too few"):
        Pairs(given.images[:7], given.texts[:7])
    for bad in ({"width": 0}, {"tokens": 0}, {"steps": 0}, {"batch_size": 1}, {"lr": float("nan")}):
        with pytest.raises(ConfigError):
            FitPlan(**bad)  # type: ignore[arg-type]
