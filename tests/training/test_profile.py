"""The parts of a step add up to the step, and a profile leaves nothing of the run behind."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.training.support import loop_config, optim_config
from tests.training.test_stages import BATCH_SIZE, OneBatch, make_batch, stage1, stage2
from vlv.training.distributed import World
from vlv.training.profile import Timeline, profile_training, watched
from vlv.training.step import TrainingStep

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


def profile(objective: Any, run_dir: Path, **settings: Any) -> Any:
    loop = loop_config(batch_size=BATCH_SIZE, **settings)
    return profile_training(objective, OneBatch(), loop, optim_config(lr_scale={}), run_dir, 2)


def test_a_timeline_books_all_time() -> None:
    timeline = Timeline(CPU)
    start = time.perf_counter()
    for label in ("a", "b", "a", "end"):
        timeline.mark(label)
    found = timeline.seconds()
    assert set(found) == {"a", "b"}
    assert 0 < sum(found.values()) <= time.perf_counter() - start


@pytest.mark.slow
def test_stage1(tmp_path: Path) -> None:
    found = profile(stage1(), tmp_path / "run", peak_tflops=1.0)
    assert set(found.seconds) == {
        "data",
        "encoder forward",
        "encoder backward",
        "text tower forward",
        "text tower backward",
        "U-Net forward",
        "U-Net backward",
        "VAE",
        "optimiser",
        "other",
    }
    assert all(seconds > 0 for seconds in found.seconds.values())
    saved = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert saved["step_seconds"] == pytest.approx(sum(saved["seconds"].values()))
    assert saved["images"] == BATCH_SIZE
    assert found.mfu == pytest.approx(found.flops_per_image * found.images_per_second / 1e12)
    assert "MFU" in str(found)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["profile.json"]


@pytest.mark.slow
def test_stage2_with_accumulation(tmp_path: Path) -> None:
    found = profile(stage2(), tmp_path / "run", accumulate=2)
    assert {"LLM forward", "LLM backward", "encoder backward"} <= set(found.seconds)
    assert "U-Net forward" not in found.seconds
    assert found.images == 2 * BATCH_SIZE
    assert found.mfu is None  # nobody knows the peak of this CPU


@pytest.mark.slow
def test_a_trace_on_request(tmp_path: Path) -> None:
    loop = loop_config(batch_size=BATCH_SIZE)
    profile_training(stage1(), OneBatch(), loop, optim_config(lr_scale={}), tmp_path, 1, trace=True)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any("convolution" in event.get("name", "") for event in events)


def test_marks_are_taken_off_again() -> None:
    objective, timeline = stage2(denoising_weight=0.5), Timeline(CPU)
    step = TrainingStep(objective, loop_config(), optim_config(lr_scale={}), World(0, 1, CPU))
    with watched(objective, step, timeline):
        objective.loss(make_batch(), torch.Generator().manual_seed(0))
    count = len(timeline._marks)
    objective.loss(make_batch(), torch.Generator().manual_seed(0))
    assert len(timeline._marks) == count > 8
