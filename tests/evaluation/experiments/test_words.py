"""Excluded and included words, measured on scenes whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlv.cli import run
from vlv.evaluation.experiments.scene_plan import ScenePlan
from vlv.evaluation.experiments.words import (
    collect,
    fact_to_exclude,
    measure,
    word_to_include,
    words_for,
)
from vlv.jobs.table import Row
from vlv.models.pipeline import VLVPipeline
from vlv.models.words import missing_words
from vlv.toyworld.language import true_claims
from vlv.toyworld.words import WORDS
from vlv.toyworld.writing import describe

PLAN = ScenePlan("val", 20, 3)


def perfect(index: int) -> Row:
    """What a perfect model would write about a scene: it writes no false word."""
    plain = describe(PLAN.scene(index), "detailed", np.random.default_rng(index))
    row: Row = {"index": index, "plain": plain}
    row["excluded"] = {"fact": fact_to_exclude(PLAN, index, plain), "text": "A photo."}
    for kind, bias in (("true", 2.0), ("false", 0.0)):
        word = word_to_include(PLAN, index, plain, is_true=kind == "true")
        row[kind] = {"word": word, "text": plain, "bias": bias}
    row["true"]["text"] += f" There is a {row['true']['word']} object."
    return row


def test_the_words_are_what_they_should_be() -> None:
    for index in range(PLAN.num):
        row = perfect(index)
        objects = true_claims(PLAN.scene(index)).objects
        fact, value = row["excluded"]["fact"]
        assert any(facts[fact] == value for facts in objects)
        assert missing_words(words_for(fact, value), row["plain"], there=True)
        for kind in ("true", "false"):
            word = row[kind]["word"]
            assert missing_words([word], row["plain"]), "the caption lacks it"
            has = any(word in WORDS[f][v] for facts in objects for f, v in facts.items())
            assert has == (kind == "true")


def test_a_perfect_model_reaches_every_goal() -> None:
    results = measure([perfect(index) for index in range(PLAN.num)], PLAN)
    figures = {key: figure.estimate.value for key, figure in results.figures.items()}
    assert figures["words.excluded"] == figures["words.included"] == 1
    assert figures["words.included_false"] == 0
    assert figures["words.precision.plain"] == 1
    (table,) = results.sections[0].tables
    shares = {row[0]: row[1:] for row in table.rows}
    assert shares["2"] == (1, 0)
    assert shares["not written"] == (0, 1)


def test_a_fact_in_other_words_is_not_out() -> None:
    rows = [perfect(index) for index in range(PLAN.num)]
    for row in rows:
        row["excluded"]["text"] = row["plain"]
    assert measure(rows, PLAN).figures["words.excluded"].estimate.value == 0


@pytest.mark.slow
def test_what_was_written_is_kept_and_the_command_prints_it(
    instructed_pipeline: VLVPipeline,
    instructed_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan, done = ScenePlan("val", 2, 3, batch_size=2), list[int]()
    rows = collect(instructed_pipeline, plan, tmp_path, done.append)
    assert sum(done) == 2
    for row in rows:
        assert not missing_words(words_for(*row["excluded"]["fact"]), row["excluded"]["text"], there=True)  # fmt: skip
    file = tmp_path / "figures.json"
    options = ["--num", "2", "--json", str(file), "--model", str(instructed_folder)]
    assert run(["eval", "words", *options]) == 0
    assert "excluded facts that stay out" in capsys.readouterr().out
    figures = json.loads(file.read_text())["sections"]["words"]["figures"]
    assert figures["words.excluded"]["value"] == 1
