"""Questions from tables, and the job that answers them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import write_image
from vlv.data.records import Columns
from vlv.errors import DataError
from vlv.jobs.ask import AskJob, AskSettings, ask_of_all, read_questions
from vlv.jobs.formats import Row
from vlv.jobs.inputs import BatchSize
from vlv.models.pipeline import VLVPipeline

QUESTIONS = ["is it a cube?", "how many objects are there?"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two images, one of them twice, one missing, one row without a question, one that is no JSON."""
    for number in range(2):
        write_image(tmp_path / f"{number}.png", number)
    rows = [
        {"id": "a", "file_name": "0.png", "question": QUESTIONS[0]},
        {"id": "b", "file_name": "0.png", "question": QUESTIONS[1]},
        {"id": "c", "file_name": "gone.png", "question": QUESTIONS[0]},
        {"id": "d", "file_name": "1.png"},
        {"id": "e", "file_name": "1.png", "question": "is it night?"},
    ]
    lines = [*map(json.dumps, rows), "{"]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    return tmp_path / "q.jsonl"


def run(job: AskJob, pipe: VLVPipeline) -> list[Row]:
    rows: list[Row] = []
    job.run(lambda: pipe, batch_size=BatchSize(2), report=rows.extend)
    return rows


def test_every_row_has_an_answer_or_a_reason(
    table: Path, tmp_path: Path, instructed_pipeline: VLVPipeline
) -> None:
    output = tmp_path / "answers.jsonl"
    asked = read_questions(table, Columns())
    settings = AskSettings("m")
    rows = run(AskJob(asked, settings, output), instructed_pipeline)
    assert [row["answer"] for row in rows] == ["yes", "two", None, None, "No.", None]
    assert rows[0]["yes"] > 0.9
    assert [row["id"] for row in rows][:5] == ["a", "b", "c", "d", "e"]
    errors = [row["error"] for row in rows]
    assert "gone.png" in errors[2]
    assert errors[3] == f"{tmp_path / '1.png'}: its row has no question"
    assert "not JSON" in errors[5]
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows
    again = AskJob(asked, settings, output)
    assert (again.skipped, len(again.todo)) == (3, 3), "what failed is tried again"


def test_it_goes_on_where_it_stopped(
    tmp_path: Path, instructed_pipeline: VLVPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "0.png")
    table = tmp_path / "q.csv"
    table.write_text("image,question\n" + "".join(f"0.png,{q}\n" for q in (*QUESTIONS, "why?")))
    asked = read_questions(table, Columns())
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(AskJob(asked, AskSettings("m"), whole), instructed_pipeline)

    def stopped(rows: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        AskJob(asked, AskSettings("m"), output).run(
            lambda: instructed_pipeline, batch_size=BatchSize(2), report=stopped
        )
    job = AskJob(asked, AskSettings("m"), output)
    assert [one.question for one in job.todo] == ["why?"]
    run(job, instructed_pipeline)
    assert output.read_bytes() == whole.read_bytes()
    monkeypatch.setattr(VLVPipeline, "ask", None)
    assert run(AskJob(asked, AskSettings("m"), output), instructed_pipeline) == []


def test_an_image_is_encoded_once_for_all_its_questions(
    tmp_path: Path, instructed_pipeline: VLVPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "0.png")
    counts: list[int] = []
    embed = VLVPipeline.embed

    def counted(self: VLVPipeline, images: list[object], **options: object) -> object:
        counts.append(len(images))
        return embed(self, images, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(VLVPipeline, "embed", counted)
    from vlv.data.source import find_records

    asked = ask_of_all(find_records([tmp_path / "0.png"]), QUESTIONS)
    assert [row["answer"] for row in run(AskJob(asked, AskSettings("m")), instructed_pipeline)] == [
        "yes",
        "two",
    ]
    assert counts == [1]


def test_a_table_without_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"file_name": "0.png", "asked": "why?"}\n')
    with pytest.raises(DataError, match="no row has a question; name the column"):
        read_questions(tmp_path / "q.jsonl", Columns())
    (one,) = read_questions(tmp_path / "q.jsonl", Columns(), "asked")
    assert one.question == "why?"
