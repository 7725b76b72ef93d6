"""`vlv tour`: the generated pages of the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Vlv
from vlv.tour.page import TourSettings


def test_pages(
    vlv: Vlv, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "vlv.tour.page.TourSettings",
        lambda **settings: TourSettings(**settings, max_new_tokens=5),
    )
    result = vlv("tour", "--model", tiny_folder, "--steps", 2, "-o", tmp_path / "docs")
    assert result.code == 0
    assert result.out.split() == [
        str(tmp_path / "docs" / name) for name in ("tour.md", "settings.md")
    ]
    assert f"the model `{tiny_folder}`" in (tmp_path / "docs" / "tour.md").read_text(
        encoding="utf-8"
    )


def test_wrong_usage(vlv: Vlv, tiny_folder: Path, tmp_path: Path) -> None:
    assert vlv("tour", "--model", "no-such-model").code == 1
    (tmp_path / "file").write_text("")
    assert vlv("tour", "--model", tiny_folder, "--steps", 1, "-o", tmp_path / "file").code == 1
