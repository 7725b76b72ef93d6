"""The cost of the paper's training, from rates that were measured."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from vlv.evaluation.report.claims import findings

FILE = Path(__file__).parents[1] / "benchmarks" / "cost.py"


def test_hours_and_dollars_follow_from_the_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    for name, stage1, stage2 in (("", 40.0, 20.0), ("-compiled", 80.0, 40.0)):
        rows = [("stage1", stage1), ("stage2", stage2), ("stage1-latents", 1e6), ("data", 1e6)]
        content = {"results": [{"use": use, "images_per_second": rate} for use, rate in rows]}
        (results / f"full_size-paper-h200{name}.json").write_text(json.dumps(content))
    script = runpy.run_path(str(FILE))
    monkeypatch.setitem(script["measured_rates"].__globals__, "RESULTS", results)
    rates = script["measured_rates"]("h200")
    assert rates == {"stage1": [80.0, 40.0], "stage2": [40.0, 20.0]}
    figures = {figure.key: figure.estimate for figure in script["cost"](rates, 2.0, 4.0)}
    fast = 200_000 * 512 / 80 / 3600 + 100_000 * 64 / 40 / 3600
    hours, usd = figures["cost.hours"], figures["cost.usd"]
    assert (hours.value, hours.low, hours.high) == pytest.approx((fast, fast, 2 * fast))
    assert (usd.value, usd.low, usd.high) == pytest.approx((3 * fast, 2 * fast, 8 * fast))


def test_the_committed_rates_decide_the_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [str(FILE), "--run-dir", str(tmp_path)])
    runpy.run_path(str(FILE), run_name="__main__")
    shown = capsys.readouterr().out
    assert "both stages: GPU hours: " in shown
    content = json.loads((tmp_path / "result.json").read_text())
    committed = json.loads((FILE.parents[1] / "docs/results/cost.json").read_text())
    assert content["figures"] == committed["figures"], (
        "python benchmarks/cost.py --run-dir out/cost"
    )
    found = {claim.text: finding for claim, finding in findings({"cost": content})}
    hours = found["Both stages take less than 1,000 GPU hours."]
    assert hours.verdict == "holds"
    assert "against 1,000" in hours.evidence
    assert found["Training costs less than 1,000 USD."].verdict == "undecided"
