"""`vlv data check` and `stats`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Vlv
from tests.curation.files import write_folder


def test_check(vlv: Vlv, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", range(3))
    good = vlv("data", "check", folder, "--workers", 1)
    assert (good.code, good.out.splitlines()) == (
        0,
        ["3 images, 0 of them in an index", "all are whole"],
    )
    (folder / "x.jpg").write_bytes(b"")
    bad = vlv("data", "check", folder, "--workers", 1, "--report", tmp_path / "r.jsonl")
    assert bad.code == 2
    assert f"unreadable: {folder}/x.jpg: the file is empty" in bad.out
    assert json.loads((tmp_path / "r.jsonl").read_text())["id"] == "x.jpg"
    assert vlv("data", "check", tmp_path / "none").code == 1


def test_stats(vlv: Vlv, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", range(3))
    options = ("--tokenizer", "words", "--workers", 1)
    result = vlv("data", "stats", folder, "-o", tmp_path / "s.html", *options)
    assert result.code == 0
    assert "tokens (words): mean 4.0, median 4, 0.0 % in 170 to 280" in result.out
    assert "the paper's captions: mean 226.82" in result.out
    assert json.loads((tmp_path / "s.json").read_text())["images"] == 3
    assert (tmp_path / "s.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-o", "s.pdf"), "must end in .html"),
        (("-o", "s.html", "--tokenizer", "words", "--tokenizer", "words"), "named twice"),
        (("-o", "s.html", "--tokenizer", "nobody/nothing"), "nobody/nothing cannot be loaded"),
    ],
)
def test_refusals(vlv: Vlv, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    folder = write_folder(tmp_path / "in", range(1))
    result = vlv("data", "stats", folder, *options)
    assert result.code == 1
    assert message in result.err
