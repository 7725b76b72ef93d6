"""The whole chain on the toy world: filter, check, caption, stats, split, and stage 2 reads the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Vlv
from tests.curation.files import index_of
from vlv.models.folder import shipped_models

SHIPPED = "vlv-tiny"


@pytest.mark.slow
@pytest.mark.skipif(
    SHIPPED not in shipped_models(), reason=f"{SHIPPED} is not part of this checkout"
)
def test_from_scenes_to_stage_2(vlv: Vlv, tmp_path: Path) -> None:
    scenes, clean, captions, splits = (
        tmp_path / name for name in ("in", "clean", "captions", "splits")
    )
    one = ("--workers", 1)
    assert vlv("toyworld", "render", scenes, "--num", 10, *one).code == 0
    assert vlv("data", "filter", scenes, "-o", clean, "--config", "relaxed", *one).code == 0
    assert vlv("data", "check", clean, *one).out.endswith("all are whole\n")
    assert vlv("data", "caption", clean, "-o", captions, "--model", SHIPPED).code == 0
    stats = vlv("data", "stats", captions, "-o", tmp_path / "s.html", "--tokenizer", "words", *one)
    assert stats.code == 0
    figures = json.loads((tmp_path / "s.json").read_text())
    assert (figures["images"], figures["captions"]) == (10, 10)
    shares = ("--train", 0.6, "--val", 0.4, "--test", 0)
    assert vlv("data", "split", captions, "-o", splits, *shares, *one).code == 0
    rows = [row for name in ("train", "val") for row in index_of(splits / name)]
    known = {row["sha256"]: row for row in index_of(clean)}
    assert {row["sha256"] for row in rows} == set(known), "the same images, byte for byte"
    assert all(row["caption"] != known[row["sha256"]]["caption"] for row in rows), "the teacher's"
    weights = shipped_models()[SHIPPED]
    settings = [f"model.{part}={weights}" for part in ("decoder", "encoder", "caption_decoder")]
    settings += [f"data.inputs=[{splits}/train]", f"data.held_out=[{splits}/val]"]
    settings += ["loop.steps=2", "loop.batch_size=2", "optim.warmup_steps=0", "loop.trackers=[]"]
    changes = [word for setting in settings for word in ("--set", setting)]
    run = tmp_path / "run"
    trained = vlv("train", "tiny-captions-stage2", "--run-dir", run, *changes)
    assert trained.code == 0
    assert (run / "model" / "model_index.json").exists()
