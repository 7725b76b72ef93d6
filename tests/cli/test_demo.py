"""`vlv demo`: the page, the captions on stdout, and wrong usage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Vlv, write_image
from vlv.demo.cases import Sampling

QUICK = ("--steps", 1)


@pytest.fixture(autouse=True)
def short_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random model never ends a caption by itself."""
    monkeypatch.setattr(
        "vlv.demo.cases.Sampling", lambda **settings: Sampling(**settings, max_new_tokens=5)
    )


def test_scenes(vlv: Vlv, tiny_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "demo.html"
    result = vlv("demo", "--model", tiny_folder, "--num", 2, *QUICK, "-o", output)
    assert result.code == 0
    assert [line.split("\t")[0] for line in result.out.splitlines()] == [
        "test-0000000",
        "test-0000001",
    ]
    assert f"{output}: 2 images in " in result.err
    assert output.read_text().count("<figure>") == 12
    assert "knows the toy world only" not in output.read_text()


def test_own_images(vlv: Vlv, tiny_folder: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "demo.html"
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    args = ("demo", "--images", photos / "0.png", bad, photos / "more" / "4.jpg")
    result = vlv(*args, "--model", tiny_folder, *QUICK, "-o", output)
    assert result.code == 2
    names = [line.split("\t")[0] for line in result.out.splitlines()]
    assert names == [str(photos / "0.png"), str(photos / "more" / "4.jpg")]
    assert "failed: " in result.err
    assert "Two embeddings in one" in output.read_text()


def test_wrong_usage(vlv: Vlv, tiny_folder: Path, photos: Path, tmp_path: Path) -> None:
    args = ("demo", "--model", tiny_folder, *QUICK)
    assert "--num counts rendered scenes" in vlv(*args, "--images", photos, "--num", 2).err
    assert "is a folder" in vlv(*args, "-o", tmp_path).err
    bad = write_image(tmp_path / "bad.png")
    bad.write_bytes(b"no image")
    assert "none of the 1 images can be read" in vlv(*args, bad).err
    assert vlv(*args, tmp_path / "missing.png").code == 1
    assert vlv("demo", "--model", "no-such-model").code == 1
