"""Training in bfloat16: what trains has float32 master weights, what is frozen lies in bfloat16, the VAE in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests import tiny
from tests.training.test_stages import make_batch, train
from vlv.config import Stage1Config, Stage2Config, parse_run
from vlv.training.assemble import Parts, prepare

if TYPE_CHECKING:
    from pathlib import Path

    from vlv.training.objective import Objective


def assembled(
    stage: str, precision: str, *, vae: str = "fp32", **settings: Any
) -> tuple[Parts, Objective]:
    first = stage == "stage1"
    config = parse_run(
        {
            "stage": stage,
            "model": {"decoder": "d", "florence": "f"} | ({} if first else {"llm": "l"}),
            "data": {"inputs": ["i"], "image_size": tiny.IMAGE_SIZE},
            "optim": {"lr": 1e-3},
            "loop": {"steps": 2, "batch_size": 2, "precision": precision, "vae_precision": vae},
            stage: (Stage1Config if first else Stage2Config)(**settings),
        }
    )
    last = None if first else tiny.make_caption_decoder()
    parts = Parts(tiny.make_encoder(), tiny.make_decoder(), last)
    return parts, prepare(config, parts, torch.device("cpu"))


CASES = [("stage1", {}), ("stage2", {"denoising_weight": 0.5}), ("stage2", {"trainable": "mlp"})]


@pytest.mark.parametrize(("stage", "settings"), CASES)
def test_frozen_parts_lie_in_half_precision(stage: str, settings: dict[str, Any]) -> None:
    parts, objective = assembled(stage, "bf16", **settings)
    vae = {id(p) for p in parts.decoder.vae.parameters()}
    for name, parameter in objective.module.named_parameters():
        full = parameter.requires_grad or id(parameter) in vae
        assert parameter.dtype == (torch.float32 if full else torch.bfloat16), name


def test_single_precision_leaves_all_as_it_is() -> None:
    _, objective = assembled("stage1", "fp32")
    assert {p.dtype for p in objective.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_vae_computes_in_half_precision_on_request(precision: str) -> None:
    whole, _ = assembled("stage1", precision)
    half, _ = assembled("stage1", precision, vae="bf16")
    assert {p.dtype for p in half.decoder.vae.parameters()} == {torch.bfloat16}
    assert half.encoder.queries.dtype == torch.float32
    pixels = make_batch()["pixels"]
    expected, found = whole.decoder.posterior(pixels), half.decoder.posterior(pixels)
    for right, rounded in zip(expected, found, strict=True):
        assert rounded.dtype == torch.float32, "what is drawn is not rounded again"
        assert not torch.equal(rounded, right)
        assert (rounded - right).norm() < 0.05 * right.norm()


@pytest.mark.parametrize(("stage", "settings"), CASES)
def test_a_step_moves_the_master_weights(
    tmp_path: Path, stage: str, settings: dict[str, Any]
) -> None:
    _, objective = assembled(stage, "bf16", **settings)
    before = {name: p.detach().clone() for name, p in objective.module.named_parameters()}
    result = train(objective, tmp_path, steps=2, precision="bf16", lr=1e-3)
    assert result.finished
    for name, parameter in objective.module.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad or name.endswith("k_proj.bias"), name


@pytest.mark.slow
def test_the_loss_is_nearly_that_of_single_precision() -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        _, objective = assembled("stage2", precision, denoising_weight=0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = objective.loss(make_batch(), torch.Generator().manual_seed(0))
        losses.append(loss.total.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize(("stage", "settings"), CASES)
def test_looking_works_without_autocast(stage: str, settings: dict[str, Any]) -> None:
    _, objective = assembled(stage, "bf16", **settings)
    with torch.no_grad():
        loss = objective.loss(make_batch(), torch.Generator().manual_seed(0))
    assert torch.isfinite(loss.total)


@pytest.mark.parametrize(("capability", "slow"), [("AVX2", True), ("AVX512", False)])
def test_a_cpu_without_bfloat16_is_named(
    capability: str, slow: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assembled("stage1", "bf16")
    assert ("set loop.precision=fp32" in caplog.text) == slow
    caplog.clear()
    assembled("stage1", "fp32")
    assert not caplog.text
