"""A person's ballot in the workbench: both orders, ties, and votes that `vlv eval score` reads."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.evaluation.experiments.conftest import make_backends
from vlv.errors import ConfigError, DataError, VLVError
from vlv.evaluation.experiments import arena
from vlv.evaluation.experiments.judging import score_experiment
from vlv.evaluation.experiments.predicting import predict_captions
from vlv.evaluation.experiments.run import Run
from vlv.evaluation.experiments.samples import DataSet
from vlv.ui.arena import Arena

__all__ = ["make_backends"]  # a fixture

if TYPE_CHECKING:
    from vlv.evaluation.experiments.backends import Backends


@pytest.fixture
def run(tmp_path: Path, make_backends: Callable[..., Backends]) -> Run:
    run = Run.start(
        tmp_path / "my run", arena.NAME, DataSet("test", 3, 2), arena.settings(["true", "words"])
    )
    predict_captions(run, make_backends())
    return run


def test_both_orders_are_judged_and_scored(run: Run) -> None:
    page = Arena()
    assert page.start(str(run.folder), "anna", "pairs") == ""
    assert shlex.split(page.command)[-3:] == ["--rater", "anna", "--pairs"]
    said = ""
    for number in range(4):
        assert page.line == f"{number} of 4 judged"
        assert "true" not in page.html.split("</div>")[1]
        said = page.vote("tie" if number % 2 else "first")
    assert said.startswith("all is judged and saved; next: vlv eval score")
    assert page.html == ""
    rows = run.rows("judgements/anna", arena.PAIR_KEY)
    assert {(row["first"], row["second"]) for row in rows} == {("true", "words"), ("words", "true")}
    assert "anna.consistent" in {figure.key for figure in score_experiment(run, seed=0).figures}


def test_a_ballot_goes_on_where_it_was_left(run: Run) -> None:
    page = Arena()
    page.start(str(run.folder), "ben", "rating")
    page.vote(6)
    page.vote(None)
    page.close()
    page.start(str(run.folder), "ben", "rating")
    assert page.line == "2 of 4 judged"
    assert [row.get("rating") for row in run.rows("judgements/ben", arena.RATING_KEY)] == [6, None]
    page.close()


def test_what_makes_no_sense_is_one_sentence(run: Run, tmp_path: Path) -> None:
    page = Arena()
    for folder, rater in (
        ("", "anna"),
        (str(tmp_path), "anna"),
        (str(run.folder), ""),
        (str(run.folder), "../x"),
    ):
        with pytest.raises((ConfigError, DataError), match=r"^[^\n]+$"):
            page.start(folder, rater, "pairs")
        with pytest.raises(ConfigError, match="nothing to be judged"):
            page.vote("first")
    page.start(str(run.folder), "carl", "pairs")
    for value in (6, "both", True):
        with pytest.raises(VLVError, match="no such judgement"):
            page.vote(value)
    assert run.rows("judgements/carl", arena.PAIR_KEY) == []
    page.close()
