"""A folder with its captions: listing, reading, saving in text files and tables."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.cli.conftest import Vlv, vlv
from tests.ui.conftest import CAPTIONS, write_image
from vlv.data.source import find_records
from vlv.errors import DataError, OutputError
from vlv.jobs.caption_settings import CaptionSettings
from vlv.ui.album import Album
from vlv.ui.stores import Table

__all__ = ["vlv"]  # a fixture


def test_it_lists_what_the_commands_list(folder: Path) -> None:
    (folder / ".hidden").mkdir()
    write_image(folder / ".hidden" / "x.png")
    album = Album(folder)
    records = find_records([folder])
    assert [album.record(n).id for n in range(len(album))] == [r.id for r in records]
    assert [album.path(n) for n in range(len(album))] == [r.source for r in records]
    assert [album.caption(n) for n in range(len(album))] == list(CAPTIONS.values())


@pytest.mark.parametrize("text", ["", "  ", "missing", "images/a.png", "empty"])
def test_what_is_no_folder_of_images_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(folder.parent)
    Path("empty").mkdir()
    with pytest.raises(DataError, match=r"^[^\n]+$"):
        Album.open(text)


def test_saving_writes_what_caption_writes_and_only_what_changed(folder: Path) -> None:
    album = Album(folder)
    stamp = (folder / "a.txt").stat().st_mtime_ns
    assert not album.save(0, "  A red cube.\n")
    assert (folder / "a.txt").stat().st_mtime_ns == stamp
    assert album.save(1, "A  new\tone.\n\n Another one. ")
    assert (folder / "b.txt").read_bytes() == b"A new one.\nAnother one.\n"
    assert album.caption(1) == "A new one.\nAnother one."
    assert album.save(1, " ")
    assert album.caption(1) is None
    assert not (folder / "b.txt").exists()
    assert not list(folder.glob(".*")), "temporary files are left"


def test_what_somebody_else_wrote_is_not_overwritten(folder: Path) -> None:
    album = Album(folder)
    assert album.caption(0) == "A red cube."
    (folder / "a.txt").write_text("Of somebody else.\n")
    with pytest.raises(OutputError, match="changed by somebody else"):
        album.save(0, "Mine.")
    assert (folder / "a.txt").read_text() == "Of somebody else.\n"
    album.forget()
    assert album.save(0, "Mine.")


def test_images_that_would_share_a_text_file_are_not_saved(folder: Path) -> None:
    write_image(folder / "a.jpg")
    album = Album(folder)
    number = album.names.index("a.jpg")
    with pytest.raises(OutputError, match=r"would share .*a\.txt"):
        album.save(number, "Whose?")
    assert (folder / "a.txt").read_text() == "A red cube.\n"


def test_a_text_that_is_none_is_named_and_kept(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"\xff\xfe")
    os.mkfifo(folder / "b.txt")
    album = Album(folder)
    for number in (0, 1):
        with pytest.raises(DataError, match=r"[ab]\.txt: "):
            album.caption(number)
        with pytest.raises(DataError):
            album.save(number, "New.")
        assert album.shown_caption(number) == ""
    assert (folder / "a.txt").read_bytes() == b"\xff\xfe"


def test_edits_of_a_table_are_rows_that_caption_goes_on_with(
    folder: Path, tiny_folder: Path, vlv: Vlv
) -> None:
    table = folder / "captions.jsonl"
    words = ("caption", folder, "-o", table, "--model", tiny_folder, "--max-new-tokens", 4)
    assert vlv(*words, "--limit", 4).code == 0
    album = Album(folder)
    album.use(Table(table, CaptionSettings("other")))
    first, last = album.caption(0), album.caption(4)
    assert first
    assert last is None
    assert album.save(0, "Edited\nby hand.")
    assert album.save(4, "Written by hand.")
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    assert lines[-2]["caption"] == "Edited by hand."
    album.close()
    rows = {row["id"]: row for row in map(json.loads, table.read_text().splitlines())}
    assert len(table.read_text().splitlines()) == 5
    assert rows["a.png"]["finish_reason"] == rows["sub/e.png"]["finish_reason"] == "edited"
    assert (rows["sub/e.png"]["width"], rows["sub/e.png"]["height"]) == (48, 40)
    again = vlv(*words)
    assert (again.code, "skipped 5" in again.err) == (0, True), again.err
    assert album.caption(0) == "Edited by hand."
    assert album.caption(4) == "Written by hand."


@pytest.mark.slow
def test_a_table_is_begun_by_the_first_edit(folder: Path, tiny_folder: Path, vlv: Vlv) -> None:
    album = Album(folder)
    settings = CaptionSettings(str(tiny_folder), dtype="float32")
    album.use(Table(folder / "captions.jsonl", settings))
    assert not (folder / "captions.jsonl").exists()
    assert album.save(1, "Mine.")
    album.close()
    result = vlv(
        "caption", folder, "-o", folder / "captions.jsonl", "--model", tiny_folder, "--dtype", "float32"
    )  # fmt: skip
    assert result.code == 0, result.err
    assert album.caption(1) == "Mine."
    assert album.caption(0)


@pytest.mark.parametrize("name", ["captions.csv", "captions.parquet", "notes.jsonl"])
def test_tables_that_cannot_be_edited(folder: Path, name: str) -> None:
    (folder / "notes.jsonl").write_text('{"id": "x", "file_name": "x"}\n')
    with pytest.raises(OutputError, match=r"^[^\n]+$"):
        Table(folder / name, CaptionSettings("vlv-tiny"))
