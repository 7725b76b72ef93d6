"""The benchmark of the filter runs; the arithmetic of costs is right."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_filter_speeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("filter", monkeypatch)
    monkeypatch.setattr(module, "measure_memory", lambda folder, jpegs, count: _memory(count))
    monkeypatch.setattr(module, "LocalEngine", lambda workers: _in_process())
    monkeypatch.setattr(module, "PER_SHARD", 4)
    options = ["--images", "8", "--decode-images", "4", "--memory-images", "10", "100"]
    files = ["--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "f.png")]
    monkeypatch.setattr(sys, "argv", ["filter.py", *options, "--repeats", "1", *files])
    module.main()
    figures = json.loads((tmp_path / "f.json").read_text())
    assert [(s["rules"], s["workers"], s["images"], s["kept"]) for s in figures["speeds"]] == [
        ("headers", 1, 8, 8),
        ("headers", 2, 8, 8),
        ("decode", 1, 4, 4),
        ("decode", 2, 4, 4),
    ]
    assert [run["images"] for run in figures["memory"]] == [10, 100]
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def _memory(count: int) -> dict[str, Any]:
    return {"images": count, "peak_mb": 1.0, "seconds": 1.0, "workers": 2}


def _in_process() -> Any:
    from vlv.curation.engine import LocalEngine

    return LocalEngine(1)


def test_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("data_cost", monkeypatch)
    measured = module.Measured(headers=1000, decode=100, jpeg_kb=30, client=200)
    fetch, headers, decode, kept, asking = module.steps(measured, module.Assumptions())
    assert headers["count"] == 80e6
    assert headers["hours"] == pytest.approx(80e6 / 1000 / 3600 / 16)
    assert decode["usd"] == pytest.approx(80e6 / 100 / 3600 * 0.04)
    assert fetch["hours"] == pytest.approx(80e6 / 0.7 / 5e6)
    assert fetch["tb"] == pytest.approx(12)
    assert kept["tb"] == pytest.approx(1.2)
    assert asking["hours"] == pytest.approx(6e6 / 2000 / 60)
    assert asking["usd"] == pytest.approx(6e6 * (700 * 0.1 + 300 * 0.4) / 1e6)
    slow = module.steps(module.Measured(1000, 100, 30, client=10), module.Assumptions())
    assert slow[-1]["hours"] == pytest.approx(6e6 / 10 / 3600), "then the client is the limit"


def test_costs_are_written_into_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = [
        {"rules": name, "workers": 1, "images_per_second": 100} for name in ("headers", "decode")
    ]
    filtering, teacher = tmp_path / "filter-cpu.json", tmp_path / "teacher-cpu.json"
    page = tmp_path / "page.md"
    arguments = [
        "--filter-json",
        str(filtering),
        "--teacher-json",
        str(teacher),
        "--write",
        str(page),
    ]
    monkeypatch.setattr(sys, "argv", ["data_cost.py", *arguments, "--cores", "32"])
    script = str(BENCHMARKS / "data_cost.py")
    with pytest.raises(
        SystemExit, match=r"filter-cpu.json is missing; measure first: python benchmarks/filter.py"
    ):
        runpy.run_path(script, run_name="__main__")
    filtering.write_text(json.dumps({"speeds": speeds, "jpeg": {"mean_bytes": 25000}}))
    teacher.write_text(json.dumps({"speeds": {"whole_command": {"images_per_second": 250}}}))
    module = load("data_cost", monkeypatch)
    page.write_text(f"above\n{module.BEGIN}\nold\n{module.END}\nbelow\n")
    runpy.run_path(script, run_name="__main__")
    text = page.read_text()
    assert text.startswith(f"above\n{module.BEGIN}\n| step |")
    assert text.endswith(f"{module.END}\nbelow\n")
    assert "old" not in text
    assert "1 machine of 32 cores" in text
    assert "- `--kept 4e+07`: images that the paper keeps" in text
