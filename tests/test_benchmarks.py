"""The benchmarks run, on the miniature model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from vlv.toyworld import components

SPEED = Path(__file__).parents[1] / "benchmarks" / "speed.py"
SEARCH, TEACHER, WORKERS = (
    SPEED.with_name(f"{name}.py") for name in ("search", "teacher", "workers")
)


@pytest.mark.slow
def test_speed(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = list(components.corpus(50))
    monkeypatch.setattr(
        components, "corpus", lambda: iter(texts)
    )  # tokenizers are trained on thousands
    file = tmp_path / "speed.json"
    settings = ["--repeats", "1", "--seconds", "0", "--threads", "1", "--most", "2"]
    settings += ["--json", str(file)]
    monkeypatch.setattr("sys.argv", [str(SPEED), "--model", str(tiny_folder), *settings])
    runpy.run_path(str(SPEED), run_name="__main__")
    speeds = json.loads(file.read_text())["speeds"]
    assert len(speeds) == 14
    assert all(speed["value"] > 0 for speed in speeds)
    text = capsys.readouterr().out
    assert "stage 2, cached latents" in text
    assert "1 threads" in text


@pytest.mark.slow
def test_teacher_through_600_faulty_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "teacher.json"
    settings = ["--num", "40", "--faults", "600", "--json", str(file)]
    monkeypatch.setattr("sys.argv", [str(TEACHER), *settings])
    runpy.run_path(str(TEACHER), run_name="__main__")
    result = json.loads(file.read_text())
    assert result["speed"]["whole_command"]["captioned"] == 40
    assert all(value > 0 for value in result["speed"]["parts_ms"].values())
    runs = result["faults"]["runs"]
    assert [run["captioned"] + run["named"] for run in runs] == [600, 600]
    assert all(run["captioned"] > 590 for run in runs)
    assert {run["server"]["most_delivered"] for run in runs} == {1}
    assert set(runs[0]["server"]["behaviours"]) > {"500", "hang", "429", "malformed"}
    assert result["faults"]["same_files"]


@pytest.mark.slow
def test_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("usearch", reason="search needs the package usearch")
    file = tmp_path / "search.json"
    settings = ["--num", "300", "--tokens", "8", "--width", "16", "--queries", "5"]
    monkeypatch.setattr("sys.argv", [str(SEARCH), *settings, "--json", str(file)])
    runpy.run_path(str(SEARCH), run_name="__main__")
    found = json.loads(file.read_text())
    assert found["num"] == 300
    assert found["queries_per_second"] > 0
    assert found["found_first"] == found["among_candidates"] == 1
    assert "p99_ms" in capsys.readouterr().out


@pytest.mark.slow
def test_workers_that_are_killed_write_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "workers.json"
    settings = ["--num", "24", "--per-shard", "8", "--workers", "2", "--kills", "1", "--every", "1"]
    monkeypatch.syspath_prepend(str(WORKERS.parent))
    monkeypatch.setattr("sys.argv", [str(WORKERS), *settings, "--json", str(file)])
    runpy.run_path(str(WORKERS), run_name="__main__")  # it fails where the bytes differ
    rows = json.loads(file.read_text())["contests"][0]["rows"]
    assert rows[0]["name"] == "one process on one core"
    assert rows[-1]["name"] == "2 workers, 1 kills"
    assert all(row["seconds"][0] > 0 for row in rows)
