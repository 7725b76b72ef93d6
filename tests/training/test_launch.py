"""Training as a user launches it on several devices, and the configurations that we ship for it."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.cli.conftest import write_image
from tests.training.ranks import run_ranks
from vlv.cli import run as vlv
from vlv.training.journal import read_metrics

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "runs" / "accelerate"
TORCHRUN = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
ACCELERATE = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision"]
ACCELERATE += ["no", "--dynamo_backend", "no", "--rdzv_backend", "c10d", "--main_process_port", "0"]
SECONDS = 240.0


@pytest.mark.parametrize(
    ("name", "machines", "processes"), [("one", 1, 1), ("eight", 1, 8), ("eight_nodes", 8, 64)]
)
def test_configurations(name: str, machines: int, processes: int) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.mixed_precision == "no"
    if name == "eight_nodes":
        assert config.distributed_type == "FSDP"
        assert config.fsdp_config["fsdp_version"] == 2


@pytest.fixture(scope="module")
def ingredients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ingredients")
    parts = tiny.make_parts()
    parts.florence.save_pretrained(folder / "florence")
    parts.florence_tokenizer.save_pretrained(folder / "florence")
    for name in ("text_encoder", "tokenizer", "unet", "vae", "scheduler"):
        getattr(parts, name).save_pretrained(folder / "decoder" / name)
    for number in range(8):
        write_image(folder / "train" / f"{number}.png", number)
    (folder / "run.yaml").write_text(
        f"""
stage: stage1
model: {{decoder: {folder}/decoder, florence: {folder}/florence, num_queries: {tiny.NUM_QUERIES}}}
data: {{inputs: [{folder}/train], held_out: [{folder}/train], image_size: {tiny.IMAGE_SIZE}, num_workers: 1}}
optim: {{lr: 0.001}}
loop: {{steps: 3, batch_size: 4, log_every: 1, trackers: []}}
stage1: {{}}
"""
    )
    return folder


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir / "metrics.jsonl")[:3]]


@pytest.fixture(scope="module")
def alone(ingredients: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the same run in one process."""
    run_dir = tmp_path_factory.mktemp("alone")
    assert vlv(["train", str(ingredients / "run.yaml"), "--run-dir", str(run_dir)]) == 0
    return losses(run_dir)


def torchrun(arguments: list[str]) -> None:
    from torch.distributed import run

    run.main([*TORCHRUN, "-m", "vlv", *arguments])


def accelerate(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    launch_command(launch_command_parser().parse_args([*ACCELERATE, "-m", "vlv", *arguments]))


def launch(launcher: Callable[[list[str]], None], arguments: list[str], told: Path) -> None:
    """Call a launcher, which starts fresh interpreters, in a fork of this process that writes its stderr into a file."""
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    os.chdir(ROOT)
    code = 1
    try:
        launcher(arguments)
        code = 0
    except BaseException:  # noqa: BLE001 -- shown, for the process ends here
        traceback.print_exc()
    finally:
        os._exit(code)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [torchrun, accelerate], ids=["torchrun", "accelerate"])
def test_two_processes_as_a_user_launches_them(
    ingredients: Path, alone: list[float], tmp_path: Path, launcher: Any
) -> None:
    arguments = ["train", str(ingredients / "run.yaml"), "--run-dir", str(tmp_path)]
    arguments += ["--set", "loop.batch_size=2"]
    told = tmp_path / "stderr"
    process = multiprocessing.get_context("fork").Process(
        target=launch, args=(launcher, arguments, told)
    )
    process.start()
    process.join(SECONDS)
    process.kill()
    assert process.exitcode == 0, told.read_text()
    assert told.read_text().count("stage1: 3 steps done") == 1
    assert losses(tmp_path) == pytest.approx(alone, abs=1e-5)
    assert (tmp_path / "model" / "model_index.json").exists()
    assert len(list((tmp_path / "samples").glob("*.png"))) == 1


def without_data(rank: int, config: Path, run_dir: Path) -> tuple[int, str]:
    """Exit code and stderr of one of two processes, neither of which finds the data."""
    del rank
    sets = ("--set", "loop.batch_size=2", "--set", "data.inputs=[nowhere]")
    with redirect_stderr(io.StringIO()) as told:
        code = vlv(["train", str(config), "--run-dir", str(run_dir), *sets])
    return code, told.getvalue()


@pytest.mark.slow
def test_a_failure_is_told_in_one_sentence(ingredients: Path, tmp_path: Path) -> None:
    results = run_ranks(2, without_data, ingredients / "run.yaml", tmp_path)
    assert [code for code, _ in results] == [1, 1]
    told = "".join(text for _, text in results)
    sentences = [line for line in told.splitlines() if line.startswith("vlv:")]
    assert 1 <= len(sentences) <= 2  # the same one from each
    assert set(sentences) == {sentences[0]}
    assert "nowhere" in sentences[0]
    assert "Traceback" not in told
