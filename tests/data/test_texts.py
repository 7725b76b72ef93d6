"""Captions by style and questions, from every kind of source, and how they are mixed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import files
from vlv.data.loader import Loader, LoaderSettings
from vlv.data.source import find_records
from vlv.data.texts import Text, TextMix, choose, questions_of, styled_captions
from vlv.errors import DataError

PNG = files.noise_png(0, 8)
CAPTIONS = {"short": "A cube.", "tags": "cube, red"}
ASKED = [{"question": "is it red?", "answer": "yes"}, {"question": "how many?", "answer": 2}]
ALL = TextMix(1.0, {"short": 1.0, "tags": 2.0}, {"short": "Short:", "tags": "Tags:"}, 4.0)
TEXTS = [
    (Text(None, "A red cube."), 1.0),
    (Text("Short:", "A cube."), 1.0),
    (Text("Tags:", "cube, red"), 2.0),
    (Text("is it red?", "yes"), 2.0),
    (Text("how many?", "2"), 2.0),
]


def write_jsonl(folder: Path) -> Path:
    (folder / "1.png").write_bytes(PNG)
    row = {
        "file_name": "1.png",
        "caption": "A red cube.",
        "captions": CAPTIONS,
        "questions": ASKED,
    }
    (folder / "t.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "t.jsonl"


def write_sidecars(folder: Path) -> Path:
    (folder / "1.png").write_bytes(PNG)
    (folder / "1.txt").write_text("A red cube.")
    (folder / "1.json").write_text(json.dumps({"captions": CAPTIONS, "questions": ASKED}))
    return folder


def write_parquet(folder: Path) -> Path:
    """Structs, as `datasets` writes them; a style in a column of its own."""
    row = {
        "image": PNG,
        "caption": "A red cube.",
        "captions": {"short": "A cube.", "other": None},
        "caption_tags": "cube, red",
        "questions": [{"question": "is it red?", "answer": "yes"}],
        "question": "how many?",
        "answer": "2",
    }
    pq.write_table(pa.Table.from_pylist([row]), folder / "t.parquet")
    return folder / "t.parquet"


@pytest.mark.parametrize("write", [write_jsonl, write_sidecars, write_parquet])
def test_every_source_has_them(write: Any, tmp_path: Path) -> None:
    (record,) = find_records([write(tmp_path)])
    found = ALL.of(record.id, record.caption, record.meta)
    assert found[:3] == TEXTS[:3]
    assert sorted(map(str, found[3:])) == sorted(map(str, TEXTS[3:]))
    assert TextMix().of(record.id, record.caption, record.meta) == TEXTS[:1]


@pytest.mark.parametrize(
    "captions",
    [json.dumps(CAPTIONS), [["short", "A cube."], ["tags", "cube, red"]], {**CAPTIONS, "no": None}],
)
def test_forms_of_captions(captions: object) -> None:
    assert styled_captions("x", {"captions": captions}) == CAPTIONS


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"captions": ["A cube."]}, "must be an object"),
        ({"captions": {"short": 5}}, "style short is no text"),
        ({"captions": "{"}, "not JSON"),
        ({"questions": {"question": "a"}}, "must be a list"),
        ({"question": "what?"}, "no answer that is a text"),
        ({"question": " ", "answer": "yes"}, "no question that is a text"),
    ],
)
def test_what_is_no_text_is_named(meta: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"x: .*{message}"):
        ALL.of("x", "A cube.", meta)


def test_answers_may_be_numbers_and_truth() -> None:
    assert questions_of("x", {"question": "a?", "answer": True}) == [Text("a?", "yes")]
    assert questions_of("x", {"question": "a?", "answer": 1.5}) == [Text("a?", "1.5")]


def test_a_record_without_any_of_them_is_bad(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(PNG)
    (tmp_path / "0.txt").write_text("A cube.")
    (tmp_path / "1.json").write_text(json.dumps({"captions": CAPTIONS}))
    (tmp_path / "2.json").write_text(json.dumps({"captions": {"short": 5}}))
    bad: dict[str, str] = {}
    settings = LoaderSettings(batch_size=2, image_size=None, texts=ALL, max_bad_share=1.0)
    with Loader(
        find_records([tmp_path]), settings, on_bad=lambda x: bad.update({x.id: x.reason})
    ) as loader:
        seen = {id for _ in range(6) for id in next(loader)["ids"]}
    assert seen == {"0.png", "1.png"}
    assert "style short is no text" in bad["2.png"]
    assert "the record 3.png has no caption, caption in the style short" in bad["3.png"]
    assert "or question with its answer" in bad["3.png"]


def test_texts_come_as_often_as_their_weights() -> None:
    draws = np.random.default_rng(0).random((4000, len(TEXTS)))
    counts = Counter(choose(TEXTS, 1, row.tolist())[0] for row in draws)
    for text, weight in TEXTS:
        assert counts[text] / 4000 == pytest.approx(weight / 8, abs=0.02)


def test_no_text_comes_twice_before_all_were_there() -> None:
    draws = [0.3, 0.9, 0.5, 0.1, 0.0]
    assert len(set(choose(TEXTS, 5, draws))) == 5
    assert choose(TEXTS, 7, draws)[5:] == choose(TEXTS, 2, draws)
