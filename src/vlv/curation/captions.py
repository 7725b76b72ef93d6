"""How well captions explain their images, as a number for the rules; one copy of the model in each process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from PIL import Image

from vlv.models.pipeline import VLVPipeline

if TYPE_CHECKING:
    from vlv.curation.settings import CaptionRule


@lru_cache(maxsize=1)
def _judge(model: str, revision: str | None, device: str) -> VLVPipeline:
    """A model, loaded once in this process."""
    return VLVPipeline.from_pretrained(
        model, parts=["embed", "generate"], revision=revision, device=device
    )


def recovered_shares(
    rule: CaptionRule, images: Sequence[Image.Image], captions: Sequence[str]
) -> list[float]:
    """Recovered share of each caption, see `VLVPipeline.score`.

    Raises:
        ModelFolderError: There is no such model, or it lacks a part.
        ConfigError: The loss is not finite.
    """
    pipe = _judge(rule.model, rule.revision, rule.device)
    found = pipe.score(list(images), list(captions), timesteps=rule.timesteps, seed=rule.seed)
    return [scores.recovered[0] for scores in found]
