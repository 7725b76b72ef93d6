from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from vlv.config import OptimConfig
from vlv.errors import CheckpointError, ConfigError
from vlv.training.optim import (
    MovingAverage,
    Optimizer,
    learning_rate_factor,
    name_scale,
)
from vlv.training.weights import trainable_parameters


def parameters() -> dict[str, nn.Parameter]:
    return {
        "queries": nn.Parameter(torch.ones(2)),
        "body.weight": nn.Parameter(torch.ones(2, 2)),
        "body.head.weight": nn.Parameter(torch.ones(2)),
    }


def config(**changes: Any) -> OptimConfig:
    return OptimConfig(**{"lr": 0.1, **changes})


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [1, 0.55, 0.1, 0.1, 0.1, 0.1]),
        ("cosine_wave", [1, 0.55, 0.1, 0.55, 1, 0.55]),
        ("linear", [1, 0.55, 0.1, 0.1, 0.1, 0.1]),
    ],
)
def test_schedule_with_a_horizon_of_its_own(schedule: Any, expected: list[float]) -> None:
    settings = config(schedule=schedule, decay_steps=2, end_share=0.1)
    assert [learning_rate_factor(step, 6, settings) for step in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * p)) for p in (0, 0.25, 0.5, 0.75))]),
    ],
)
def test_schedule(schedule: Any, expected: list[float]) -> None:
    settings = config(warmup_steps=2, schedule=schedule)
    assert [learning_rate_factor(step, 6, settings) for step in range(6)] == pytest.approx(expected)


def test_no_warmup_starts_at_the_full_rate() -> None:
    assert learning_rate_factor(0, 10, config()) == 1.0


def test_longest_prefix_counts() -> None:
    scales = {"body": 2.0, "body.head": 3.0}
    assert name_scale("body.head.weight", scales) == 3.0
    assert name_scale("body.headless.weight", scales) == 2.0
    assert name_scale("bodyguard", scales) == 1.0


def test_rates_per_prefix() -> None:
    named = parameters()
    settings = config(
        lr_scale={"queries": 10, "body.head": 0.5}, weight_decay=0, schedule="constant"
    )
    optimizer = Optimizer(named, settings, 5)
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0)
    moved = {name: float((1 - p).detach().mean()) for name, p in named.items()}
    assert moved == pytest.approx(
        {"queries": 1.0, "body.weight": 0.1, "body.head.weight": 0.05}, rel=1e-4
    )


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"names 'query', but no trained parameter .* body, queries"
    ):
        Optimizer(parameters(), config(lr_scale={"query": 2}), 5)
    with pytest.raises(ConfigError, match=r"warmup_steps is 5, but the run has only 5 steps"):
        Optimizer(parameters(), config(warmup_steps=5), 5)


def test_equals_plain_adamw_and_resumes() -> None:
    named, plain = parameters(), parameters()
    optimizer = Optimizer(named, config(schedule="constant"), 9)
    reference = torch.optim.AdamW(plain.values(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(4):
        for mine, other in zip(named.values(), plain.values(), strict=True):
            gradient = torch.full_like(mine, step - 1.3)
            mine.grad, other.grad = gradient, gradient.clone()
        state = {key: value.clone() for key, value in optimizer.tensors().items()}
        optimizer = Optimizer(named, config(schedule="constant"), 9)
        optimizer.load_tensors(state)
        optimizer.step(step)
        reference.step()
        optimizer.zero_grad()
    for name, parameter in named.items():
        torch.testing.assert_close(parameter, plain[name])
    assert set(optimizer.tensors()) == {
        f"{n}:{k}" for n in named for k in ("step", "exp_avg", "exp_avg_sq")
    }


def test_foreign_state_is_refused() -> None:
    optimizer = Optimizer(parameters(), config(), 5)
    with pytest.raises(CheckpointError, match=r"other:exp_avg \(2,\) fits no trained parameter"):
        optimizer.load_tensors({"other:exp_avg": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"queries:exp_avg \(3,\)"):
        optimizer.load_tensors({"queries:exp_avg": torch.zeros(3)})


def test_moving_average() -> None:
    named = {"w": nn.Parameter(torch.zeros(1))}
    average, expected = MovingAverage(named, 0.5), 0.0
    for step in range(20):
        with torch.no_grad():
            named["w"].fill_(float(step))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(average.averages["w"]) == pytest.approx(expected)
    with pytest.raises(CheckpointError, match="other parameters"):
        average.load_tensors({"v": torch.zeros(1)})


def test_trainable_parameters() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight  # shared: once, under its first name
    module[0].bias.requires_grad_(False)
    assert list(trainable_parameters(module)) == ["0.weight", "1.bias"]
    with pytest.raises(
        ConfigError, match=r"0.weight is torch.bfloat16, but master weights are float32"
    ):
        trainable_parameters(module.bfloat16())
    with pytest.raises(ConfigError, match="Sequential has no parameter that requires a gradient"):
        trainable_parameters(module.requires_grad_(False))
