"""Tidying captions of models that never learned to end them."""

from __future__ import annotations

import re

_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+")


def tidy_caption(text: str) -> str:
    """Cut a caption after its last period and drop sentences that stood there before.

    The VLV authors' post-processing: their language model is not taught an end token and goes on,
    repeating itself, until it is stopped. A caption without a period stays as it is.

    >>> tidy_caption("A cat. A dog. A cat. An unfinished sen")
    'A cat. A dog.'
    """
    head, period, _ = text.rpartition(".")
    sentences = _BETWEEN_SENTENCES.split((head + period or text).strip())
    return " ".join(dict.fromkeys(sentences))
