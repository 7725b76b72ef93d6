"""Fit two affine maps under which images meet their texts: contrastive, by late interaction and by pooled vectors.

The context of an image and the context of its caption steer the same decoder, but they are not made of the same tokens: an image says
everything at every position, a caption a word at a time. Linear maps of both, learnt from pairs, close most of the gap.
Shapes: N pairs, B of a batch, L tokens of an image, T tokens of the longest text of a batch, D text width, d width of the space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from vlv.errors import DataError
from vlv.models.arguments import finite, whole_number
from vlv.models.search_space import Space

_SCALE = 20.0
"""Of the cosines, at the beginning; it is learnt."""
_MOST_TOKENS = 24
"""Of a text, drawn anew at each step: long texts would make every batch slow."""
_LEAST = 8
"""Pairs from which anything can be learnt."""


@dataclass(frozen=True)
class FitPlan:
    """How long and how fast is fitted.

    Raises:
        ConfigError: A number is out of its range.
    """

    width: int = 128
    """d; the text width where that is smaller."""
    steps: int = 1000
    batch_size: int = 64
    """Pairs among which each has to find its own."""
    lr: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("width", self.width, 1)
        whole_number("steps", self.steps, 1)
        whole_number("batch_size", self.batch_size, 2)
        whole_number("seed", self.seed, 0)
        finite("lr", self.lr)


class _Projection(nn.Module):
    """Both maps, begun where the variance of the images lies."""

    def __init__(self, images: Tensor, texts: Tensor, width: int) -> None:
        super().__init__()
        centred = images - images.mean(0)
        directions = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :width]  # (D, d)
        self.image_centre = nn.Parameter(images.mean(0))
        self.text_centre = nn.Parameter(texts.mean(0))
        self.image_matrix = nn.Parameter(directions.clone())
        self.text_matrix = nn.Parameter(directions.clone())
        self.image_pool = nn.Parameter(directions.clone())
        self.text_pool = nn.Parameter(directions.clone())
        self.log_scales = nn.Parameter(torch.full((2,), _SCALE).log())

    def forward(self, images: Tensor, texts: Tensor, is_token: Tensor) -> Tensor:
        """Scaled scores of late interaction and of pooled vectors, (2, B, B), a row for each text."""
        images, texts = images - self.image_centre, texts - self.text_centre
        x = F.normalize(images @ self.image_matrix, dim=-1)  # (B, L, d)
        y = F.normalize(texts @ self.text_matrix, dim=-1)  # (B, T, d)
        best = (y.flatten(0, 1) @ x.flatten(0, 1).T).view(*y.shape[:2], *x.shape[:2]).amax(-1)
        late = (best * is_token[..., None]).sum(1) / is_token.sum(1)[:, None]
        pooled_x = F.normalize(images.mean(1) @ self.image_pool, dim=-1)  # (B, d)
        pooled_y = F.normalize((texts * is_token[..., None]).sum(1) @ self.text_pool, dim=-1)
        scales = self.log_scales.exp()[:, None, None]
        return scales * torch.stack([late, pooled_y @ pooled_x.T])

    def space(self) -> Space:
        """What was fitted."""
        return Space(*(getattr(self, field.name).detach().clone() for field in fields(Space)))


def fit_projection(
    images: Tensor,
    texts: Sequence[Sequence[Tensor]],
    plan: FitPlan,
    report: Callable[[float], None] = lambda loss: None,
) -> Space:
    """Fit the maps by InfoNCE in both directions (van den Oord et al. 2018) within batches, for both stages of a search at once.

    Args:
        images: Contexts of images, (N, L, D), in any precision.
        texts: Contexts (T, D) of the texts of each image; at each step one of them is drawn.
        plan: How.
        report: Receives the loss of each step.

    Raises:
        DataError: There are too few pairs.
    """
    if len(images) < _LEAST:
        raise DataError(
            f"{len(images)} images with texts are too few to fit to; give {_LEAST} or more"
        )
    rng = torch.Generator().manual_seed(plan.seed)
    some = torch.randperm(len(images), generator=rng)[:1000].tolist()
    model = _Projection(
        torch.cat([images[i].float() for i in some]),
        torch.cat([texts[i][0].float() for i in some]),
        min(plan.width, images.shape[-1]),
    )
    optimizer = torch.optim.AdamW(model.parameters(), plan.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.steps)
    size = min(plan.batch_size, len(images))
    order: list[int] = []
    for _ in range(plan.steps):
        if len(order) < size:
            order = torch.randperm(len(images), generator=rng).tolist()
        batch, order = order[:size], order[size:]
        drawn = [_draw(texts[i], rng) for i in batch]
        y = pad_sequence([text.float() for text in drawn], batch_first=True)
        is_token = pad_sequence([torch.ones(len(text)) for text in drawn], batch_first=True)
        scores = model(images[batch].float(), y, is_token)
        own = torch.arange(size).expand(2, size)
        loss = (F.cross_entropy(scores, own) + F.cross_entropy(scores.mT, own)) / 2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        report(float(loss.detach()))
    return model.space()


def _draw(texts: Sequence[Tensor], rng: torch.Generator) -> Tensor:
    """One of the texts, or some tokens of it."""
    text = texts[int(torch.randint(len(texts), (), generator=rng))]
    return text[torch.randperm(len(text), generator=rng)[:_MOST_TOKENS]]
