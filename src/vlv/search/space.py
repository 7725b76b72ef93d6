"""Tokens of contexts of texts, and how alike two sets of tokens are.

Shapes: T tokens of a query, L tokens of an image, d width of the search space, K candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlv.models.arguments import present
from vlv.models.placement import at_work
from vlv.models.search_space import PlainSpace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlv.models.pipeline import VLVPipeline
    from vlv.models.search_net import Embedded


def plain_space(pipe: VLVPipeline) -> PlainSpace:
    """The space of a model to which none was fitted: contexts as they are, without what the empty text has in common with all."""
    with at_work(pipe, *pipe.decoder.towers):
        centre = pipe.decoder.null_context().sequence[0].mean(0).cpu().float()
    return PlainSpace(centre, torch.eye(len(centre)))


def read_texts(pipe: VLVPipeline, texts: Sequence[str]) -> list[Tensor]:
    """Contexts of texts, (T, D) each: the tokens of the text and its end, without the start and the padding."""
    tokenizer, decoder = present(pipe.tokenizer, "tokenizer"), pipe.decoder
    with at_work(pipe, *decoder.towers):
        c = decoder.encode_text(list(texts)).c.sequence
    ids = tokenizer(list(texts), truncation=True, max_length=decoder.num_positions).input_ids
    return [row[1 : max(2, len(found))] for row, found in zip(c, ids, strict=True)]


def max_sim(query: Embedded, images: Tensor) -> Tensor:
    """Late interaction (Khattab and Zaharia 2020): each token of the query is held against its nearest token of the image.

    Args:
        query: Tokens (T, d) and their weights (T,).
        images: (K, L, d).

    Returns:
        The weighted mean cosine over the tokens, (K,), from -1 to 1.
    """
    K, L, d = images.shape
    cosines = images.reshape(K * L, d) @ query.tokens.T
    return cosines.view(K, L, -1).amax(1) @ query.weights


def alikeness(tokens: Tensor, images: Tensor) -> Tensor:
    """The same of an image (L, d) and others (K, L, d) in both directions, every token weighing the same: (K,)."""
    K, L, d = images.shape
    cosines = (images.reshape(K * L, d) @ tokens.T).view(K, L, len(tokens))
    return (cosines.amax(1).mean(-1) + cosines.amax(2).mean(-1)) / 2
