"""Every encoder with every diffusion decoder, and each of both with nearly every language model: train, rebuild, caption."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests import tiny
from tests.models import families, test_llm_families, test_vision_encoder
from vlv.config import Stage2Config
from vlv.models import two_towers
from vlv.models.captioner import CaptionDecoder
from vlv.models.encoder import VLVEncoder
from vlv.models.pipeline import VLVPipeline
from vlv.models.vision_encoder import VisionEncoder
from vlv.training.stages import Stage2

if TYPE_CHECKING:
    from vlv.models.diffusion import DiffusionDecoder

ENCODERS = ["florence", *test_vision_encoder.FAMILIES]
LLMS = list(test_llm_families.FAMILIES)
COMBINATIONS = [
    (encoder, decoder, LLMS[(row + column) % len(LLMS)])
    for row, encoder in enumerate(ENCODERS)
    for column, decoder in enumerate(families.NAMES)
]
STEPS = 6


def make_encoder(name: str, decoder: DiffusionDecoder) -> VLVEncoder | VisionEncoder:
    settings: Any = {
        "num_queries": tiny.NUM_QUERIES,
        "text_width": decoder.text_width,
        "image_size": tiny.IMAGE_SIZE,
        "seed": 5,
    }
    if name == "florence":
        florence, tokenizer = tiny.make_florence(), tiny.make_florence_tokenizer()
        return VLVEncoder.from_florence(florence, tokenizer, **settings)
    return VisionEncoder.from_backbone(
        test_vision_encoder.backbone(name),
        **settings,
        image_mean=[0.5] * 3,
        image_std=[0.3] * 3,
        num_layers=1,
    )


@cache
def frozen_decoder(name: str) -> DiffusionDecoder:
    """Shared by the encoders: nothing of it is trained."""
    decoder = families.make_decoder(name)
    families.sharpen(decoder)
    return decoder


def components_of(decoder: DiffusionDecoder) -> dict[str, Any]:
    names = (*decoder.components, *decoder.optional)
    return {name: getattr(decoder, name) for name in names}


def test_nearly_each_pair_is_there() -> None:
    assert {(a, b) for a, b, _ in COMBINATIONS} == {
        (a, b) for a in ENCODERS for b in families.NAMES
    }
    for part in (*ENCODERS, *families.NAMES):
        assert len({llm for *others, llm in COMBINATIONS if part in others}) >= len(LLMS) - 2


@pytest.mark.slow
@pytest.mark.parametrize(("encoder_name", "decoder_name", "llm"), COMBINATIONS)
def test_it_learns_rebuilds_and_captions(
    encoder_name: str, decoder_name: str, llm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two_towers, "T5_LENGTH", families.T5_LENGTH)
    decoder = frozen_decoder(decoder_name)
    encoder = make_encoder(encoder_name, decoder)
    captions = CaptionDecoder.from_llm(
        test_llm_families.make_llm(llm),
        tiny.make_llm_tokenizer(),
        text_width=decoder.text_width,
        seed=0,
    )
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    stage = Stage2(encoder, decoder, captions, Stage2Config(denoising_weight=1.0))
    optimizer = torch.optim.AdamW([p for p in stage.module.parameters() if p.requires_grad], 3e-3)
    losses = []
    for step in range(STEPS):
        batch = {"ids": ["a", "b"], "pixels": pixels, "captions": ["A cube", "Two"], "step": step}
        loss = stage.loss(batch, torch.Generator().manual_seed(2))
        parts = (loss.total, loss.parts["caption"], loss.parts["denoising"])
        losses.append([value.item() for value in parts])
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1][0] < losses[0][0]
    for part in (list(column) for column in zip(*losses, strict=True)):
        assert min(part[1:]) < part[0], "each loss falls, though not in every step"
    pipe = VLVPipeline(encoder=encoder, caption_decoder=captions, **components_of(decoder))
    assert [x.size for x in pipe.reconstruct(pixels, steps=1, guidance=1.0)] == [(32, 32)] * 2
    assert len(pipe.describe(pixels, max_new_tokens=3)) == 2
