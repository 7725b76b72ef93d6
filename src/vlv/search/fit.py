"""Fit a search space to a model, from images with captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vlv.errors import DataError
from vlv.jobs.inputs import check_embeddings, embeddings, good_items, open_batches
from vlv.models.placement import at_work
from vlv.models.scoring import SENTENCE_END
from vlv.search.space import read_texts
from vlv.training.search_space import FitPlan, Pairs, fit_search_space

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from vlv.data.records import Record
    from vlv.jobs.inputs import Opened
    from vlv.models.pipeline import VLVPipeline
    from vlv.models.search_space import FittedSpace

    Report = Callable[[Sequence[Opened]], None]

_TEXTS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Captioned:
    """Contexts of images, and in words what they show."""

    c: Tensor
    """(N, L, D) in half precision."""
    texts: Sequence[Sequence[str]]
    """Of each image, in one order of kinds."""
    variants: Tensor | None = None
    """(N, L, D): the same content in another form."""
    num_variants: int = 0
    """How many of them are not the image itself."""


def fit_space(
    pipe: VLVPipeline,
    captioned: Captioned,
    plan: FitPlan,
    report: Callable[[float], None] = lambda loss: None,
) -> FittedSpace:
    """Fit a space to pairs.

    Args:
        pipe: The model whose contexts these are.
        captioned: Images and their texts; at each step one text of each image is drawn.
        plan: How long and how fast.
        report: Receives the loss of each step.

    Raises:
        DataError: There are too few pairs.
    """
    flat = [text for some in captioned.texts for text in some]
    contexts: list[Tensor] = []
    with at_work(pipe, *pipe.decoder.towers):
        for start in range(0, len(flat), _TEXTS_AT_ONCE):
            some = read_texts(pipe, flat[start : start + _TEXTS_AT_ONCE])
            contexts += [context.cpu().half() for context in some]
    rest = iter(contexts)
    grouped = [[next(rest) for _ in some] for some in captioned.texts]
    return fit_search_space(Pairs(captioned.c, grouped, captioned.variants), plan, report)


def read_pairs(
    pipe: VLVPipeline,
    records: Sequence[Record],
    variants: Sequence[Record] = (),
    *,
    batch_size: int = 16,
    report: Report = lambda batch: None,
) -> Captioned:
    """Embed images and read of each its caption and the caption's sentences: people search for less than all.

    Args:
        pipe: The model.
        records: The images.
        variants: Images that show the same under the same ids; an image without one stands for itself.
        batch_size: Images embedded together.
        report: Receives each batch of either, good and bad.

    Raises:
        DataError: None of the images has a caption, or none of the variants the id of one.
    """
    captioned = [record for record in records if record.caption and record.caption.strip()]
    if not captioned:
        raise DataError(
            "none of the images has a caption; a space is fitted to images with captions"
        )
    ids = {record.id for record in captioned}
    paired = [record for record in variants if record.id in ids]
    if variants and not paired:
        raise DataError(
            f"none of the variants has the id of an image, such as {captioned[0].id!r}; "
            f"the first is {variants[0].id!r}"
        )
    texts: list[list[str]] = []
    found: dict[str, Tensor] = {}
    for record, c in _contexts(pipe, captioned, batch_size, report):
        found[record.id] = c
        texts.append(texts_of(record.caption or ""))
    images = torch.stack([*found.values()]) if found else torch.empty(0)
    if not paired:
        return Captioned(images, texts)
    others = {record.id: c for record, c in _contexts(pipe, paired, batch_size, report)}
    rows = [others.get(name, c) for name, c in found.items()]
    together = torch.stack(rows) if rows else torch.empty(0)
    return Captioned(images, texts, together, len(others.keys() & found.keys()))


def _contexts(
    pipe: VLVPipeline, records: Sequence[Record], batch_size: int, report: Report
) -> list[tuple[Record, Tensor]]:
    """The images that can be read, each with its context (L, D) in half precision."""
    check_embeddings(pipe, records)
    found: list[tuple[Record, Tensor]] = []
    for batch in open_batches(records, batch_size, pipe.image_size, pipe.framing):
        if items := good_items(batch):
            c = pipe.context(embeddings(pipe, items)).sequence.cpu().half()
            found += zip([item.record for item in items], c, strict=True)
        report(batch)
    return found


def texts_of(caption: str) -> list[str]:
    """What of a caption may be searched for.

    >>> texts_of("A red cube. It is small.")
    ['A red cube. It is small.', 'A red cube.', 'It is small.']
    """
    sentences = SENTENCE_END.split(caption.strip())
    return list(dict.fromkeys([caption, *sentences]))
