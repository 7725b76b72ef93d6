"""Fit the network under which images meet their texts: contrastive, by late interaction and by pooled vectors.

The context of an image and the context of its caption steer the same decoder, but they are not made of the same tokens. What brings
them together is learnt from pairs: of images and texts, and of images that show the same content in different ways, so that
content and style come apart.
Shapes: N pairs, B of a batch, L tokens of an image's context, T tokens of the longest text of a batch, D text width, d width of the
space, M tokens of an image in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from vlv.errors import DataError
from vlv.models.arguments import finite, whole_number
from vlv.models.search_net import Embedded, SearchNet
from vlv.models.search_space import FittedSpace

_SCALE = 20.0
"""Of the cosines, at the beginning; it is learnt."""
_VARIANTS_EVERY = 4
"""Steps; images find themselves in another form much sooner than texts find their image."""
_LEAST = 8
"""Pairs from which anything can be learnt."""
_MEASURED = 1000
"""Pairs after which centre and scale are set."""
_WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""


@dataclass(frozen=True)
class FitPlan:
    """How long and how fast is fitted.

    Raises:
        ConfigError: A number is out of its range.
    """

    width: int = 128
    """d."""
    tokens: int = 16
    """M."""
    steps: int = 1000
    batch_size: int = 128
    """Pairs among which each has to find its own."""
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("width", self.width, 1)
        whole_number("tokens", self.tokens, 1)
        whole_number("steps", self.steps, 1)
        whole_number("batch_size", self.batch_size, 2)
        whole_number("seed", self.seed, 0)
        finite("lr", self.lr)


@dataclass(frozen=True, eq=False)
class Pairs:
    """What is learnt from: contexts of images, of their texts, and of the same images in other forms.

    Raises:
        DataError: There are too few.
    """

    images: Tensor
    """(N, L, D), in any precision."""
    texts: Sequence[Sequence[Tensor]]
    """Of each image one or more, (T, D) each, in one order of kinds: at each step texts of one kind compete."""
    variants: Tensor | None = None
    """(N, L, D): the same content in another style, light, or crop; None where there is none."""

    def __post_init__(self) -> None:
        if len(self.images) < _LEAST:
            raise DataError(
                f"{len(self.images)} images with texts are too few to fit to; give {_LEAST} or more"
            )


class _Learner(nn.Module):
    """The network and the temperatures of its four comparisons, which are learnt."""

    def __init__(self, pairs: Pairs, plan: FitPlan, rng: torch.Generator) -> None:
        super().__init__()
        _, L, D = pairs.images.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            self.net = SearchNet(D, L, plan.tokens, plan.width)
        self.log_scales = nn.Parameter(torch.full((4,), _SCALE).log())
        some = torch.randperm(len(pairs.images), generator=rng)[:_MEASURED].tolist()
        self.net.image.set_range(pairs.images[some].float())
        self.net.text.set_range(torch.cat([pairs.texts[i][0].float() for i in some]))

    def forward(self, images: Tensor, texts: Sequence[Tensor], variants: Tensor | None) -> Tensor:
        """The loss of a batch: images (B, L, D), a text (T, D) of each, and the images in another form."""
        y = pad_sequence([text.float() for text in texts], batch_first=True)
        lengths = torch.tensor([len(text) for text in texts])
        is_token = torch.arange(y.shape[1]) < lengths[:, None]  # (B, T)
        with torch.autocast("cpu", torch.bfloat16):  # in half the time
            found = self.net.images(images)
            queries = self.net.texts(y, is_token)
            others = None if variants is None else self.net.image_queries(variants)
        scales = self.log_scales.exp()
        loss = _loss(queries, found, scales[:2])
        return loss if others is None else loss + _loss(others, found, scales[2:])


def _loss(queries: Embedded, images: Embedded, scales: Tensor) -> Tensor:
    """InfoNCE in both directions (van den Oord et al. 2018), of late interaction and of pooled vectors."""
    B, T, d = queries.tokens.shape
    cosines = (
        queries.tokens.reshape(B * T, d).bfloat16() @ images.tokens.reshape(-1, d).bfloat16().T
    )
    best = cosines.view(B, T, len(images.tokens), -1).amax(-1).float()  # (B, T, B)
    late = (queries.weights[..., None] * best).sum(1)
    scores = scales[:, None, None] * torch.stack([late, queries.pooled @ images.pooled.T])
    own = torch.arange(B).expand(2, B)
    return F.cross_entropy(scores, own) + F.cross_entropy(scores.mT, own)


def fit_search_space(
    pairs: Pairs, plan: FitPlan, report: Callable[[float], None] = lambda loss: None
) -> FittedSpace:
    """Fit a search space within batches, for both stages of a search at once.

    Args:
        pairs: What it is fitted to.
        plan: How.
        report: Receives the loss of each step.
    """
    rng = torch.Generator().manual_seed(plan.seed)
    learner = _Learner(pairs, plan, rng)
    optimizer = torch.optim.AdamW(learner.parameters(), plan.lr, (0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / plan.steps))
    size = min(plan.batch_size, len(pairs.images))
    order: list[int] = []
    for step in range(plan.steps):
        if len(order) < size:
            order = torch.randperm(len(pairs.images), generator=rng).tolist()
        batch, order = order[:size], order[size:]
        kind = float(torch.rand((), generator=rng))
        texts = [pairs.texts[i][int(kind * len(pairs.texts[i]))] for i in batch]
        variants = pairs.variants if step % _VARIANTS_EVERY == 0 else None
        others = None if variants is None else variants[batch].float()
        loss = learner(pairs.images[batch].float(), texts, others)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(float(loss.detach()))
    if pairs.variants is None:  # nothing has taught what else an image should be searched for by
        learner.net.query_head.load_state_dict(learner.net.image_head.state_dict())
    return FittedSpace(learner.net)


def _rate(share: float) -> float:
    """The learning rate after a share of the steps, relative to its highest: a ramp, then half a cosine.

    >>> [round(_rate(x), 2) for x in (0, 0.025, 0.05, 0.525, 1)]
    [0.04, 0.52, 1.0, 0.5, 0.0]
    """
    if share < _WARM_UP:
        return 0.04 + 0.96 * share / _WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (share - _WARM_UP) / (1 - _WARM_UP))
