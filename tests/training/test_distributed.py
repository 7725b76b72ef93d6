"""Training in several processes: the same curve as in one, and an end for all of them when one fails."""

from __future__ import annotations

import json
import os
import pickle
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.ranks import Ranks, run_ranks
from tests.training.support import (
    Denoiser,
    RepeatableLoader,
    loop_config,
    optim_config,
    train,
    weights,
)
from tests.training.test_stages import make_batch, stage2
from vlv.config import LoraConfig
from vlv.errors import DataError, VLVError
from vlv.models.draws import RowGenerator
from vlv.models.lora import add_low_rank, low_rank_parameters
from vlv.training.distributed import join_world
from vlv.training.interrupt import Interrupted
from vlv.training.journal import read_metrics
from vlv.training.microbatches import with_targets
from vlv.training.objective import Losses
from vlv.training.stages import Stage2
from vlv.training.step import TrainingStep
from vlv.training.weights import set_train_mode

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
    steps = [line for line in lines if line["kind"] == "train"]
    return torch.tensor([[line[name] for name in names] for line in steps], dtype=torch.float64)


def flops(run_dir: Path) -> float:
    """Of an image, told by the last line of the log of two processes with a peak of 1,000 FLOP/s each."""
    line = [line for line in read_metrics(run_dir / "metrics.jsonl") if "mfu" in line][-1]
    return float(line["mfu"] * 2000 / line["images_per_second"])


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of one process without accumulation, and what came of it."""
    run_dir = tmp_path_factory.mktemp("uncut")
    [result] = run_ranks(1, curve, run_dir, 1, 1, 30)
    return run_dir, result


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "accumulate"), [(2, 1), (2, 2), (1, 4)])
def test_the_curve_does_not_depend_on_the_cut(
    uncut: tuple[Path, Any], tmp_path: Path, num_ranks: int, accumulate: int
) -> None:
    run_dir, (expected, seen) = uncut
    results = run_ranks(num_ranks, curve, tmp_path, num_ranks, accumulate, 30)
    difference = (losses(run_dir) - losses(tmp_path)).abs().max()
    assert difference < 1e-5
    assert sorted(seen) == sorted(record for _, records in results for record in records)
    for found, _ in results:
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def sharded_run(rank: int, run_dir: Path, parallel: str, interrupted: bool) -> Any:
    seen = []
    while True:
        objective, average = Plain(), {}

        def look(
            step: int, objective: Plain = objective, average: Any = average
        ) -> dict[str, float]:
            average.update({n: p.clone() for n, p in objective.module.named_parameters()})
            return {"figure": float(objective.module["head"](torch.ones(8)).sum())}  # type: ignore[index]

        loader = ShareLoader(rank, 2, GLOBAL_BATCH // 4)
        try:
            train(
                run_dir,
                objective,
                loader=loader,
                evaluate=look,
                eval_every=4,
                batch_size=GLOBAL_BATCH // 4,
                accumulate=2,
                steps=12,
                log_every=1,
                ema=0.9,
                parallel=parallel,
                peak_tflops=1e-9,
                max_seconds=0 if interrupted else None,
            )
        except Interrupted:
            seen += loader.seen
            continue
        return weights(objective.module), average, seen + loader.seen


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of two processes that share nothing, and what came of it."""
    run_dir = tmp_path_factory.mktemp("ddp")
    return run_dir, run_ranks(2, sharded_run, run_dir, "ddp", False)


@pytest.mark.slow
def test_what_trains_may_be_sharded(whole_run: tuple[Path, Any], tmp_path: Path) -> None:
    ddp, whole = whole_run
    shares = run_ranks(2, sharded_run, tmp_path / "fsdp", "fsdp", False)
    again = run_ranks(2, sharded_run, tmp_path / "again", "fsdp", True)
    for run_dir in (tmp_path / "fsdp", tmp_path / "again"):
        assert (losses(ddp) - losses(run_dir)).abs().max() < 1e-5
    for rank in range(2):
        assert shares[rank][2] == again[rank][2]
        for name, value in whole[0][0].items():
            torch.testing.assert_close(shares[rank][0][name], value, atol=1e-5, rtol=1e-5)
            assert torch.equal(again[rank][0][name], shares[rank][0][name]), name
    for name, value in whole[0][1].items():  # what the first process saw while it evaluated
        torch.testing.assert_close(shares[0][1][name], value, atol=1e-5, rtol=1e-5)
    assert flops(tmp_path / "fsdp") == pytest.approx(flops(ddp), rel=0.01)


@pytest.mark.slow
def test_a_run_may_go_on_sharded_otherwise(whole_run: tuple[Path, Any], tmp_path: Path) -> None:
    expected = whole_run[1]
    for first, second in (("ddp", "fsdp"), ("fsdp", "ddp")):
        run_dir = tmp_path / first
        run_ranks(2, one_step, run_dir / "x", first)
        found = run_ranks(2, sharded_run, run_dir / "x", second, False)
        for name, value in expected[0][0].items():
            torch.testing.assert_close(found[0][0][name], value, atol=1e-5, rtol=1e-5)


