"""A model in bfloat16 does all that one in float32 does, and nearly the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional as F

from tests import tiny
from vlv.models.folder import MODELS, shipped_models
from vlv.models.pipeline import VLVPipeline

if TYPE_CHECKING:
    from pathlib import Path


def dtypes(module: Any) -> set[torch.dtype]:
    return {p.dtype for p in module.parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_weight_has_the_dtype(tiny_folder: Path, dtype: torch.dtype) -> None:
    pipe = VLVPipeline.from_pretrained(tiny_folder, dtype=dtype)
    for name in MODELS:
        assert dtypes(getattr(pipe, name)) == {torch.float32 if name == "vae" else dtype}, name


def test_rotary_frequencies_keep_their_precision(tiny_folder: Path) -> None:
    pipe = VLVPipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16, parts=["caption"])
    assert pipe.caption_decoder.llm.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.slow
def test_half_precision_agrees_with_single(tiny_folder: Path, pixels: torch.Tensor) -> None:
    images = list(pixels)
    half, full = (
        VLVPipeline.from_pretrained(tiny_folder, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    z = half.embed(images)
    assert z.shape == (3, tiny.NUM_QUERIES, tiny.TEXT_WIDTH)
    assert F.cosine_similarity(z.float(), full.embed(images), dim=-1).min() > 0.99
    assert all(isinstance(text, str) for text in half.caption(images, max_new_tokens=4))
    assert half.reconstruct(images, steps=2)[0].size == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    assert half.generate("A red cube.", steps=2).size == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    mixed = half.mix(images[:2], mode="slerp")
    assert isinstance(half.caption(z=mixed, max_new_tokens=4), str)


@pytest.mark.slow
@pytest.mark.skipif("vlv-tiny" not in shipped_models(), reason="the model is not shipped")
def test_the_shipped_model_in_half_precision(pixels: torch.Tensor) -> None:
    pipe = VLVPipeline.from_pretrained("vlv-tiny", dtype=torch.bfloat16)
    assert torch.isfinite(pipe.embed(pixels[0])).all()
    assert pipe.caption(pixels[0], max_new_tokens=8)
    assert pipe.reconstruct(pixels[0], steps=2).size == (64, 64)
