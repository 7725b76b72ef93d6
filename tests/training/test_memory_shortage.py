"""Out of memory: the micro-batch is cut, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.ranks import run_ranks
from tests.training.support import train, weights
from tests.training.test_distributed import Plain, ShareLoader, losses
from vlv.errors import ConfigError
from vlv.training.interrupt import Interrupted
from vlv.training.objective import Losses

BATCH = 8


class Greedy(Plain):
    """Runs out of memory in the middle of the backward pass, once some gradients are there already.

    Args:
        rows: More rows than these do not fit.
        step: From this step on.
    """

    def __init__(self, rows: int, step: int) -> None:
        super().__init__()
        self.rows, self.step = rows, step
        self.sizes: list[int] = []

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Losses:
        losses = super().loss(batch, generator)
        self.sizes.append(len(batch["x"]))
        if len(batch["x"]) > self.rows and batch["step"] >= self.step:
            weight = self.module["body"][0].weight  # type: ignore[index]
            return Losses(losses.total + _Shortage.apply(weight).sum() * 0, losses.parts)
        return losses


class _Shortage(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("injected")


def run(run_dir: Path, objective: Plain, **settings: Any) -> Any:
    size = settings.pop("batch_size", BATCH)
    train(
        run_dir,
        objective,
        loader=ShareLoader(0, 1, size),
        batch_size=size,
        log_every=1,
        ema=0.9,
        **settings,
    )
    return objective.module.state_dict()


@pytest.mark.parametrize(("rows", "sizes"), [(4, {4}), (3, {2}), (1, {1})])
def test_a_shortage_changes_nothing_but_the_micro_batch(
    tmp_path: Path, rows: int, sizes: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    greedy = Greedy(rows, step=3)
    expected, found = run(tmp_path / "a", Plain()), run(tmp_path / "b", greedy)
    assert greedy.sizes[:3] == [BATCH] * 3
    assert set(greedy.sizes[-4:]) == sizes
    assert (losses(tmp_path / "a") - losses(tmp_path / "b")).abs().max() < 1e-6
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6)
    assert "memory did not suffice at step 4: from now on a batch of 8 is cut" in caplog.text


def test_a_batch_that_is_not_even(tmp_path: Path) -> None:
    expected = run(tmp_path / "a", Plain(), batch_size=5)
    found = run(tmp_path / "b", Greedy(3, step=0), batch_size=5)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6)


def test_the_choice_is_kept(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, Greedy(4, step=0), max_seconds=0)
    (state,) = (tmp_path / "checkpoints").glob("*/state.json")
    assert json.loads(state.read_text())["cut"] == 2
    again = Greedy(4, step=0)
    run(tmp_path, again)
    assert set(again.sizes) == {4}


def test_one_row_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not suffice for one image at step 3; use a small"):
        run(tmp_path, Greedy(0, step=2))


def shortage_in_one(rank: int, run_dir: Path, accumulate: int, step: int) -> Any:
    size = BATCH // 2 // accumulate
    objective = Greedy(1, step) if rank else Plain()
    train(
        run_dir,
        objective,
        loader=ShareLoader(rank, 2, size),
        batch_size=size,
        accumulate=accumulate,
        log_every=1,
        ema=0.9,
        steps=6,
    )
    return weights(objective.module)


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "step"), [(1, 0), (2, 0)])
def test_a_shortage_in_one_process(tmp_path: Path, accumulate: int, step: int) -> None:
    expected = run(tmp_path / "a", Plain(), steps=6)
    found = run_ranks(2, shortage_in_one, tmp_path / "b", accumulate, step)
    assert (losses(tmp_path / "a") - losses(tmp_path / "b")).abs().max() < 1e-5
    for each in found:
        for name, value in expected.items():
            torch.testing.assert_close(each[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_shortage_while_gradients_are_averaged_ends_all_and_is_remembered(tmp_path: Path) -> None:
    expected = run(tmp_path / "a", Plain(), steps=6)
    with pytest.raises(AssertionError, match="batches are cut into micro-batches of 2"):
        run_ranks(2, shortage_in_one, tmp_path / "b", 1, 3)
    found = run_ranks(2, shortage_in_one, tmp_path / "b", 1, 3)
    for name, value in expected.items():
        torch.testing.assert_close(found[0][name], value, atol=1e-5, rtol=1e-5)
