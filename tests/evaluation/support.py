"""A miniature inspector, and models whose captions and pictures are known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from tests import tiny
from vlv.evaluation.sections import Experiment
from vlv.evaluation.study import Settings, Study
from vlv.models.context import Context
from vlv.models.decoding import Caption
from vlv.models.diffusion import TextContext
from vlv.models.folder import COMPONENTS
from vlv.toyworld.inspector import Inspector, InspectorConfig

if TYPE_CHECKING:
    from pathlib import Path

    from vlv.evaluation.scenes import World


def make_inspector(seed: int = 0) -> Inspector:
    """An untrained inspector of width 16 that sees other things in other pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inspector = Inspector(InspectorConfig(channels=(8, 16, 16), heads=2))
    with torch.no_grad():
        for head in (inspector.scene_head, inspector.object_head):
            head.weight.mul_(100)
        inspector.object_head.bias[1] = 1000  # it always sees three objects
    return cast("Inspector", inspector.eval())


class KnownModel:
    """Writes the given captions, and draws the true render of every scene."""

    image_size = 64
    device = torch.device("cpu")

    def __init__(self, world: World, captions: Sequence[str], *, finished: bool = True) -> None:
        self.world, self.finished, self.written = world, finished, list(captions)
        self.decoder = self
        for name in COMPONENTS:
            setattr(self, name, self)

    def describe(self, images: list[Tensor], **settings: Any) -> list[Caption]:
        batch, self.written = self.written[: len(images)], self.written[len(images) :]
        return [Caption(text, len(text.split()), self.finished) for text in batch]

    def embed(self, images: list[Tensor], **settings: Any) -> Tensor:
        return torch.zeros(len(images), 8, 4)

    def context(self, z: Tensor) -> Context:
        return Context(z)

    def encode_text(self, texts: Sequence[str]) -> TextContext:
        return TextContext(Context(torch.zeros(len(texts), 8, 4)), 0)

    def null_context(self, batch_size: int = 1) -> Context:
        return Context(torch.zeros(batch_size, 8, 4))

    def sample(self, c: Context, *, seeds: Sequence[int], **settings: Any) -> Tensor:
        rows = [self.world.seeds.index(seed) for seed in seeds]
        return self.world.pixels[rows].float() / 255


def experiment(world: World, captions: Sequence[str], inspector: Inspector) -> Experiment:
    """The known model on a world."""
    settings = Settings(seed=0, batch_size=4)
    model = cast("Any", KnownModel(world, captions))
    study = Study(model, inspector, world, settings)
    study.truncated = lambda texts: np.zeros(len(texts), np.bool_)  # type: ignore[method-assign]
    return Experiment(study, None, None, lambda world: Study(model, inspector, world, settings))


def save_clip(folder: Path) -> Path:
    """A CLIP with 16 text positions, whose end token is the tokenizer's."""
    tokenizer = tiny.make_clip_tokenizer()
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    text: dict[str, Any] = {
        **small, "vocab_size": len(tokenizer), "max_position_embeddings": tiny.TEXT_POSITIONS,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {**small, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder
