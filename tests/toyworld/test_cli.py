"""`vlv toyworld`, through the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from vlv.cli import run
from vlv.data.source import find_records
from vlv.toyworld import dataset, pretrain
from vlv.training.interrupt import Interrupted
from vlv.training.objective import FitResult


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def toyworld(capsys: pytest.CaptureFixture[str]) -> Any:
    def command(*arguments: object) -> Result:
        code = run(["toyworld", *map(str, arguments)])
        return Result(code, *capsys.readouterr())

    return command


def test_render(toyworld: Any, tmp_path: Path) -> None:
    arguments = ("render", tmp_path / "data", "--split", "test", "--num", 3, "--per-shard", 2)
    sheet = tmp_path / "sheets" / "sheet.png"
    result = toyworld(*arguments, "--workers", 1, "--sheet", sheet)
    assert result.code == 0
    assert result.out.strip() == str(sheet)
    assert "3 scenes in 2 shards" in result.err
    assert len(find_records([tmp_path / "data"])) == 3
    assert Image.open(sheet).size == (3 * 68 + 4, 72)
    other = toyworld(*arguments, "--seed", 1)
    assert other.code == 1
    assert other.err.startswith("vlv: ")
    assert "seed was 0, now 1" in other.err


def test_an_interrupted_render_says_that_it_goes_on(
    toyworld: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "_render_shard", interrupted)
    result = toyworld("render", tmp_path, "--num", 3, "--workers", 1)
    assert result.code == 130
    assert "the same command goes on from there" in result.err


def test_sheet(toyworld: Any, tmp_path: Path) -> None:
    result = toyworld("sheet", tmp_path / "page.png", "--num", 9, "--split", "composition")
    assert result.code == 0
    assert Image.open(tmp_path / "page.png").size == (8 * 68 + 4, 2 * 68 + 4)


def test_describe(toyworld: Any) -> None:
    result = toyworld("describe", "--index", 4, "--seed", 0)
    lines = dict(line.split(": ", 1) for line in result.out.splitlines())
    assert result.code == 0
    assert {"short", "tags", "detailed", "existence", "count", "style"} <= lines.keys()
    assert lines["count"] == "how many objects are there? two"
    assert toyworld("describe", "--index", 4, "--seed", 0).out == result.out
    assert toyworld("describe", "--index", 5).out != result.out


PRETRAIN = ("pretrain", "vae", "--data", "a", "--data", "b", "--models", "m", "--run-dir", "r")


def test_pretrain_hands_its_options_over(toyworld: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def fake(*arguments: object, **options: object) -> FitResult:
        calls.append((arguments, options))
        return FitResult(7, True, {})

    monkeypatch.setattr(pretrain, "pretrain", fake)
    options = ("--steps", 7, "--batch-size", 9, "--seed", 2, "--max-minutes", 0.5)
    result = toyworld(*PRETRAIN, *options, "--precision", "bf16")
    assert result.code == 0
    assert "vae: 7 steps done; the weights are in m" in result.err
    recipe = replace(pretrain.RECIPES["vae"], steps=7, batch_size=9, precision="bf16")
    assert calls == [
        (
            ("vae", [Path("a"), Path("b")], Path("m"), Path("r")),
            {"recipe": recipe, "seed": 2, "max_seconds": 30, "size": "medium"},
        )
    ]


def test_an_interrupted_training_exits_130(toyworld: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(*_: object, **__: object) -> FitResult:
        raise Interrupted("stopped at step 1; the state is saved", FitResult(1, False, {}))

    monkeypatch.setattr(pretrain, "pretrain", fake)
    result = toyworld(*PRETRAIN)
    assert result.code == 130
    assert "stopped at step 1; the state is saved" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("render", "out"), "--num"),
        (("render", "out", "--num", "0"), "greater than or equal to 1"),
        (("render", "out", "--num", "3", "--split", "tests"), "tests"),
        (("pretrain", "clip", "--data", "a", "--models", "m", "--run-dir", "r"), "clip"),
        (("ship", "out", "--model", "m", "--parts", "nowhere", "--runs", "r"), "no inspector"),
        (PRETRAIN, "a: there is no such file or folder"),
    ],
)
def test_wrong_usage_is_one_sentence(
    toyworld: Any, arguments: tuple[str, ...], message: str
) -> None:
    result = toyworld(*arguments)
    assert result.code == 1
    assert message in result.err
    assert result.err.splitlines()[-1].startswith("vlv: ")
    assert "Traceback" not in result.err
