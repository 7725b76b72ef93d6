"""Which texts of the records a step of stage 2 learns from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vlv.data.texts import Text, TextMix, choose, known_of
from vlv.errors import DataError
from vlv.models.draws import mixed_seed
from vlv.models.instructions import count_words, with_known, with_length

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlv.config import Stage2Config
    from vlv.training.objective import Batch


def text_mix(config: Stage2Config) -> TextMix:
    """What the settings of stage 2 want to be taught."""
    asked = {name: f"Style: {name}." for name in config.style_weights}
    return TextMix(
        config.caption_weight,
        config.style_weights,
        asked | config.style_instructions,
        config.question_weight,
        config.length_share,
        config.context_column,
        config.context_share if config.context_column else 0.0,
    )


def draw_texts(
    batch: Batch, mix: TextMix, count: int, row_seeds: Sequence[int]
) -> list[list[Text]]:
    """Some texts of each record of a batch, drawn by the mix.

    Args:
        batch: With `ids`, `captions` and `meta`; where there is no metadata, plain captions are all that there is.
        mix: What is wanted.
        count: Texts of each.
        row_seeds: A seed for each row; its texts depend on nothing else.

    Raises:
        DataError: A record has none.
    """
    if mix.is_plain or "meta" not in batch:
        drawn = [[Text(None, text, is_caption=True)] * count for text in captions_of(batch)]
    else:
        rows = zip(batch["ids"], batch["captions"], batch["meta"], row_seeds, strict=True)
        drawn = [_drawn(mix.of(id, caption, meta), count, seed) for id, caption, meta, seed in rows]
    if mix.lengths:
        pairs = zip(drawn, row_seeds, strict=True)
        drawn = [_with_lengths(texts, mix.lengths, seed) for texts, seed in pairs]
    if mix.known_column is not None and "meta" in batch:
        known = [
            known_of(id, (meta or {}).get(mix.known_column))
            for id, meta in zip(batch["ids"], batch["meta"], strict=True)
        ]
        several = zip(drawn, known, row_seeds, strict=True)
        drawn = [_with_known(texts, fact, mix.known, seed) for texts, fact, seed in several]
    return drawn


def captions_of(batch: Batch) -> list[str]:
    """The captions of a batch.

    Raises:
        DataError: A record has none.
    """
    for record, caption in zip(batch["ids"], batch["captions"], strict=True):
        if not caption:
            raise DataError(f"{record} has no caption, but stage 2 needs one for every image")
    return list(batch["captions"])


def _with_lengths(texts: list[Text], share: float, seed: int) -> list[Text]:
    """Texts, of which a share of the captions is asked for by the length that it has."""
    return [
        replace(text, instruction=with_length(text.instruction, count_words(text.answer)))
        if is_chosen
        else text
        for text, is_chosen in zip(
            texts, _captions_among(texts, share, seed, "lengths"), strict=True
        )
    ]


def _with_known(texts: list[Text], known: str | None, share: float, seed: int) -> list[Text]:
    """Texts, of which a share of the captions is told what is known about the image."""
    if known is None:
        return texts
    return [
        replace(text, instruction=with_known(text.instruction, known)) if is_chosen else text
        for text, is_chosen in zip(texts, _captions_among(texts, share, seed, "known"), strict=True)
    ]


def _captions_among(texts: list[Text], share: float, seed: int, purpose: str) -> list[bool]:
    """A share of the captions, drawn."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, purpose))
    draws = torch.rand(len(texts), generator=generator).tolist()
    return [text.is_caption and draw < share for text, draw in zip(texts, draws, strict=True)]


def _drawn(texts: list[tuple[Text, float]], count: int, seed: int) -> list[Text]:
    if len(texts) == 1:
        return [texts[0][0]] * count
    generator = torch.Generator().manual_seed(mixed_seed(seed, "texts"))
    return choose(texts, count, torch.rand(len(texts), generator=generator).tolist())
