"""No stage waits for the device: nothing reads a number out of a tensor, or a shape that depends on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.test_stages import generator, make_batch, stage1, stage2

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
}


class Waits(TorchDispatchMode):
    """Counts the operations that a GPU's host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_waits_are_seen() -> None:
    with Waits() as waits:
        torch.ones(()).item()
    assert len(waits.found) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: stage1(timesteps="text", draws_per_image=2),
        lambda: stage2(),
        lambda: stage2(denoising_weight=0.5),
        lambda: stage2(trainable="mlp"),
        lambda: stage2(frozen_encoder_steps=3),
    ],
    ids=["stage1", "stage2", "stage2-denoising", "stage2-mlp", "stage2-frozen"],
)
def test_no_stage_waits(make: Any, precision: str) -> None:
    objective, batch = make(), make_batch()
    with Waits() as waits, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        total = objective.loss(batch, generator()).total
    with waits:
        total.backward()
    assert waits.found == []


def test_every_part_attends_with_sdpa() -> None:
    objective = stage2(denoising_weight=0.5)
    encoder, decoder = objective.encoder, objective.decoder
    parts = {
        "DaViT": encoder.backbone.model.vision_tower.config,
        "BART": encoder.backbone.model.language_model.config,
        "CLIP": decoder.text_encoder.config,
        "LLM": objective.caption_decoder.llm.config,
    }
    assert {name: config._attn_implementation for name, config in parts.items()} == dict.fromkeys(
        parts, "sdpa"
    )
    for part in (decoder.unet, decoder.vae):
        kinds = {
            type(module.processor).__name__
            for module in part.modules()
            if hasattr(module, "processor")
        }
        assert kinds == {"AttnProcessor2_0"}
