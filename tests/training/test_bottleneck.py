"""The discrete bottleneck in training: losses, random draws, resuming, settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.models.test_bottleneck import KINDS, discrete_encoder
from tests.training.test_stages import generator, make_batch, train
from vlv.config import Stage1Config, Stage2Config, load_config
from vlv.errors import ConfigError
from vlv.models.draws import RowGenerator
from vlv.training.interrupt import Interrupted
from vlv.training.microbatches import rows_of
from vlv.training.stages import Stage1, Stage2

if TYPE_CHECKING:
    from pathlib import Path

    from vlv.models.bottleneck import BottleneckKind


def stage1(kind: BottleneckKind, **settings: Any) -> Stage1:
    return Stage1(discrete_encoder(kind), tiny.make_decoder(), Stage1Config(**settings))


def stage2(kind: BottleneckKind, **settings: Any) -> Stage2:
    parts = discrete_encoder(kind), tiny.make_decoder(), tiny.make_caption_decoder()
    return Stage2(*parts, Stage2Config(**settings))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_reaches_the_whole_encoder(kind: BottleneckKind) -> None:
    objective = stage1(kind)
    objective.loss(make_batch(), generator()).total.backward()
    for name, parameter in objective.encoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0 or name.endswith("k_proj.bias"), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_discrete_tokens_falls(kind: BottleneckKind) -> None:
    encoder = discrete_encoder(kind, steps=80)
    objective = Stage1(encoder, tiny.make_decoder(), Stage1Config(warm_start_steps=100))
    batch = make_batch(own_ids=torch.randint(0, 300, (2, tiny.NUM_QUERIES), generator=generator(1)))
    trained = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.003)
    with torch.no_grad():
        before = objective.loss(batch, generator()).total.item()
    for step in range(80):
        optimizer.zero_grad()
        objective.loss(batch | {"step": step}, RowGenerator(0, step, range(2))).total.backward()
        optimizer.step()
    with torch.no_grad():
        assert objective.loss(batch, generator()).total.item() < 0.8 * before


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_draws_do_not_depend_on_how_the_batch_is_cut(kind: BottleneckKind) -> None:
    objective, batch = stage1(kind), make_batch()
    whole = objective.loss(batch, RowGenerator(0, 7, range(2))).total
    parts = [
        objective.loss(rows_of(batch, slice(row, row + 1)), RowGenerator(0, 7, range(row, row + 1)))
        for row in range(2)
    ]
    torch.testing.assert_close(whole, sum(part.total for part in parts) / 2)


def test_a_gradient_asks_for_the_mixture_and_nothing_else_does() -> None:
    objective, batch = stage2("gumbel", denoising_weight=1.0), make_batch()
    one, other = (objective.loss(batch, generator(seed)).parts["caption"] for seed in (0, 1))
    assert one.item() != other.item()
    with torch.no_grad():  # as held-out figures are measured
        one, other = (objective.loss(batch, generator(seed)).parts["caption"] for seed in (0, 1))
    assert one.item() == other.item()
    frozen = stage2("gumbel", trainable="mlp")
    one, other = (frozen.loss(batch, generator(seed)).total for seed in (0, 1))
    assert one.item() == other.item()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_goes_on_exactly(kind: BottleneckKind, tmp_path: Path) -> None:
    straight = stage1(kind)
    train(straight, tmp_path / "straight", steps=3)
    for _ in range(2):
        with pytest.raises(Interrupted):
            train(stage1(kind), tmp_path / "parts", steps=3, max_seconds=0)
    resumed = stage1(kind)
    train(resumed, tmp_path / "parts", steps=3)
    for name, value in straight.encoder.state_dict().items():
        assert torch.equal(value, resumed.encoder.state_dict()[name]), name
    files = list((tmp_path / "straight" / "checkpoints").rglob("*.safetensors"))
    assert files
    assert not any("codebook" in name for file in files for name in load_file(file))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.gumbel_steps=5"], "gumbel_steps has no effect unless model.bottleneck is gumbel"),
        (
            ["model.bottleneck=nearest", "model.gumbel_temperature=[1, 0.1]"],
            "gumbel_temperature has no effect unless model.bottleneck is gumbel",
        ),
        (["model.bottleneck=discrete"], "model.bottleneck is 'discrete'"),
    ],
)
def test_settings_without_effect_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("paper-stage1", overrides)
    with pytest.raises(ConfigError, match=r"model.bottleneck has no effect beside model.encoder"):
        load_config("paper-stage2", ["model.bottleneck=nearest"])


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_keeps_rows_of_the_table(kind: BottleneckKind, tmp_path: Path) -> None:
    objective = stage1(kind)
    train(objective, tmp_path, steps=2, precision="bf16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z = objective.encoder(make_batch()["pixels"])
    assert torch.equal(z, objective.decoder.token_table()[objective.encoder.token_ids(z)])
