"""The benchmark of scaling measures what grows, draws it and writes it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_scaling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    scaling: Any = importlib.import_module("scaling")
    monkeypatch.setattr(scaling, "make_models", lambda name: name)
    monkeypatch.setattr(scaling, "make_batches", lambda models, variant: {"latents": "batch"})

    def stage1(
        models: str, whole: str, repeats: int, *, queries: int = 77, batch: int = 8
    ) -> list[float]:
        assert (models, whole) == ("mid", "batch")
        return [queries * batch] * repeats

    monkeypatch.setattr(scaling, "stage1_seconds", stage1)
    monkeypatch.setattr(scaling, "stage2_seconds", lambda models, n, seed, tokens: [tokens] * n)
    monkeypatch.setattr(scaling, "processes_seconds", lambda count, n, seed: [8 / count] * n)
    files = ["--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png")]
    monkeypatch.setattr("sys.argv", ["scaling.py", "--repeats", "2", *files])
    scaling.main()
    contests = json.loads((tmp_path / "s.json").read_text())["contests"]
    ratios = {c["title"]: [row["ratios"][0] for row in c["rows"]] for c in contests}
    assert ratios == {
        "stage 1 and queries": [1.0, 0.5, 16 / 48, 16 / 77],
        "stage 1 and images": [1.0, 0.5, 0.25],
        "stage 2 and captions": [1.0, 0.5, 60 / 227],
        "stage 1 and processes": [1.0, 2.0],
    }
    assert (tmp_path / "s.png").stat().st_size > 1000
    assert "77 queries" in capsys.readouterr().out
