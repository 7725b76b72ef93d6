"""PNG files with their settings, and sheets."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vlv.jobs.pictures import read_settings, sheet, write_png


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


def test_sheet_lays_pairs_side_by_side() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (16, 16), "blue")
    page = sheet([(red, blue)] * 3, columns=2)
    cell = (2 * 16 + 3 * 2, 16 + 2 * 2)
    assert page.size == (2 * cell[0], 2 * cell[1])
    assert page.getpixel((2, 2)) == (255, 0, 0)
    assert page.getpixel((2 + 16 + 2, 2)) == (0, 0, 255)
    assert page.getpixel((cell[0] + 2, cell[1] + 2)) == (255, 255, 255), "no fourth pair"
