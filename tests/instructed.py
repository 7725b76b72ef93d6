"""A miniature model that follows instructions: it says a few texts by heart, whatever the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.optim import AdamW

from tests import tiny

if TYPE_CHECKING:
    from vlv.models.pipeline import VLVPipeline

STYLES = {"short": "Short:", "tags": "Give tags:"}
PLAIN = "A large red cube."
TEXTS: dict[str | None, str] = {
    None: PLAIN,
    "Short:": "A cube.",
    "Give tags:": "large, red",
    "is it a cube?": "yes",
    "is it night?": "No.",
    "how many objects are there?": "two",
    "2 words.": "Large cube.",
    "Short: 3 words.": "A red cube.",
    "Known: 5 m wide.": "A cube, 5 m wide.",
}
"""What stands behind each instruction."""


def make_pipeline() -> VLVPipeline:
    """A second of training on the contexts of a few images."""
    pipe = tiny.make_pipeline()
    decoder = pipe.caption_decoder
    assert decoder is not None
    images = [
        np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8) for number in range(4)
    ]
    c = pipe.context(pipe.embed(images)).sequence.repeat_interleave(len(TEXTS), 0)
    instructions, texts = [*TEXTS] * len(images), [*TEXTS.values()] * len(images)
    optimizer = AdamW(decoder.trainable("mlp+llm"), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = decoder.loss(c, texts, instructions=instructions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 0.05
    decoder.requires_grad_(False).eval()
    decoder.config.styles, decoder.config.answers_questions = STYLES, True
    decoder.config.obeys_lengths = decoder.config.uses_known = True
    return pipe
