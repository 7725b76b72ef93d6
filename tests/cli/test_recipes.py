"""The scripts in `runs/`: they parse, name presets that load, and the paper's recipe runs in miniature from end to end."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import RunScript, Vlv, write_image
from tests.cli.test_train import write_config
from tests.tiny import IMAGE_SIZE, NUM_QUERIES
from vlv.config import load_config
from vlv.curation.settings import load_filter
from vlv.jobs.plans import plan_run
from vlv.training.journal import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "runs").glob("*.sh"))
_PRESETS = re.compile(r'(?:--config "?|\btrain "?|CONFIG:-)([a-z][\w$-]+)')


def commands(script: Path) -> list[list[str]]:
    """The words of every `vlv ...` command of a script, with its lines joined."""
    text = script.read_text().replace("\\\n", " ")
    lines = (line.strip() for line in text.splitlines())
    return [shlex.split(line)[1:] for line in lines if line.startswith("vlv ")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    lines = [x for x in text.replace("\\\n", " ").splitlines() if not x.startswith("#")]
    names = [(line, name) for line in lines for name in _PRESETS.findall(line)]
    for line, name in names:
        if "vlv data filter" in line:
            load_filter(name)
            continue
        for stage in ("stage1", "stage2"):
            load_config(name.replace("$stage", stage))


def test_the_commands_of_the_small_recipe_are_understood(vlv: Vlv) -> None:
    """Each option of runs/tiny.sh is one that its command has."""
    found = commands(ROOT / "runs" / "tiny.sh")
    assert len(found) == 7
    for words in found:
        depth = 2 if words[0] in {"toyworld", "eval"} else 1
        shown = vlv(*words[:depth], "--help")
        assert shown.code == 0
        for word in words:
            if word.startswith("--"):
                assert word in shown.out, f"{words[:depth]} has no {word}"


def settings(**changes: object) -> list[str]:
    return [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]


@pytest.mark.slow
def test_the_papers_recipe_in_miniature(
    run_script: RunScript, ingredients: Path, tmp_path: Path
) -> None:
    """Both scripts, as they are, with small parts: plan, training, and the model of stage 1 in stage 2."""
    loop = {"loop.batch_size": 2, "loop.global_batch_size": 4, "loop.log_every": 1}
    small = {**loop, "data.image_size": IMAGE_SIZE, "data.num_workers": 0, "loop.trackers": "[]"}
    small["model.decoder"] = str(ingredients / "decoder")
    data = {"DATA": str(ingredients / "train"), "HELD_OUT": str(ingredients / "held_out")}
    first = settings(
        **small,
        **{"model.florence": str(ingredients / "florence"), "model.num_queries": NUM_QUERIES},
        **{"model.input_size": IMAGE_SIZE, "loop.steps": 3},
    )
    stage1, stage2 = (ROOT / "runs" / f"paper-stage{number}.sh" for number in (1, 2))
    [dry] = run_script(stage1, tmp_path, *first, **data, DRY_RUN="1", GPUS="2")
    assert "3 steps of 4 images: 2 in a pass x 1 passes x 2 processes; fp32" in dry.out
    assert "12 images, 2 epochs of 6 records" in dry.out
    assert not (tmp_path / "runs").exists()

    rate = {"USD_PER_GPU_HOUR": "2"}
    plan, _ = run_script(stage1, tmp_path, *first, "--max-minutes", "9", **data, **rate)
    assert "2 in a pass x 2 passes x 1 processes" in plan.out
    run = tmp_path / "runs" / "stage1"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["optim"]["lr"], config["optim"]["schedule"]) == (5e-5, "cosine")
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3]
    assert all(line["cost_usd"] > 0 for line in lines if line["kind"] == "train")

    second = settings(
        **small,
        **{"model.llm": str(ingredients / "llm"), "loop.steps": 4, "loop.precision": "fp32"},
        **{"stage2.frozen_llm_steps": 1, "stage2.frozen_encoder_steps": 2},
    )
    assert len(run_script(stage2, tmp_path, *second, **data)) == 2
    assert (tmp_path / "runs/stage2/model/caption_decoder/model.safetensors").is_file()


@pytest.mark.slow
def test_filter_caption_stats_check_train(run_script: RunScript, tmp_path: Path) -> None:
    """runs/dataset.sh: from pictures to a caption decoder that has learnt from a teacher's captions."""
    small = write_image(tmp_path / "more" / "small.png", size=(20, 20))  # which the filter drops
    out = tmp_path / "out"
    numbers = {"NUM": "16", "STEPS": "3", "IMAGES": str(small.parent)}
    commands = run_script(ROOT / "runs" / "dataset.sh", tmp_path, OUT=str(out), **numbers)
    assert len(commands) == 7
    rows = [json.loads(line) for line in (out / "captioned" / "captions.jsonl").open()]
    assert len(rows) == 16
    assert all(row["caption"] and row["error"] is None for row in rows)
    assert (out / "stats.html").exists()
    assert (out / "run" / "model" / "caption_decoder" / "model.safetensors").exists()


