"""Instructions, measured on scenes whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlv.cli import run
from vlv.errors import ConfigError
from vlv.evaluation.experiments.instruct import (
    collect,
    length_asked,
    measure,
    questions,
)
from vlv.evaluation.experiments.scene_plan import ScenePlan
from vlv.jobs.table import Row
from vlv.models.pipeline import VLVPipeline
from vlv.toyworld.styles import STYLES, texts_of

PLAN = ScenePlan("val", 30, 3, batch_size=4)


def perfect(index: int, **changes: str) -> Row:
    """What a perfect model would write about a scene."""
    captions = texts_of(PLAN.scene(index), np.random.default_rng(index))["captions"]
    others = {"plain": captions["detailed"], "known": captions["detailed"]}
    captions = {**captions, **others, "before": captions["short"], **changes}
    answers = [x.answer.capitalize() + "." for x in questions(PLAN, index)]
    counts = {
        style: length_asked(PLAN, index, style) for style in captions if style in (*STYLES, "plain")
    }
    lengths = {style: (count, " ".join(["word"] * count)) for style, count in counts.items()}
    return {"index": index, "captions": captions, "answers": answers, "lengths": lengths}


def test_a_perfect_model_reaches_every_goal() -> None:
    results = measure([perfect(index) for index in range(PLAN.num)], PLAN)
    figures = {key: figure.estimate.value for key, figure in results.figures.items()}
    for style in ("detailed", "short", "tags", "prompt", "partial"):
        assert figures[f"instruct.style.{style}"] == figures[f"instruct.precision.{style}"] == 1
    assert figures["instruct.lengths"] == 1
    assert figures["instruct.known.gain"] == 0
    assert figures["instruct.answers"] == figures["instruct.answers.yes_or_no"] == 1
    assert figures["instruct.answers_of_caption"] == 1, "the parser needs no instruction"
    assert figures["instruct.plain.f1"] == 1 > figures["instruct.before.f1"]
    gain = figures["instruct.plain.gain"]
    assert gain == pytest.approx(1 - figures["instruct.before.f1"])
    lengths, table = results.sections[0].tables
    assert [row[0] for row in lengths.rows] == [
        "detailed",
        "short",
        "tags",
        "prompt",
        "partial",
        "plain",
    ]
    assert all(row[1] < row[2] for row in lengths.rows), "many lengths are asked for"
    guessed = {row[0]: row[2] for row in table.rows}
    assert guessed["yes or no"] < 0.7


def test_what_is_wrong_counts() -> None:
    rows = [perfect(index, tags="A photo of a red cube.") for index in range(PLAN.num)]
    for row in rows:
        row["answers"] = ["yes"] * len(row["answers"])
        asked, text = row["lengths"]["detailed"]
        row["lengths"]["detailed"] = (asked, f"{text} {text}")
        row["lengths"]["plain"] = (20, " ".join(["word"] * 23))
    figures = {key: x.estimate.value for key, x in measure(rows, PLAN).figures.items()}
    assert figures["instruct.style.tags"] == 0
    assert figures["instruct.lengths"] == pytest.approx(5 / 6), "23 of 20 words are within 15 %"
    assert 0.3 < figures["instruct.answers.yes_or_no"] < 0.7
    assert figures["instruct.answers.count"] == 0


def test_what_was_written_is_kept(
    instructed_pipeline: VLVPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ScenePlan("val", 3, 3, batch_size=2)
    done: list[int] = []
    rows = collect(instructed_pipeline, instructed_pipeline, plan, tmp_path, done.append)
    assert sum(done) == 3
    assert [sorted(row["captions"]) for row in rows] == [
        ["before", "known", "plain", "short", "tags"]
    ] * 3
    assert rows[0]["captions"]["short"] == "A cube."
    assert [len(row["answers"]) for row in rows] == [len(questions(plan, i)) for i in range(3)]
    assert [sorted(row["lengths"]) for row in rows] == [["plain", "short", "tags"]] * 3
    assert rows[0]["lengths"]["short"][0] == length_asked(plan, 0, "short")
    monkeypatch.setattr(VLVPipeline, "embed", None)
    assert collect(instructed_pipeline, instructed_pipeline, plan, tmp_path, done.append) == rows


def test_a_plain_model_is_refused(tiny_pipeline: VLVPipeline, tmp_path: Path) -> None:
    def report(count: int) -> Any:
        raise AssertionError(count)

    with pytest.raises(ConfigError, match="takes no instructions"):
        collect(tiny_pipeline, None, PLAN, tmp_path, report)


def test_the_command_prints_and_writes_the_figures(
    instructed_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, kept = tmp_path / "figures.json", tmp_path / "kept"
    options = ["--num", "2", "--batch-size", "2", "--json", str(file), "--evidence", str(kept)]
    model = str(instructed_folder)
    assert run(["eval", "instruct", "--model", model, "--before", model, *options]) == 0
    assert "asked for short, written so" in capsys.readouterr().out
    figures = json.loads(file.read_text())["sections"]["instruct"]["figures"]
    assert figures["instruct.plain.gain"]["value"] == 0
    assert (kept / "texts.jsonl").exists()
