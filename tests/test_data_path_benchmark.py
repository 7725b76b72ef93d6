"""The benchmark of the data path runs, on a few small pictures."""

from __future__ import annotations

import importlib
import json
import runpy
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "data_path.py"


def test_data_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every form is read, and compared with the fastest step of training that reads pixels."""
    monkeypatch.syspath_prepend(str(FILE.parent))
    file, training = tmp_path / "figures.json", tmp_path / "training.json"
    rows = [("baseline", [4.0]), ("bf16", [3.0, 2.0, 1.0]), ("bf16, latents cached", [0.1])]
    contest = {
        "title": "stage 1",
        "unit": "a step of 8 images",
        "rows": [{"name": name, "seconds": seconds} for name, seconds in rows],
    }
    training.write_text(json.dumps({"contests": [contest]}))
    sizes = ["--num", "9", "--sides", "32:16", "--batch-size", "4", "--repeats", "1"]
    files = ["--training", str(training), "--json", str(file)]
    monkeypatch.setattr("sys.argv", [str(FILE), *sizes, *files])
    runpy.run_path(str(FILE), run_name="__main__")
    (found,) = json.loads(file.read_text())["contests"]
    assert (found["title"], found["unit"]) == ("files of 32 pixels to squares of 16", "8 images")
    assert len(found["rows"]) == 1 + 3 * 5
    for row in found["rows"]:
        speed = 8 / row["seconds"][0]
        expected = {"images/s": speed, "times training, stage 1": speed / 4.0}
        assert row["notes"] == pytest.approx(expected)
    assert "plain loop" in capsys.readouterr().out
    table = importlib.import_module("report").table(file)
    head = "| | seconds | times as fast | least | most | images/s | times training, stage 1 |"
    assert f"{head}\n|---|---:|---:|---:|---:|---:|---:|\n| plain loop |" in table
    assert table.splitlines()[-1].partition(" threads, ")[0].isdigit(), "no models"


def test_without_figures_of_training_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FILE.parent))
    options = ["--sides", "32:16", "--training", str(tmp_path / "none.json")]
    monkeypatch.setattr("sys.argv", [str(FILE), *options])
    with pytest.raises(SystemExit, match=r"none.json is missing; measure first"):
        runpy.run_path(str(FILE), run_name="__main__")
