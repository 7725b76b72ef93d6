"""The benchmark of the data path runs, on a few small pictures."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "data_path.py"


def test_data_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    sizes = ["--num", "8", "--side", "32", "--size", "16", "--batch-size", "4", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", [str(FILE), *sizes, "--json", str(file)])
    runpy.run_path(str(FILE), run_name="__main__")
    figures = json.loads(file.read_text())["images_per_second"]
    assert len(figures) == 1 + 3 * 5
    assert all(value > 0 for value in figures.values())
    assert "| plain loop |" in capsys.readouterr().out
