from __future__ import annotations

import json

import pytest

from vlv.evaluation.results import Figure, Results, Section, Table, Target, format_results
from vlv.evaluation.statistics import Estimate

NAN = float("nan")


def results() -> Results:
    figures = (
        Figure("a.f1", "claims: F1", Estimate(0.912, 0.9, 0.92, 64), "share", Target(0.9, 0.98)),
        Figure("a.none", "nothing to measure", Estimate(NAN, NAN, NAN, 64), "ratio", Target(1, 2)),
    )
    table = Table("per fact", ("fact", "true", "recall"), (("colour", 7, 0.5), ("row", 0, NAN)))
    sections = (
        Section("a", "captions", figures, (table,)),
        Section("b", "VAE", not_measured="the model has no vae"),
    )
    return Results({"seed": 1}, sections)


@pytest.mark.parametrize(
    ("target", "value", "verdict"),
    [
        (Target(0.9, 0.98), 0.99, "goal"),
        (Target(0.9, 0.98), 0.9, "ok"),
        (Target(0.9, 0.98), 0.89, "below floor"),
        (Target(0.08, 0.01), 0.005, "goal"),
        (Target(0.08, 0.01), 0.08, "ok"),
        (Target(0.08, 0.01), 0.09, "below floor"),
    ],
)
def test_verdicts(target: Target, value: float, verdict: str) -> None:
    assert target.verdict(value) == verdict


def test_text() -> None:
    text = format_results(results())
    head, title, first, second, *rest = text.splitlines()
    assert " ".join(first.split()) == "claims: F1 91.2 % 90.0 % to 92.0 % 64 90.0 % 98.0 % ok"
    assert title == "captions"
    assert first.index("91.2 %") + len("91.2 %") == head.index("value") + len("value")
    assert second.split()[-3:] == ["64", "1.000", "2.000"]
    assert "    colour     7   0.500" in rest
    assert rest[-1] == "  not measured: the model has no vae"
    assert all(line == line.rstrip() for line in text.splitlines())


def test_json() -> None:
    data = json.loads(json.dumps(results().to_dict(), allow_nan=False))
    figure = data["sections"]["a"]["figures"]["a.f1"]
    assert (figure["value"], figure["floor"], figure["verdict"]) == (0.912, 0.9, "ok")
    assert data["sections"]["a"]["figures"]["a.none"]["value"] is None
    assert data["sections"]["a"]["tables"][0]["rows"][1] == {
        "fact": "row",
        "true": 0,
        "recall": None,
    }
    assert data["sections"]["b"] == {"title": "VAE", "not_measured": "the model has no vae"}
    assert list(results().figures) == ["a.f1", "a.none"]
