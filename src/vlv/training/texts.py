"""Which texts of the records a step of stage 2 learns from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vlv.data.texts import Text, TextMix, choose
from vlv.errors import DataError
from vlv.models.draws import mixed_seed
from vlv.models.instructions import count_words, with_length

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
    if not mix.lengths:
        return drawn
    return [
        _with_lengths(texts, mix.lengths, seed)
        for texts, seed in zip(drawn, row_seeds, strict=True)
    ]


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
    generator = torch.Generator().manual_seed(mixed_seed(seed, "lengths"))
    draws = torch.rand(len(texts), generator=generator).tolist()
    return [
        replace(text, instruction=with_length(text.instruction, count_words(text.answer)))
        if text.is_caption and draw < share
        else text
        for text, draw in zip(texts, draws, strict=True)
    ]


def _drawn(texts: list[tuple[Text, float]], count: int, seed: int) -> list[Text]:
    if len(texts) == 1:
        return [texts[0][0]] * count
    generator = torch.Generator().manual_seed(mixed_seed(seed, "texts"))
    return choose(texts, count, torch.rand(len(texts), generator=generator).tolist())
