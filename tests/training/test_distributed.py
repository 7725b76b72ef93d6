"""Training in several processes: the same curve as in one, and an end for all of them when one fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.ranks import run_ranks
from tests.training.support import Denoiser, RepeatableLoader, train, weights
from vlv.training.journal import read_metrics

GLOBAL_BATCH = 8


class ShareLoader(RepeatableLoader):
    """Record 0, 1, 2 ... of an endless list: those rows of every batch that fall to one rank."""

    def __init__(self, rank: int, num_ranks: int, batch_size: int) -> None:
        super().__init__(batch_size)
        self.rank, self.num_ranks = rank, num_ranks

    def __iter__(self) -> Any:
        while True:
            first = (self.position * self.num_ranks + self.rank) * self.batch_size
            records = range(first, first + self.batch_size)
            self.position += 1
            self.seen += map(str, records)
            draws = [torch.randn(6, generator=torch.Generator().manual_seed(n)) for n in records]
            yield {"ids": list(map(str, records)), "x": torch.stack(draws)}


class Plain(Denoiser):
    """Without dropout and batch norm, so that the gradient is a mean over rows; and with its own mean over tokens."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        del self.module["body"][1]  # type: ignore[index]

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Any:
        from vlv.models.draws import rand, randn_like
        from vlv.training.loop import Losses

        x = batch["x"]
        out = x + randn_like(x, generator) * rand(len(x), generator)[:, None]
        for part in self.module.children():
            out = part(out)
        error = (out - x).square().mean()
        tokens = torch.tensor(self.num_targets(batch), dtype=torch.float32)
        each = (out - x).abs().mean(1)
        caption = (each * tokens).sum() / tokens.sum() * batch["target_weight"]
        return Losses(error + caption, {"error": error, "caption": caption})

    def num_targets(self, batch: dict[str, Any]) -> list[int]:
        return [1 + int(100 * abs(float(row[0]))) for row in batch["x"]]


def curve(rank: int, run_dir: Path, num_ranks: int, accumulate: int, steps: int) -> Any:
    size = GLOBAL_BATCH // num_ranks // accumulate
    objective = Plain()
    loader = ShareLoader(rank, num_ranks, size)
    train(
        run_dir,
        objective,
        loader=loader,
        batch_size=size,
        accumulate=accumulate,
        steps=steps,
        log_every=1,
        ema=0.9,
    )
    return weights(objective.module), loader.seen


def losses(run_dir: Path) -> torch.Tensor:
    lines = read_metrics(run_dir / "metrics.jsonl")
    names = ("loss", "error", "caption", "grad_norm")
    return torch.tensor([[line[name] for name in names] for line in lines], dtype=torch.float64)


@pytest.mark.parametrize(("num_ranks", "accumulate"), [(2, 1), (2, 2), (1, 4)])
def test_the_curve_does_not_depend_on_the_cut(
    tmp_path: Path, num_ranks: int, accumulate: int
) -> None:
    [(expected, seen)] = run_ranks(1, curve, tmp_path / "one", 1, 1, 30)
    results = run_ranks(num_ranks, curve, tmp_path / "cut", num_ranks, accumulate, 30)
    difference = (losses(tmp_path / "one") - losses(tmp_path / "cut")).abs().max()
    assert difference < 1e-5
    assert sorted(seen) == sorted(record for _, records in results for record in records)
    for found, _ in results:
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
