"""The shipped folder: half-precision weights, inspector, thinned logs, and a card that quotes the figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlv.errors import ModelFolderError
from vlv.jobs.model_info import describe_model
from vlv.models.pipeline import VLVPipeline
from vlv.toyworld.inspector import Inspector, InspectorConfig
from vlv.toyworld.ship import LOG_LINES, ship

RESULTS = {
    "settings": {"num": 8, "seed": 1, "steps": 20, "guidance": 2.0},
    "sections": {
        "captions": {
            "title": "captions",
            "figures": {
                "captions.f1": {
                    "label": "F1 of claims",
                    "unit": "share",
                    "value": 0.93,
                    "low": 0.9,
                    "high": 0.95,
                    "n": 8,
                }
            },
            "tables": [],
        },
        "control": {"title": "control", "not_measured": "no control was given"},
    },
}


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    Inspector(InspectorConfig()).save_pretrained(tmp_path / "parts" / "inspector")
    return tmp_path / "parts"


@pytest.mark.slow
def test_ships_everything(tiny_folder: Path, parts: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "vae"
    run.mkdir(parents=True)
    lines = [json.dumps({"step": step}) for step in range(3 * LOG_LINES + 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "config.yaml").write_text("part: vae\npath: /home/me/out/vae\nscript: runs/tiny.sh\n")
    results = tmp_path / "evaluation.json"
    results.write_text(json.dumps(RESULTS))

    out = tmp_path / "out"
    ship(tiny_folder, parts, tmp_path / "runs", out, results, note="It was cut short.")

    weights = load_file(out / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    VLVPipeline.from_pretrained(out)
    Inspector.from_pretrained(out / "inspector", dtype=torch.float32)
    kept = (out / "training" / "vae" / "metrics.jsonl").read_text().splitlines()
    assert kept[0] == lines[0]
    assert kept[-1] == lines[-1]
    assert len(kept) <= LOG_LINES + 1
    settings = (out / "training" / "vae" / "config.yaml").read_text()
    assert settings == "part: vae\npath: vae\nscript: runs/tiny.sh\n"
    card = (out / "README.md").read_text()
    assert "| F1 of claims | 0.93 | 0.9 to 0.95 | share |" in card
    assert "It was cut short." in card
    assert json.loads((out / "evaluation.json").read_text()) == RESULTS
    info = describe_model(out)
    assert "toy world" in info.knows
    assert info.licence == "apache-2.0"


def test_without_results_the_card_says_so(tiny_folder: Path, parts: Path, tmp_path: Path) -> None:
    ship(tiny_folder, parts, tmp_path / "no-runs", tmp_path / "out")
    assert "Not measured yet" in (tmp_path / "out" / "README.md").read_text()


def test_parts_that_are_named_are_written_whole(
    tiny_folder: Path, parts: Path, tmp_path: Path
) -> None:
    pipe = VLVPipeline.from_pretrained(tiny_folder)
    named = {"repo": str(tiny_folder), "subfolder": "vae", "revision": None}
    pipe.save_pretrained(tmp_path / "model", references={"vae": named})
    assert not (tmp_path / "model" / "vae").exists()
    ship(tmp_path / "model", parts, tmp_path / "no-runs", tmp_path / "out")
    assert (tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors").is_file()


def test_refuses_without_inspector(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="no inspector"):
        ship(tiny_folder, tmp_path, tmp_path, tmp_path / "out")
