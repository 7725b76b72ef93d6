"""Maps that are fitted to pairs of images and texts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from vlv.errors import ConfigError, DataError
from vlv.models.search_space import Space
from vlv.training.projection import FitPlan, fit_projection

PLAN = FitPlan(width=12, steps=500, batch_size=16, lr=0.03)
N, L, D = 40, 3, 12


def pairs() -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """Images whose tokens hold what their texts say, turned by a matrix, among noise."""
    rng = torch.Generator().manual_seed(0)
    facts = torch.randn(N, 2, D, generator=rng)
    turn = torch.linalg.qr(torch.randn(D, D, generator=rng))[0]
    images = torch.cat([facts @ turn, torch.randn(N, L - 2, D, generator=rng)], 1) + 3
    return images, [[x, x[:1], x[1:]] for x in facts]


def recall(maps: Space, images: torch.Tensor, texts: list[list[torch.Tensor]]) -> float:
    x = F.normalize((images - maps.image_centre) @ maps.image_matrix, dim=-1)
    right = 0
    for number, (text, *_) in enumerate(texts):
        y = F.normalize((text - maps.text_centre) @ maps.text_matrix, dim=-1)
        right += int((x @ y.T).amax(1).mean(1).argmax()) == number
    return right / len(texts)


@pytest.mark.slow
def test_texts_find_their_images_after_fitting() -> None:
    images, texts = pairs()
    losses: list[float] = []
    maps = fit_projection(images, texts, PLAN, losses.append)
    before = fit_projection(images, texts, replace(PLAN, steps=1, lr=0.0))
    assert recall(maps, images, texts) > 0.9 > 0.5 > recall(before, images, texts)
    assert len(losses) == PLAN.steps
    assert losses[-1] < losses[0]
    assert maps.image_matrix.shape == maps.text_matrix.shape == (D, 12)


def test_the_same_seed_fits_the_same_maps() -> None:
    images, texts = pairs()
    one, two, other = (
        fit_projection(images, texts, replace(PLAN, steps=3, seed=seed)) for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.tensors, two.tensors, strict=True))
    assert not torch.equal(one.image_matrix, other.image_matrix)


def test_a_space_is_no_wider_than_the_texts() -> None:
    images, texts = pairs()
    assert fit_projection(images, texts, replace(PLAN, width=99, steps=1)).text_matrix.shape == (
        D,
        D,
    )


def test_what_cannot_be_fitted() -> None:
    images, texts = pairs()
    with pytest.raises(DataError, match="7 images with texts are too few"):
        fit_projection(images[:7], texts[:7], PLAN)
    for bad in ({"width": 0}, {"steps": 0}, {"batch_size": 1}, {"lr": float("nan")}):
        with pytest.raises(ConfigError):
            FitPlan(**bad)  # type: ignore[arg-type]
