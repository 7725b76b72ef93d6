"""Best of N, with candidates that are known, and once with a miniature model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests import tiny
from vlv.cli import run as vlv
from vlv.errors import ConfigError
from vlv.evaluation.experiments import best_of
from vlv.evaluation.experiments.best_of import BestOfPlan, collect, measure

if TYPE_CHECKING:
    from pathlib import Path

    from vlv.evaluation.results import Figure


def candidate(
    number: int, correct: int, losses: list[float], log_prob: float, stated: int = 10
) -> dict[str, Any]:
    return {
        "number": number,
        "stated": stated,
        "true": 10,
        "correct": correct,
        "losses": losses,
        "log_prob": log_prob,
        "tokens": 20 + number,
    }


def row(*candidates: dict[str, Any]) -> dict[str, Any]:
    return {"candidates": list(candidates), "null": [1.0] * 3, "z": [0.1] * 3}


SCENES = [
    # greedy states 8 of 10 rightly; the best is number 2, and the decoder finds it, log-probability number 1
    row(
        candidate(0, 8, [0.5, 0.5, 0.5], -1.0),
        candidate(1, 7, [0.6, 0.6, 0.6], -0.5),
        candidate(2, 10, [0.2, 0.4, 0.2], -2.0),
    ),
    # the middle timestep alone would choose number 1; number 2 was the greedy caption again
    row(
        candidate(0, 9, [0.3, 0.5, 0.3], -1.0),
        candidate(1, 6, [0.9, 0.1, 0.9], -3.0),
        candidate(3, 10, [0.5, 0.5, 0.5], -3.0),
    ),
]
PLAN = BestOfPlan(num=2, candidates=4)


@pytest.fixture(scope="module")
def figures() -> dict[str, Figure]:
    (section,) = measure(SCENES, PLAN).sections
    return {figure.key: figure for figure in section.figures}


def value(figures: dict[str, Figure], key: str) -> float:
    return figures[f"best_of.{key}"].estimate.value


def test_greedy_is_the_first(figures: dict[str, Figure]) -> None:
    assert value(figures, "greedy.f1") == pytest.approx(17 / 20)
    assert value(figures, "greedy.hallucinated") == pytest.approx(3 / 20)
    assert value(figures, "greedy.tokens") == 20


def test_each_chooser_has_its_own(figures: dict[str, Figure]) -> None:
    assert value(figures, "denoising.4.f1") == pytest.approx(19 / 20)
    assert value(figures, "one_timestep.4.f1") == pytest.approx((10 + 6) / 20)
    assert value(figures, "log_prob.4.f1") == pytest.approx((7 + 9) / 20)
    assert value(figures, "oracle.4.f1") == 1


def test_only_the_first_candidates_count(figures: dict[str, Figure]) -> None:
    assert value(figures, "denoising.2.f1") == pytest.approx(17 / 20)
    assert value(figures, "oracle.2.f1") == pytest.approx(17 / 20)


def test_gains_are_those_on_greedy(figures: dict[str, Figure]) -> None:
    assert value(figures, "denoising.4.hallucinated_ratio") == pytest.approx(1 / 3)
    assert value(figures, "denoising.4.of_oracle") == pytest.approx(2 / 3)
    assert np.isnan(value(figures, "denoising.2.of_oracle"))  # there is no gain to share
    assert value(figures, "distinct") == pytest.approx(3 / 4)


def test_targets_are_those_of_eight_and_sixteen() -> None:
    (section,) = measure(SCENES, BestOfPlan(num=2, candidates=16)).sections
    aims = {x.key: x.target for x in section.figures if x.target is not None}
    assert aims.keys() == {
        f"best_of.{chooser}.{size}.{name}"
        for chooser in ("denoising", "one_timestep")
        for size in (8, 16)
        for name in ("hallucinated_ratio", "of_oracle")
    }


@pytest.mark.slow
def test_what_was_written_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num": 3, "candidates": 3, "timesteps": 2, "batch_size": 2}
    pipe, plan = tiny.make_pipeline(), BestOfPlan(**sizes, rewards=("context",))  # type: ignore[arg-type]
    seen: list[int] = []
    rows = collect(pipe, plan, tmp_path, seen.append)
    assert (len(rows), seen) == (3, [0, 2, 1])
    for found in rows:
        assert next(x["number"] for x in found["candidates"]) == 0
        assert {len(x["losses"]) for x in found["candidates"]} == {2}
        assert all(x["log_prob"] < 0 for x in found["candidates"])
        assert all(-1 <= x["context"] <= 1 for x in found["candidates"])

    def nothing_more(*_: object) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(best_of, "_rows", nothing_more)
    assert collect(pipe, plan, tmp_path, seen.append) == rows


def test_rewards_choose_too() -> None:
    scenes = [
        {**scene, "candidates": [{**x, "context": -x["number"]} for x in scene["candidates"]]}
        for scene in SCENES
    ]
    (section,) = measure(scenes, BestOfPlan(num=2, candidates=4, rewards=("context",))).sections
    found = {figure.key: figure.estimate.value for figure in section.figures}
    assert found["best_of.context.4.f1"] == found["best_of.greedy.f1"]
    with pytest.raises(ConfigError, match="no reward 'beauty'; choose from denoising"):
        BestOfPlan(rewards=("beauty",))


@pytest.mark.parametrize(
    "silly",
    [
        *({name: value} for name in ("num", "candidates", "timesteps", "batch_size") for value in (0, 1.5, "x", None)),
        *({"temperature": value} for value in (0, -1, float("nan"), float("inf"), "x")),
        {"seed": -1}, {"timesteps": 10**9}, {"candidates": 10**9},
    ],
    ids=str,
)  # fmt: skip
def test_a_silly_number_of_the_plan_is_named(silly: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(silly))):
        BestOfPlan(**silly)


@pytest.mark.slow
def test_the_command_writes_the_figures(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    more = ("--num", "2", "--candidates", "2", "--timesteps", "1", "--json", str(file))
    assert vlv(["eval", "best-of", "--model", str(tiny_folder), *more]) == 0
    keys = json.loads(file.read_text())["sections"]["best_of"]["figures"]
    assert "best_of.denoising.2.of_oracle" in keys
    assert "best_of.one_timestep.2.f1" not in keys  # it is the only one
