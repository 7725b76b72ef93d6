"""The network of a fitted search space: contexts of images and of texts become tokens that can be held against each other.

The context of an image tells one fact here and another there, and a text names several of one thing in one breath. So M learned
queries read all L places of an image, and each of them puts together what belongs together; the tokens of a text read one another.
Shapes: B images or texts, L tokens of an image's context, T of the longest text, D text width, d width of the space, M tokens of an image.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_WIDER = 2
"""The hidden layer of a transformer layer, relative to its width."""
_SMALL = 0.02
"""Initial deviation of what a layer adds: at first it adds next to nothing."""


class Embedded(NamedTuple):
    """Images or a text in the space; tokens and pooled vectors have unit length."""

    tokens: Tensor
    """For late interaction, (..., M or T, d)."""
    pooled: Tensor
    """For the first stage, (..., d)."""
    weights: Tensor
    """How much each token says where these are queries, (..., M or T); their sum is 1."""


class SearchNet(nn.Module):
    """Both readers, and one head for each use of what they read.

    Args:
        text_width: D.
        num_places: L.
        num_tokens: M.
        width: d.
    """

    def __init__(self, text_width: int, num_places: int, num_tokens: int, width: int) -> None:
        super().__init__()
        if min(text_width, num_places, num_tokens, width) < 1:
            raise ValueError("a search space has places, tokens and a width")
        self.text_width, self.num_places = text_width, num_places
        self.num_tokens, self.width = num_tokens, width
        self.image = ImageReader(text_width, num_places, num_tokens, width)
        self.text = TextReader(text_width, width)
        self.image_head = Head(width)
        self.query_head, self.text_head = Head(width), Head(width)
        self.query_head.load_state_dict(self.image_head.state_dict())
        self.text_head.load_state_dict(self.image_head.state_dict())

    def images(self, c: Tensor) -> Embedded:
        """Contexts (B, L, D) of images to be found: tokens (B, M, d), pooled vectors (B, d), weights (B, M)."""
        found: Embedded = self.image_head(self.image(c))
        return found

    def image_queries(self, c: Tensor) -> Embedded:
        """The same of images that are searched for."""
        found: Embedded = self.query_head(self.image(c))
        return found

    def texts(self, c: Tensor, is_token: Tensor | None = None) -> Embedded:
        """Contexts (B, T, D) of texts: tokens (B, T, d), pooled vectors (B, d), weights (B, T).

        Args:
            c: The contexts; what stands behind a shorter text is not looked at.
            is_token: (B, T), what belongs to the text; None where all does.
        """
        found: Embedded = self.text_head(self.text(c, is_token), is_token)
        return found


class Head(nn.Module):
    """From what was read to unit vectors and weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens = nn.Linear(width, width, bias=False)
        self.pooled = nn.Linear(width, width, bias=False)
        self.weight = nn.Linear(width, 1)
        nn.init.zeros_(self.weight.weight)
        nn.init.zeros_(self.weight.bias)

    def forward(self, read: Tensor, is_token: Tensor | None = None) -> Embedded:
        """(B, 1 + T, d), of which the first stands for all."""
        whole, tokens = read[:, 0], read[:, 1:]
        weights = self.weight(tokens)[..., 0].float()  # (B, T)
        if is_token is not None:
            weights = weights.masked_fill(~is_token, -torch.inf)
        return Embedded(
            F.normalize(self.tokens(tokens).float(), dim=-1),
            F.normalize(self.pooled(whole).float(), dim=-1),
            weights.softmax(-1),
        )


class Reader(nn.Module):
    """What images and texts have in common: contexts are scaled and brought to the width, and learned queries stand before them."""

    centre: Tensor
    """(D,) or (L, D)."""
    scale: Tensor
    """()."""

    def __init__(self, centre: Tensor, num_asked: int, width: int) -> None:
        super().__init__()
        self.register_buffer("centre", centre)
        self.register_buffer("scale", torch.ones(()))
        self.enter = nn.Linear(centre.shape[-1], width)
        self.asked = nn.Parameter(0.5 * torch.randn(num_asked, width))
        self.norm = nn.LayerNorm(width)

    @torch.no_grad()
    def set_range(self, c: Tensor) -> None:
        """Centre and scale after contexts, (N, L, D) of images or (N, D) of the tokens of texts."""
        self.centre.copy_(c.mean(0))
        self.scale.copy_(c.std())

    def entered(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Learned queries (B, K, d), and contexts at the width of the space, (B, L, d)."""
        return self.asked.expand(len(c), -1, -1), self.enter((c - self.centre) / self.scale)


class ImageReader(Reader):
    """M + 1 learned queries read the places of an image, then one another."""

    def __init__(self, text_width: int, num_places: int, num_tokens: int, width: int) -> None:
        super().__init__(torch.zeros(num_places, text_width), 1 + num_tokens, width)
        self.places = nn.Parameter(_SMALL * torch.randn(num_places, width))
        self.look, self.think = Layer(width), Layer(width)

    def forward(self, c: Tensor) -> Tensor:
        """(B, L, D) to (B, 1 + M, d)."""
        asked, places = self.entered(c)
        x = self.look(asked, places + self.places)
        read: Tensor = self.norm(self.think(x, x))
        return read


class TextReader(Reader):
    """The tokens of a text read one another, and one learned query reads all of them."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__(torch.zeros(text_width), 1, width)
        self.think = Layer(width)

    def forward(self, c: Tensor, is_token: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, 1 + T, d)."""
        x = torch.cat(self.entered(c), 1)
        if is_token is not None:
            is_token = F.pad(is_token, (1, 0), value=True)
        read: Tensor = self.norm(self.think(x, x, is_token))
        return read


class Layer(nn.Module):
    """A transformer layer that norms first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = next(n for n in (4, 2, 1) if width % n == 0)
        self.attention_norm, self.hidden_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.attended = nn.Linear(width, width)
        self.hidden, self.out = nn.Linear(width, _WIDER * width), nn.Linear(_WIDER * width, width)
        for linear in (self.attended, self.out):
            nn.init.normal_(linear.weight, std=_SMALL)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, given: Tensor, is_given: Tensor | None = None) -> Tensor:
        """(B, K, d) looks at (B, S, d), or at those of them that `is_given` (B, S) names."""
        B, K, d = x.shape
        normed = self.attention_norm(x)
        source = normed if given is x else self.attention_norm(given)
        query = self.query(normed).view(B, K, self.heads, -1).transpose(1, 2)  # (B, h, K, d / h)
        key, value = self.key_value(source).view(B, -1, 2, self.heads, d // self.heads).unbind(2)
        scores = query @ key.permute(0, 2, 3, 1) / math.sqrt(d // self.heads)  # (B, h, K, S)
        if is_given is not None:
            scores = scores.masked_fill(~is_given[:, None, None], -torch.inf)
        found = (
            (scores.softmax(-1).to(value.dtype) @ value.transpose(1, 2))
            .transpose(1, 2)
            .reshape(B, K, d)
        )
        x = x + self.attended(found)
        changed: Tensor = x + self.out(F.gelu(self.hidden(self.hidden_norm(x))))
        return changed
