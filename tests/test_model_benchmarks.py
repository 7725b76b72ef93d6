"""The benchmarks of resizing and of the full sizes run, on miniatures."""

from __future__ import annotations

import json
import runpy
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.engine.server import EngineServer
from vlv.engine import saved_language_model
from vlv.models.pipeline import VLVPipeline

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_resizing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "resizing.json"
    settings = ["--batch-size", "2", "--repeats", "1", "--sizes", "24:48", "48:20"]
    monkeypatch.setattr(
        "sys.argv", ["resizing.py", *settings, "--threads", "1", "--json", str(file)]
    )
    runpy.run_path(str(BENCHMARKS / "resizing.py"), run_name="__main__")
    rows = json.loads(file.read_text())["rows"]
    assert [(row["from"], row["to"]) for row in rows] == [(24, 48), (48, 20)]
    assert all(row["ratio"] == row["ours_ms"] / row["pillow_ms"] > 0 for row in rows)
    assert "| 24 | 48 |" in capsys.readouterr().out


@pytest.mark.slow
def test_verifying(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "verifying.json"
    settings = [
        "--model",
        str(tiny_folder),
        "--num",
        "2",
        "--repeats",
        "1",
        "--max-new-tokens",
        "3",
    ]
    monkeypatch.setattr("sys.argv", ["verifying.py", *settings, "--json", str(file)])
    runpy.run_path(str(BENCHMARKS / "verifying.py"), run_name="__main__")
    rows = {row["way"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["greedy", "verify 8", "verify 8, enough 1", "verify 16"]
    assert rows["greedy"]["cost"] == 1 < rows["verify 8"]["cost"]
    assert "x greedy" in capsys.readouterr().out


class AtOnce(Executor):
    """Works in this process, which has imported everything."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


@pytest.mark.slow
def test_full_size_with_miniature_models(
    tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, preset = tmp_path / "full_size.json", tmp_path / "models.yaml"
    preset.write_text(yaml.safe_dump(tiny_models.model_dump(mode="json", exclude_defaults=True)))
    uses = ["stage1", "stage1-latents", "stage2", "captioning", "reconstruction", "data"]
    settings = ["--repeats", "1", "--tokens", "9", "--sampler-steps", "2"]
    settings += ["--uses", "stage1:2+loop.vae_precision=bf16", *(f"{use}:2" for use in uses[1:])]
    settings += ["--steps", "2", "--num", "4", "--workers", "1"]
    settings += ["--peak-tflops", "0.001", "--json", str(file)]
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", AtOnce)
    monkeypatch.setattr("sys.argv", ["full_size.py", "--preset", str(preset), *settings])
    runpy.run_path(str(BENCHMARKS / "full_size.py"), run_name="__main__")
    results = json.loads(file.read_text())["results"]
    assert [result["use"] for result in results] == uses
    assert [r["settings"] for r in results] == [["loop.vae_precision=bf16"], *[[]] * 5]
    for result in results:
        assert result["images_per_second"] == pytest.approx(2 / result["seconds"])
        if result["use"] == "data":
            continue
        used = result["images_per_second"] * result["flops_per_image"] / 1e9
        assert result["mfu"] == pytest.approx(used)
        assert result["flops_per_image"] > 1e5
        assert result["predicted_bytes"] > 1e5
        assert result["peak_bytes"] is None, "there is no GPU"
        if "stage" in result["use"]:
            assert sum(result["parts"].values()) == pytest.approx(result["seconds"])
            assert ("VAE" in result["parts"]) == (result["use"] == "stage1")


@pytest.mark.slow
def test_engine_with_a_miniature_model(
    tiny_pipeline: VLVPipeline, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, decoder = tmp_path / "engine.json", tiny_pipeline.caption_decoder
    assert decoder is not None
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.syspath_prepend(BENCHMARKS)
    with EngineServer(decoder, saved_language_model(decoder).name) as server:
        settings = ["--url", server.url, "--model", str(tiny_folder), "--json", str(file)]
        settings += [
            "--equal",
            "3",
            "--num",
            "2",
            "--tokens",
            "4",
            "--repeats",
            "1",
            "--threads",
            "1",
        ]
        monkeypatch.setattr("sys.argv", ["engine.py", *settings])
        runpy.run_path(str(BENCHMARKS / "engine.py"), run_name="__main__")
    contests = json.loads(file.read_text())["contests"]
    assert [contest["title"] for contest in contests] == [f"{n} at a time" for n in (1, 4, 16, 64)]
    assert all(row["seconds"][0] > 0 for contest in contests for row in contest["rows"])
    assert [row["notes"]["equal of 3"] for row in contests[-1]["rows"]] == [3, 3]
