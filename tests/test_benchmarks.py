"""The benchmarks run, on the miniature model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SPEED = Path(__file__).parents[1] / "benchmarks" / "speed.py"


def test_speed(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "speed.json"
    settings = ["--repeats", "1", "--seconds", "0", "--threads", "1", "--json", str(file)]
    monkeypatch.setattr("sys.argv", [str(SPEED), "--model", str(tiny_folder), *settings])
    runpy.run_path(str(SPEED), run_name="__main__")
    speeds = json.loads(file.read_text())["speeds"]
    assert len(speeds) == 14
    assert all(speed["value"] > 0 for speed in speeds)
    text = capsys.readouterr().out
    assert "stage 2, cached latents" in text
    assert "1 threads" in text
