"""FLOPs of a step, against the arithmetic done by hand and at real sizes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.training.test_stages import make_batch, stage1, stage2
from vlv.config import load_config, load_models
from vlv.models.architectures import outline
from vlv.training import prediction
from vlv.training.objective import Losses
from vlv.training.prediction import FlopMeter, fake_copy, flops_per_image, peak_flops
from vlv.training.stages import Stage1, Stage2

LATE = 10**6
"""A step behind every phase in which a part is frozen."""


class TwoLayers:
    """3 positions of width 4, frozen to width 5, trained to width 6."""

    def __init__(self) -> None:
        self.frozen, self.trained = nn.Linear(4, 5), nn.Linear(5, 6)
        self.frozen.requires_grad_(False)
        self.module: nn.Module = nn.ModuleList([self.frozen, self.trained])

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Losses:
        del generator
        return Losses(self.trained(self.frozen(batch["x"])).square().mean())


def test_flops_are_those_of_the_needed_products() -> None:
    batch = {"x": torch.zeros(7, 3, 4), "step": 0}
    forward, weight_gradient = 2 * 3 * (4 * 5 + 5 * 6), 2 * 3 * 5 * 6
    assert flops_per_image(TwoLayers(), batch) == forward + weight_gradient


class Counted(NamedTuple):
    """An objective whose FLOPs were counted, its weights before, and the count."""

    objective: Stage1
    weights: list[torch.Tensor]
    flops: int


@pytest.fixture(scope="module")
def counted() -> Counted:
    objective = stage1()
    before = [p.detach().clone() for p in objective.module.parameters()]
    return Counted(objective, before, flops_per_image(objective, make_batch()))


def test_the_count_leaves_the_objective_alone(counted: Counted) -> None:
    assert counted.flops > 0
    for was, parameter in zip(counted.weights, counted.objective.module.parameters(), strict=True):
        assert torch.equal(was, parameter)
        assert parameter.grad is None


@pytest.mark.slow
def test_cached_latents_save_the_vae_and_nothing_else(counted: Counted) -> None:
    objective, batch = stage1(), make_batch()
    posterior = objective.decoder.posterior(batch["pixels"])
    cached = {"latents_mean": posterior.mean, "latents_std": posterior.std}
    saved = counted.flops - flops_per_image(objective, batch | cached)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective.decoder.posterior(batch["pixels"][:1])
    assert saved == counter.get_total_flops()


@pytest.mark.slow
def test_recomputation_does_not_count(counted: Counted) -> None:
    objective = stage1()
    objective.decoder.unet.enable_gradient_checkpointing()
    objective.decoder.unet.train()
    assert flops_per_image(objective, make_batch()) == counted.flops


@pytest.mark.slow
def test_each_phase_has_its_own_count() -> None:
    meter = FlopMeter(stage2(trainable="mlp+llm+encoder", frozen_encoder_steps=3))
    frozen, late = (meter.per_image(make_batch(step=step)) for step in (0, 3))
    assert frozen is not None
    assert late is not None
    assert frozen < late
    assert meter.per_image(make_batch(step=2, captions=["other", "words"])) == frozen


def test_what_cannot_be_counted_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class ByHand(TwoLayers):
        def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Losses:
            raise RuntimeError("needs numbers")

    meter = FlopMeter(ByHand())
    batch = {"x": torch.zeros(7, 3, 4), "step": 0}
    assert [meter.per_image(batch) for _ in range(2)] == [None, None]
    assert caplog.text.count("needs numbers") == 1


def test_peak_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(
        prediction.torch.cuda, "get_device_name", lambda _: "NVIDIA RTX 6000 Ada Generation"
    )
    assert peak_flops(cuda) == 364.2e12
    assert peak_flops(cuda, precision="fp32") == 91.1e12
    assert peak_flops(cuda, precision="fp32", tf32=True) == 182.1e12
    assert peak_flops(cuda, 790, precision="fp32") == 790e12
    assert peak_flops(torch.device("cpu")) is None
    monkeypatch.setattr(prediction.torch.cuda, "get_device_name", lambda _: "Unknown accelerator")
    assert peak_flops(cuda) is None


class Words:
    """A tokenizer that makes one token of every letter."""

    eos_token_id = 0

    def __call__(self, texts: list[str], **_: Any) -> Any:
        return SimpleNamespace(input_ids=[[1] * len(text) for text in texts])


# GFLOPs worked out part by part from the published configurations, with a prompt of 12 tokens.
@pytest.mark.slow
def test_stage1_at_real_size() -> None:
    drawn = outline(load_models("paper", ["model.input_size=384"]).model, 512)
    drawn.encoder.config.prompt_ids = [0] * 12
    settings = load_config("paper-stage1").stage1
    assert settings is not None
    objective = Stage1(drawn.encoder, drawn.decoder, settings)
    batch = {"pixels": torch.zeros(1, 3, 384, 384, dtype=torch.uint8), "step": LATE}
    whole = flops_per_image(objective, batch)
    assert math.isclose(whole / 1e9, 2201, rel_tol=1e-3)
    copied, mode = fake_copy(objective)
    with mode, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        copied.decoder.posterior(torch.zeros(1, 3, 384, 384, dtype=torch.uint8))
    saved = counter.get_total_flops()  # by cached latents, as is tested above
    assert math.isclose((whole - saved) / 1e9, 1582, rel_tol=1e-3)


@pytest.mark.slow
def test_stage2_at_real_size() -> None:
    """77 + 170 positions of the 3B model; the last token of a caption is never read, so it has 171."""
    drawn = outline(load_models("paper", ["model.input_size=384"]).model, 512)
    drawn.encoder.config.prompt_ids = [0] * 12
    drawn.caption_decoder.tokenizer = Words()
    drawn.decoder.unet = drawn.decoder.vae = None
    settings = load_config("paper-stage2").stage2
    assert settings is not None
    objective = Stage2(drawn.encoder, drawn.decoder, drawn.caption_decoder, settings)
    batch = {
        "ids": ["a"],
        "pixels": torch.zeros(1, 3, 384, 384, dtype=torch.uint8),
        "captions": ["x" * 170],
        "step": LATE,
    }
    assert math.isclose(flops_per_image(objective, batch) / 1e9, 5203, rel_tol=1e-3)