def one_step(rank: int, run_dir: Path, parallel: str) -> None:
    with pytest.raises(Interrupted):
        train(
            run_dir,
            Plain(),
            loader=ShareLoader(rank, 2, GLOBAL_BATCH // 4),
            batch_size=GLOBAL_BATCH // 4,
            accumulate=2,
            steps=12,
            log_every=1,
            ema=0.9,
            parallel=parallel,
            max_seconds=0,
        )


def other_number(rank: int, run_dir: Path, num_ranks: int, stop: bool) -> Any:
    loader = ShareLoader(rank, num_ranks, GLOBAL_BATCH // num_ranks)
    objective = Plain()
    with suppress(Interrupted):
        train(
            run_dir,
            objective,
            loader=loader,
            batch_size=GLOBAL_BATCH // num_ranks,
            steps=10,
            log_every=1,
            max_seconds=0 if stop else None,
        )
    return weights(objective.module), loader.seen


@pytest.mark.slow
def test_a_run_may_go_on_in_another_number_of_processes(tmp_path: Path) -> None:
    [(expected, seen)] = run_ranks(1, other_number, tmp_path / "one", 1, False)
    for first, second in ((2, 1), (1, 2)):
        run_dir = tmp_path / f"{first}-{second}"
        before = run_ranks(first, other_number, run_dir, first, True)
        found = run_ranks(second, other_number, run_dir, second, False)
        records = [record for _, ids in (*before, *found) for record in ids]
        assert sorted(records) == sorted(seen)
        for name, value in expected.items():
            torch.testing.assert_close(found[0][0][name], value, atol=1e-5, rtol=1e-5)


class Failing(Plain):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Any:
        if batch["step"] == 3:
            if self.how == "error":
                raise DataError("this record is bad")
            os._exit(7)
        return super().loss(batch, generator)


def failing(rank: int, run_dir: Path, how: str) -> str:
    objective = Failing(how) if rank and how != "loader" else Plain()
    loader = ShareLoader(rank, 2, 4)
    if how == "loader":
        loader.length = 4 if rank else None
        loader.__class__ = Ending
    with pytest.raises(VLVError) as caught:
        train(run_dir, objective, loader=loader, batch_size=4, steps=10)
    return str(caught.value)


class Ending(ShareLoader):
    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if self.length is not None and self.position > self.length:
                return
            yield batch


@pytest.mark.slow
def test_a_loader_that_ends_in_one_process_ends_all(tmp_path: Path) -> None:
    told = run_ranks(2, failing, tmp_path, "loader")
    assert "the data ended after 4 of 10 steps" in told[1]
    assert told[0] == "another process of this run failed; it says why"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["error", "exit"])
def test_a_process_that_ends_ends_all(tmp_path: Path, how: str) -> None:
    ranks = Ranks(2, failing, tmp_path, how)
    codes = ranks.wait()
    assert codes == ([0, 7] if how == "exit" else [0, 0])
    told = pickle.loads(ranks.results[0].read_bytes())
    assert "another process of this run ended without a word" in told


def signalled(rank: int, run_dir: Path) -> Any:
    def look(step: int) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return {}

    objective = Plain()
    with pytest.raises(Interrupted) as caught:
        train(
            run_dir,
            objective,
            loader=ShareLoader(rank, 2, 4),
            batch_size=4,
            evaluate=look,
            eval_every=3,
        )
    return str(caught.value), caught.value.preempted, caught.value.result.step


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    first, second = run_ranks(
        2, signalled, tmp_path
    )  # the first evaluates, and so is the one that is told
    assert first == second
    assert first[1:] == (True, 3)
    assert "SIGUSR1 was received at step 3 of 9" in first[0]


@pytest.mark.slow
def test_steps_that_are_not_finite_in_one_process_are_skipped_by_all(tmp_path: Path) -> None:
    results = run_ranks(2, poisoned, tmp_path)
    assert [skipped for skipped, _ in results] == [2, 2]
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name])
        assert value.isfinite().all()


class Poisoned(Plain):
    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Any:
        losses = super().loss(batch, generator)
        factor = float("nan") if batch["step"] in (0, 4) else 1.0
        return Losses(losses.total * factor, losses.parts)


def poisoned(rank: int, run_dir: Path) -> Any:
    objective = Poisoned() if rank else Plain()
    loader = ShareLoader(rank, 2, 4)
    train(run_dir, objective, loader=loader, batch_size=4, log_every=1)
    state = json.loads((run_dir / "checkpoints" / "step-00000009" / "state.json").read_text())
    return state["skipped_steps"], weights(objective.module)


def adapters_after_two_steps(rank: int, parallel: Any = None) -> dict[str, torch.Tensor]:
    """What the language model's adapters learn of a batch that all processes share."""
    del rank
    made = stage2(trainable="mlp+llm")
    add_low_rank(made.caption_decoder.llm, LoraConfig(rank=2), 0)
    objective = Stage2(made.encoder, made.decoder, made.caption_decoder, made.config)
    loop = loop_config(batch_size=2, parallel=parallel)
    step = TrainingStep(objective, loop, optim_config(lr_scale={}), join_world())
    set_train_mode(step.module)
    for number in range(2):
        draws = RowGenerator(0, number, range(2))
        step([with_targets(make_batch(), objective, 2, draws)], number)
    step.parallel.hand_over(None)
    found = low_rank_parameters(objective.caption_decoder.llm)
    return {name: parameter.detach().clone() for name, parameter in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_adapters_may_be_shared(parallel: str) -> None:
    pytest.importorskip("peft", reason='adapters need the package peft: pip install "vlv[lora]"')
    alone = adapters_after_two_steps(0)
    assert any(bool(value.any()) for name, value in alone.items() if "lora_B" in name), "they learn"
    for shared in run_ranks(2, adapters_after_two_steps, parallel):
        assert shared.keys() == alone.keys()
        for name, value in shared.items():
            torch.testing.assert_close(value, alone[name], atol=1e-5, rtol=1e-3)
