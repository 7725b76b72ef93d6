"""`--engine vllm`: the same captions, and options that make no sense."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cli.conftest import Vlv
from tests.cli.test_train import write_config
from tests.engine.server import EngineServer
from vlv.engine import saved_language_model

if TYPE_CHECKING:
    from vlv.models.pipeline import VLVPipeline

SHORT = ("--max-new-tokens", 5)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))


@pytest.fixture
def engine(tiny_pipeline: VLVPipeline) -> Iterator[EngineServer]:
    assert tiny_pipeline.caption_decoder is not None
    name = saved_language_model(tiny_pipeline.caption_decoder).name
    with EngineServer(tiny_pipeline.caption_decoder, name) as server:
        yield server


@pytest.mark.slow
def test_the_table_is_that_of_our_own_loop(
    vlv: Vlv, tiny_folder: Path, photos: Path, tmp_path: Path, engine: EngineServer
) -> None:
    command = ("caption", photos, "--model", tiny_folder, *SHORT, "--output")
    by_engine = ("--engine", "vllm", "--engine-url", engine.url)
    own, found = tmp_path / "own.jsonl", tmp_path / "found.jsonl"
    assert vlv(*command, own).code == 0
    assert vlv(*command, found, "--limit", 2).code == 0
    assert engine.requests == 0
    assert vlv(*command, found, *by_engine).code == 0  # goes on with the table
    assert engine.requests == 3
    assert found.read_bytes() == own.read_bytes()


@pytest.mark.slow
def test_samples_of_two_writers_are_not_mixed(
    vlv: Vlv, tiny_folder: Path, photos: Path, tmp_path: Path, engine: EngineServer
) -> None:
    command = ("caption", photos, "--model", tiny_folder, *SHORT, "--temperature", 1.0)
    by_engine = ("--engine", "vllm", "--engine-url", engine.url, "--output")
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert vlv(*command, *by_engine, one, "--batch-size", 2).code == 0
    assert vlv(*command, *by_engine, two).code == 0
    assert one.read_bytes() == two.read_bytes()
    refused = vlv(*command, "--output", one)
    assert refused.code == 1
    assert "engine was vllm, now None" in refused.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--engine-url", "http://127.0.0.1:9/v1"],
            "--engine-url has no effect without --engine vllm",
        ),
        (
            ["--engine", "vllm"],
            "--engine-python PATH or found at --engine-url URL; name one of both",
        ),
        (
            ["--engine", "vllm", "--engine-python", "python", "--num-beams", "4"],
            "leave --num-beams and",
        ),
        (["--engine", "vllm", "--engine-python", "python", "--llm-bits", "8"], "--llm-bits out"),
        (
            ["--engine", "vllm", "--engine-python", "a", "--engine-key-env", "B"],
            "without --engine-url",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(
    vlv: Vlv, photos: Path, options: list[str], said: str
) -> None:
    result = vlv("caption", photos, "--model", "no-such-model", *options)
    assert result.code == 1
    assert said in result.err


@pytest.mark.slow
def test_an_experiment_is_captioned_by_the_engine(
    vlv: Vlv, tiny_folder: Path, photos: Path, tmp_path: Path, engine: EngineServer
) -> None:
    by_engine = ("--engine", "vllm", "--engine-url", engine.url)
    sources = ("--from", f"ours=model:{tiny_folder}", "--from", f"again=model:{tiny_folder}")
    command = ("eval", "predict", "arena", "--images", photos, *sources)
    assert vlv(*command, "--run-dir", tmp_path / "run", *by_engine).code == 0
    assert engine.requests == 10


@pytest.mark.slow
def test_stage3_learns_from_what_the_engine_writes(
    vlv: Vlv, ingredients: Path, tiny_folder: Path, tmp_path: Path, engine: EngineServer
) -> None:
    """The engine of this test draws as our own loop does, so the runs are the same."""
    config = write_config(
        tmp_path / "3.yaml",
        ingredients,
        "stage3",
        model={"encoder": str(tiny_folder), "caption_decoder": str(tiny_folder), "llm": None},
        stage3={"candidates": 2, "max_caption_tokens": 5, "score_timesteps": 1, "trainable": "mlp"},
    )
    command = ("train", config, "--set", "loop.steps=2", "--run-dir")
    by_engine = ("--engine", "vllm", "--engine-url", engine.url)
    assert vlv(*command, tmp_path / "own").code == 0
    assert engine.requests == 0
    result = vlv(*command, tmp_path / "run", *by_engine)
    assert result.code == 0, result.err
    assert engine.requests > 0
    weights = "model/caption_decoder/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "own" / weights).read_bytes()
    for more, said in (
        ([*by_engine, "--set", "stage3.trainable=mlp+llm"], "the engine needs each new weight"),
        (["--set", "stage3.engine=vllm"], "stage3.engine is vllm; say where it is: --engine vllm"),
        ([*by_engine, "--profile", 1], "--profile times what this process writes"),
        ([], "stage3.engine was vllm, now None"),
    ):
        assert said in vlv(*command, tmp_path / "run", *more).err
