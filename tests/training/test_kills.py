"""Kill -9 of two processes that train together, at any moment: what is resumed equals what was never interrupted."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.loading import listed
from tests.training.ranks import Ranks, run_ranks
from tests.training.support import Denoiser, loop_config, optim_config
from vlv.data.records import Record
from vlv.data.source import find_records
from vlv.models.draws import randn_like
from vlv.storage import TEMPORARY_SUFFIX
from vlv.training.journal import read_metrics
from vlv.training.loop import fit
from vlv.training.objective import Losses

KILLS = 20
STEPS = 24
BATCH = 3
SIDE = 8
RECORDS = 20  # an epoch is three steps, and two records are left out of each
BEGIN = "begin"  # stands where a process was started
TIMES = ("images_per_second", "elapsed_seconds", "device_hours", "eta_seconds")


class Seeing(Denoiser):
    """Dropout, batch norm, noise by row, and a note of every record that a step has learnt from."""

    def __init__(self, stream: Path) -> None:
        super().__init__()
        self.stream = stream.open("a")
        print(BEGIN, file=self.stream, flush=True)

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Losses:
        print(batch["step"], *batch["ids"], sep=" ", file=self.stream, flush=True)
        x = batch["pixels"].float().flatten(1)[:, :6] / 255
        out = x + randn_like(x, generator)
        for part in self.module.children():
            out = part(out)
        loss = (out - x).square().mean()
        return Losses(loss, {"error": loss})


def training(rank: int, run_dir: Path, records: list[Record], num_workers: int) -> Any:
    run_dir.mkdir(exist_ok=True)
    objective = Seeing(run_dir / f"stream-{rank}.txt")
    loader = listed(
        records,
        BATCH,
        SIDE,
        seed=1,
        rank=rank,
        num_ranks=2,
        num_workers=num_workers,
        quarantine=run_dir / f"quarantine-{rank}.jsonl",
        max_bad_share=1.0,
    )
    settings = loop_config(
        steps=STEPS,
        batch_size=BATCH,
        accumulate=2,
        save_every=2,
        log_every=3,
        eval_every=5,
        keep_last=2,
        ema=0.9,
        keep_best="figure",
    )
    evaluate = lambda step: {"figure": abs(step - 9.5) + float(torch.rand(())) * 0}  # noqa: E731
    with loader:
        fit(objective, loader, settings, optim_config(), run_dir, evaluate=evaluate)
    return {name: value.tolist() for name, value in objective.module.named_parameters()}


def stream(run_dir: Path) -> dict[tuple[int, int], list[str]]:
    """The records of each pass of each process; of a step that was done again, the last time."""
    found: dict[tuple[int, int], list[str]] = {}
    for rank in range(2):
        for part in (run_dir / f"stream-{rank}.txt").read_text().split(f"{BEGIN}\n"):
            steps: dict[tuple[int, int], list[str]] = {}
            for line in part.splitlines():
                step, *ids = line.split()
                steps.setdefault((rank, int(step)), []).append(" ".join(ids))
            found |= steps
    return found


def lines(run_dir: Path) -> list[dict[str, Any]]:
    found = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("images")
    draws = np.random.default_rng(0)
    for number in range(RECORDS):
        pixels = draws.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    (folder / "07.png").write_bytes(b"no image")
    return find_records([str(folder)])


def wait_for(moment: str, at: int, run_dir: Path, ranks: Ranks) -> None:
    """Return at a moment of a run: so many passes after its start, or while the checkpoint thereafter is written."""
    file = run_dir / "stream-0.txt"
    begun = len(file.read_text().splitlines()) if file.exists() else 0
    while any(process.is_alive() for process in ranks.processes):
        passes = len(file.read_text().splitlines()) - begun - 1 if file.exists() else 0
        saving = any((run_dir / "checkpoints").glob(f".*{TEMPORARY_SUFFIX}"))
        if passes >= at and (moment == "pass" or saving):
            return
        time.sleep(0.001)


@pytest.mark.slow
def test_a_killed_run_equals_one_that_was_not(tmp_path: Path, records: list[Record]) -> None:
    draws = random.Random(0)
    expected = run_ranks(2, training, tmp_path / "whole", records, 0)
    kills = {"pass": 0, "save": 0}
    while sum(kills.values()) < KILLS:
        run_dir = tmp_path / f"killed-{sum(kills.values())}"
        for _ in range(
            5
        ):  # the same run is killed several times, with another number of threads that load
            moment, at = draws.choice(["pass", "save"]), draws.randrange(12)
            ranks = Ranks(2, training, run_dir, records, draws.choice([0, 1, 3]))
            wait_for(moment, at, run_dir, ranks)
            time.sleep(draws.uniform(0, 0.03))
            kills[moment] += any(process.is_alive() for process in ranks.processes)
            ranks.kill()
        found = run_ranks(2, training, run_dir, records, draws.choice([0, 1, 3]))
        assert lines(run_dir) == lines(tmp_path / "whole")
        assert stream(run_dir) == stream(tmp_path / "whole")
        assert found == expected
        assert not list((run_dir / "checkpoints").glob(".*"))
    assert min(kills.values()) >= 5
