"""How many tokens a caption has for the models that read and write it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vlv.models.pipeline import VLVPipeline


@dataclass(frozen=True)
class Count:
    """Tokens of a caption.

    Attributes:
        name: Of the tokenizer.
        tokens: How many, with those that mark begin and end.
        limit: How many its model reads; None where it has no fixed limit.
    """

    name: str
    tokens: int
    limit: int | None = None

    @property
    def is_over(self) -> bool:
        """Whether some are cut off."""
        return self.limit is not None and self.tokens > self.limit


def count_tokens(pipe: VLVPipeline, caption: str) -> list[Count]:
    """Tokens for the text towers of the diffusion decoder, and for the language model that writes captions."""
    counts = []
    if pipe.text_encoder is not None and pipe.tokenizer is not None:
        counts.append(Count("CLIP", _length(pipe.tokenizer, caption), pipe.decoder.num_positions))
    t5 = getattr(pipe, "tokenizer_3", None)
    if t5 is not None:
        counts.append(Count("T5", _length(t5, caption)))
    if pipe.caption_decoder is not None:
        own = len(pipe.caption_decoder.tokenizer(caption, add_special_tokens=False).input_ids)
        counts.append(Count("captioner", own))
    return counts


def _length(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, verbose=False).input_ids)