# --- vlv train --dry-run


@pytest.mark.slow
def test_a_plan_reads_no_weights_and_writes_nothing(
    vlv: Vlv, ingredients: Path, tmp_path: Path
) -> None:
    changes = {"peak_tflops": 1e-3, "usd_per_gpu_hour": 2.0, "global_batch_size": 8}
    config = write_config(tmp_path / "1.yaml", ingredients, "stage1", loop=changes)
    args = ("train", config, "--run-dir", tmp_path / "run", "--dry-run")
    result = vlv(*args, "--processes", 2)
    assert result.code == 0
    assert not (tmp_path / "run").exists()
    head, encoder, decoder, batch, epochs, memory, hours = result.out.splitlines()
    assert head.startswith("stage1 in ")
    assert "M trained" in encoder
    assert "frozen" in decoder
    assert batch == "  4 steps of 8 images: 2 in a pass x 2 passes x 2 processes; fp32"
    assert epochs == "  32 images, 5.33 epochs of 6 records"
    assert memory.startswith("  memory of each process: 0.0")
    assert re.search(r"at 30% of the GPU's peak; .* GPU hours; about .* USD", hours)


@pytest.mark.slow
def test_a_plan_of_stage2_from_finished_parts(
    vlv: Vlv, ingredients: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    model = {"encoder": str(tiny_folder), "caption_decoder": str(tiny_folder), "llm": None}
    config = write_config(tmp_path / "2.yaml", ingredients, "stage2", model=model)
    result = vlv("train", config, "--run-dir", tmp_path / "run", "--dry-run")
    assert result.code == 0
    assert "caption_decoder" in result.out
    assert "hours: not known before the run has begun" in result.out


@pytest.mark.slow
def test_a_plan_counts_one_share_of_what_is_dealt_out(
    ingredients: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    model = {"encoder": str(tiny_folder)}
    config = load_config(str(write_config(tmp_path / "2.yaml", ingredients, "stage2", model=model)))
    footprints = {}
    for parallel in ("ddp", "fsdp"):
        loop = config.loop.model_copy(update={"parallel": parallel})
        run = config.model_copy(update={"loop": loop})
        footprints[parallel] = plan_run(run, tmp_path / "run", num_processes=8).footprint
    whole, part = footprints["ddp"], footprints["fsdp"]
    assert whole is not None
    assert part is not None
    assert part.gradients == whole.gradients // 8
    assert part.peak < whole.peak - whole.gradients


def test_a_plan_of_what_is_not_there_yet(vlv: Vlv, ingredients: Path, tmp_path: Path) -> None:
    model = {"encoder": str(tmp_path / "later")}
    config = write_config(tmp_path / "2.yaml", ingredients, "stage2", model=model)
    args = ("train", config, "--run-dir", tmp_path / "run", "--dry-run")
    result = vlv(*args)
    assert result.code == 0
    assert "there is no folder with a config.json of that name yet" in result.out
    assert "epochs of 6 records" in result.out


def test_a_plan_that_cannot_be(vlv: Vlv, ingredients: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "1.yaml", ingredients, "stage1", loop={"global_batch_size": 8})
    args = ("train", config, "--run-dir", tmp_path / "run", "--dry-run")
    result = vlv(*args, "--processes", 3)
    assert result.code == 1
    assert "no multiple of loop.batch_size 2 x 3 processes" in result.err
