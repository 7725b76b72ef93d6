"""Fit a search space to a model, from images with captions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vlv.errors import DataError
from vlv.jobs.inputs import check_embeddings, embeddings, good_items, open_batches
from vlv.models.placement import at_work
from vlv.models.scoring import SENTENCE_END
from vlv.models.search_space import Space
from vlv.search.space import read_texts
from vlv.training.projection import FitPlan, fit_projection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from vlv.data.records import Record
    from vlv.jobs.inputs import Opened
    from vlv.models.pipeline import VLVPipeline

_TEXTS_AT_ONCE = 64


def fit_space(
    pipe: VLVPipeline,
    c: Tensor,
    texts: Sequence[Sequence[str]],
    plan: FitPlan,
    report: Callable[[float], None] = lambda loss: None,
) -> Space:
    """Fit a space to pairs.

    Args:
        pipe: The model whose contexts these are.
        c: Contexts of images, (N, L, D), in any precision.
        texts: Of each image; at each step one of them is drawn.
        plan: How long and how fast.
        report: Receives the loss of each step.

    Raises:
        DataError: There are too few pairs.
    """
    flat = [text for some in texts for text in some]
    contexts: list[Tensor] = []
    with at_work(pipe, *pipe.decoder.towers):
        for start in range(0, len(flat), _TEXTS_AT_ONCE):
            some = read_texts(pipe, flat[start : start + _TEXTS_AT_ONCE])
            contexts += [context.cpu().half() for context in some]
    rest = iter(contexts)
    grouped = [[next(rest) for _ in some] for some in texts]
    return fit_projection(c, grouped, plan, report)


def read_pairs(
    pipe: VLVPipeline,
    records: Sequence[Record],
    *,
    batch_size: int = 16,
    report: Callable[[Sequence[Opened]], None] = lambda batch: None,
) -> tuple[Tensor, list[list[str]]]:
    """Contexts (N, L, D) of images in half precision, and of each its caption and the caption's sentences: people search for less than all.

    Raises:
        DataError: None of the images has a caption.
    """
    captioned = [record for record in records if record.caption and record.caption.strip()]
    if not captioned:
        raise DataError(
            "none of the images has a caption; a space is fitted to images with captions"
        )
    check_embeddings(pipe, captioned)
    found: list[Tensor] = []
    texts: list[list[str]] = []
    for batch in open_batches(captioned, batch_size, pipe.image_size, pipe.framing):
        if items := good_items(batch):
            found.append(pipe.context(embeddings(pipe, items)).sequence.cpu().half())
            texts += [texts_of(item.record.caption or "") for item in items]
        report(batch)
    return torch.cat(found) if found else torch.empty(0), texts


def texts_of(caption: str) -> list[str]:
    """What of a caption may be searched for.

    >>> texts_of("A red cube. It is small.")
    ['A red cube. It is small.', 'A red cube.', 'It is small.']
    """
    sentences = SENTENCE_END.split(caption.strip())
    return list(dict.fromkeys([caption, *sentences]))
