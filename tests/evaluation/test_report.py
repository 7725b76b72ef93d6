"""The page and the document: complete, self-contained, and equal to the files they are made of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vlv.cli import run as vlv
from vlv.errors import DataError
from vlv.evaluation.report.claims import CLAIMS, findings
from vlv.evaluation.report.document import make_document, paper, read_notes, read_results
from vlv.evaluation.report.page import grid

if TYPE_CHECKING:
    from collections.abc import Sequence

DOCS = Path(__file__).parents[2] / "docs"
EVALUATION = DOCS.parent / "src/vlv/weights/tiny/evaluation.json"


def figure(value: float, margin: float, n: int = 100) -> dict[str, Any]:
    return {"label": "x", "unit": "share", "value": value, "low": value - margin, "high": value + margin, "n": n}  # fmt: skip


def verdicts(figures: dict[str, Any]) -> dict[str, str]:
    return {claim.text: found.verdict for claim, found in findings({"x": {"figures": figures}})}


def test_the_committed_results_are_those_of_their_files() -> None:
    files = [DOCS / "results", EVALUATION]
    document = make_document(read_results(files), "docs/results", read_notes(files))
    assert (DOCS / "results.md").read_text("utf-8") == document, (
        "run vlv eval results docs/results src/vlv/weights/tiny/evaluation.json"
    )


def test_no_committed_result_names_a_folder_of_a_machine() -> None:
    for file in (DOCS / "results").glob("*.json"):
        text = file.read_text("utf-8")
        assert not re.search(r'"/|/home/|/root/|/tmp/', text), file
        assert str(Path(__file__).resolve().parents[2]) not in text, file


@pytest.mark.parametrize(
    ("value", "n", "verdict"),
    [(0.97, 100, "holds"), (0.91, 100, "undecided"), (0.5, 100, "does not hold"), (0.97, 29, "undecided")],
)  # fmt: skip
def test_an_interval_decides(value: float, n: int, verdict: str) -> None:
    found = verdicts({"regeneration.ratio": figure(value, 0.02, n)})
    claim = "Images generated from its captions are almost as good as those from the best captions."
    assert found[claim] == verdict
    assert sum(v == "not measured" for v in found.values()) == len(CLAIMS) - 1


def test_one_training_of_each_variant_decides_nothing() -> None:
    found = verdicts({"control.ratio": figure(2.2, 0.03, 1000)})
    assert found["Stage 1 is needed: without it captions are far worse."] == "undecided"


@pytest.mark.parametrize(
    ("values", "verdict"),
    [((30, 10, 30), "holds"), ((30, 29, 30), "undecided"), ((30, 50, 60), "does not hold")],
)
def test_the_best_guidance(values: Sequence[float], verdict: str) -> None:
    figures = {f"ours.g{g}.toy.fid": figure(v, 2) for g, v in zip((1, 2, 4), values, strict=True)}
    assert verdicts(figures)["Guidance 2 gives the least FID; 1 and 4 are worse."] == verdict


def test_composition_may_hold_in_the_other_order() -> None:
    figures = {
        "a48+b16.a.objects": figure(0.97, 0.01), "a48+b16.b.style": figure(0.02, 0.01),
        "b16+a48.a.objects": figure(0.87, 0.01), "b16+a48.b.style": figure(0.99, 0.01),
        "a22+b21+c21.b.style": figure(0.5, 0.01), "a22+b21+c21.a.objects": figure(0.5, 0.01),
    }  # fmt: skip
    found = verdicts(figures)
    texts = [claim.text for claim in CLAIMS if claim.source == "section 4.4.2"]
    assert [found[text] for text in texts] == ["holds", "does not hold"]


def test_the_paper_is_cited_and_complete() -> None:
    content = paper()
    assert "2507.07104" in content["citation"]
    tables = {table["id"]: table for table in content["tables"]}
    assert tables.keys() == {"1", "2", "3", "4 left", "4 right", "5 left", "5 right", "6", "7"}
    assert all(len(row) == len(t["columns"]) for t in tables.values() for row in t["rows"])
    vlv_row = next(row for row in tables["1"]["rows"] if row[0] == "VLV")
    assert vlv_row[1:] == [11.47, 6.64, 8.56, 9.90]


@pytest.mark.slow
def test_a_page_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "first"
    predict = [
        "eval",
        "predict",
        "reconstruction",
        "--run-dir",
        str(folder),
        "--from",
        "true",
        "--num",
        "3",
    ]
    assert vlv([*predict, "--steps", "1", "--guidance", "1", "--guidance", "2"]) == 0  # fmt: skip
    assert vlv(["eval", "judge", str(folder), "--judge", "toy=inspector:vlv-tiny"]) == 0
    assert vlv(["eval", "score", str(folder)]) == 0
    page = tmp_path / "report.html"
    assert vlv(["eval", "report", str(folder), "-o", str(page)]) == 0
    text = page.read_text("utf-8")
    assert text.count("<img") == 1, "the images"
    assert text.count("<svg") == 1, "the curve of claims; three images are too few for a FID"
    assert not re.search(r'<script|(?:src|href)="(?!data:|#)', text)
    for words in (
        "Not ours, and of another data set",
        "true, guidance 2: true claims found",
        "not measured",
        "3 samples",
    ):
        assert words in text
    assert "noise floor" in text
    document = tmp_path / "results.md"
    (folder / "notes.md").write_text("All of an older model.\n")
    assert vlv(["eval", "results", str(folder), "-o", str(document)]) == 0
    assert "\nAll of an older model.\n" in document.read_text("utf-8")
    value = json.loads((folder / "result.json").read_text())["figures"]["true.g2.toy.claims"][
        "value"
    ]
    assert f"{100 * value:.1f} %" in document.read_text("utf-8")
    capsys.readouterr()
    assert vlv(["eval", "report", str(tmp_path / "nowhere"), "-o", str(page)]) == 1
    assert "score the run first" in capsys.readouterr().err


def test_what_holds_no_results(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="begin with vlv eval score"):
        read_results([tmp_path])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match="holds no results"):
        read_results([tmp_path])


def test_a_grid_has_a_place_for_every_picture() -> None:
    from PIL import Image

    rows = [[Image.new("RGB", (10, 10), (20 * r, 20 * c, 0)) for c in range(3)] for r in range(2)]
    page = grid(rows, gap=1)
    assert page.size == (63, 42)
    assert page.getpixel((2 * 21 + 5, 21 + 5)) == (20, 40, 0)
