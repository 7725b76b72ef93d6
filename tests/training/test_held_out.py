from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.training.test_stages import generator, make_batch, stage2
from vlv.models.context import Context
from vlv.training.held_out import (
    DenoisingGap,
    DenoisingMeter,
    HeldOutLoss,
    denoising_gap,
    fixed_denoising_loss,
)


def test_share_of_the_way() -> None:
    assert DenoisingGap(from_z=0.2, null=0.2, true=0.1).share == 0
    assert DenoisingGap(from_z=0.1, null=0.2, true=0.1).share == 1
    assert DenoisingGap(from_z=0.125, null=0.2, true=0.1).share == pytest.approx(0.75)
    assert DenoisingGap(0.125, 0.2, 0.1).metrics()["share_null_to_true"] == pytest.approx(0.75)


def test_fixed_loss_does_not_depend_on_the_batches() -> None:
    decoder = tiny.make_decoder()
    latents = torch.randn(5, *tiny.LATENT_SHAPE, generator=generator(1))
    c = Context(torch.randn(5, tiny.NUM_QUERIES, tiny.TEXT_WIDTH, generator=generator(2)))
    whole = fixed_denoising_loss(decoder, latents, c, range(5))
    assert fixed_denoising_loss(decoder, latents, c, range(5), batch_size=2) == pytest.approx(whole)
    parts = [fixed_denoising_loss(decoder, latents[i : i + 1], c[i : i + 1], [i]) for i in range(5)]
    assert sum(parts) / 5 == pytest.approx(whole, rel=1e-5)
    assert fixed_denoising_loss(decoder, latents, c, range(1, 6)) != pytest.approx(whole)


def test_the_same_context_gives_the_same_loss() -> None:
    decoder = tiny.make_decoder()
    latents = torch.randn(3, *tiny.LATENT_SHAPE, generator=generator(1))
    texts = decoder.encode_text(["a red cube", "a cone", "two spheres"]).c
    gap = denoising_gap(decoder, latents, texts, texts, range(3))
    assert gap.from_z == gap.true
    null = decoder.null_context(3)
    gap = denoising_gap(decoder, latents, null, texts, range(3))
    assert gap.from_z == pytest.approx(gap.null)


def test_meter_equals_the_function_and_repeats_itself() -> None:
    encoder, decoder, batch = tiny.make_encoder(), tiny.make_decoder(), make_batch()
    meter = DenoisingMeter(encoder, decoder, batch["pixels"], batch["captions"], batch_size=1)
    with torch.no_grad():
        c = decoder.context(encoder(batch["pixels"]))
    true_c = decoder.encode_text(batch["captions"]).c
    gap = denoising_gap(decoder, decoder.encode(batch["pixels"]), c, true_c, range(2))
    assert meter(0) == pytest.approx(gap.metrics(), rel=1e-4)
    assert meter(1) == meter(2)


def test_held_out_loss_uses_the_same_draws_each_time() -> None:
    objective = stage2(denoising_weight=1.0)
    objective.module.eval()
    held_out = HeldOutLoss(objective, [make_batch(), make_batch()])
    values = held_out(1)
    assert values == held_out(2)
    assert values.keys() == {"held_out_loss", "held_out_caption", "held_out_denoising"}
    total = values["held_out_caption"] + values["held_out_denoising"]
    assert values["held_out_loss"] == pytest.approx(total)
