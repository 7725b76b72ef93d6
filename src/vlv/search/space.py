"""Tokens of contexts of texts, and how alike two sets of tokens are.

Shapes: T tokens of a query, L tokens of an image, d width of the search space, K candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlv.models.arguments import present
from vlv.models.placement import at_work
from vlv.models.search_space import Space

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlv.models.pipeline import VLVPipeline


def plain_space(pipe: VLVPipeline) -> Space:
    """The space of a model to which none was fitted: contexts as they are, without what the empty text has in common with all."""
    with at_work(pipe, *pipe.decoder.towers):
        centre = pipe.decoder.null_context().sequence[0].mean(0).cpu().float()
    same = torch.eye(len(centre))
    return Space(centre, same, centre, same, same, same)


def read_texts(pipe: VLVPipeline, texts: Sequence[str]) -> list[Tensor]:
    """Contexts of texts, (T, D) each: the tokens of the text and its end, without the start and the padding."""
    tokenizer, decoder = present(pipe.tokenizer, "tokenizer"), pipe.decoder
    with at_work(pipe, *decoder.towers):
        c = decoder.encode_text(list(texts)).c.sequence
    ids = tokenizer(list(texts), truncation=True, max_length=decoder.num_positions).input_ids
    return [row[1 : max(2, len(found))] for row, found in zip(c, ids, strict=True)]


def max_sim(query: Tensor, images: Tensor, *, both_ways: bool = False) -> Tensor:
    """Late interaction (Khattab and Zaharia 2020): each token of the query is held against its nearest token of the image.

    Args:
        query: (T, d).
        images: (K, L, d).
        both_ways: Add what the image's tokens find in the query, for queries that are images themselves.

    Returns:
        The mean cosine over the tokens, (K,), from -1 to 1.
    """
    K, L, d = images.shape
    cosines = (query @ images.reshape(K * L, d).T).view(len(query), K, L)
    found = cosines.amax(-1).mean(0)
    return (found + cosines.amax(0).mean(-1)) / 2 if both_ways else found
