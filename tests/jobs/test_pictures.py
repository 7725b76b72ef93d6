"""PNG files with their settings."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vlv.jobs.pictures import read_settings, write_png


def test_settings_travel_in_the_png(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.png"
    write_png(path, Image.new("RGB", (4, 4)), {"steps": 20, "text": "größer"})
    assert read_settings(path) == {"steps": 20, "text": "größer"}
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_other_files_have_no_settings(tmp_path: Path) -> None:
    plain = tmp_path / "plain.png"
    Image.new("RGB", (4, 4)).save(plain)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no png")
    assert read_settings(plain) is None
    assert read_settings(broken) is None
