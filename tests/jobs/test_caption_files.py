"""Anybody's captions, joined to their images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlv.data.records import Record
from vlv.errors import DataError
from vlv.jobs.caption_files import Captioned, join_captions, own_captions

IDS = ("a/1.png", "b/1.png", "b/2.jpg")


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    return [Record(id, tmp_path / id) for id in IDS]


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def by_id(found: list[Captioned]) -> dict[str, Captioned]:
    assert len({x.id for x in found}) == len(found)
    return {x.id: x for x in found}


@pytest.mark.parametrize("key", ["b/2.jpg", "2.jpg", "b/2", "2", "elsewhere/2.png"])
def test_an_image_is_known_by_id_name_or_stem(
    records: list[Record], tmp_path: Path, key: str
) -> None:
    table = write_lines(tmp_path / "c.jsonl", {"id": key, "caption": "A cone."})
    assert by_id(join_captions(records, table))["b/2.jpg"] == Captioned(
        "b/2.jpg", records[2], "A cone."
    )


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_of_other_tools(records: list[Record], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"c{suffix}"
    if suffix == ".csv":
        path.write_text('img,desc\nb/1.png,"One, two."\nb/2.jpg,\n', encoding="utf-8")
    else:
        import pyarrow
        import pyarrow.parquet

        columns = {"img": ["b/1.png", "b/2.jpg"], "desc": ["One, two.", None], "b": [b"", b""]}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    found = by_id(join_captions(records, path, caption_column="desc", id_column="img"))
    assert found["b/1.png"].caption == "One, two."
    assert "is missing" in str(found["b/2.jpg"].error) or "is empty" in str(found["b/2.jpg"].error)
    with pytest.raises(DataError, match=r"no column id, key, .*columns: img, desc.*--id-column"):
        join_captions(records, path)
    with pytest.raises(DataError, match=r"no column x .*--caption-column"):
        join_captions(records, path, caption_column="x", id_column="img")


def test_what_has_no_partner_is_named(records: list[Record], tmp_path: Path) -> None:
    table = write_lines(
        tmp_path / "c.jsonl",
        {"id": "a/1.png", "caption": "One."},
        {"id": "a/1.png", "caption": "Two."},
        {"id": "9.png", "caption": "Three."},
        {"id": "1", "caption": "Four."},
        {"id": "b/1.png", "caption": " "},
        {"caption": "Five."},
    )
    table.write_text(table.read_text() + "{broken\n")
    found = by_id(join_captions(records, table))
    errors = {id: x.error for id, x in found.items()}
    assert errors["a/1.png"] is None
    assert found["a/1.png"].caption == "One."
    for id, words in {
        "a/1.png#2": "line 2: a/1.png has a caption before",
        "9.png": "line 3: there is no image 9.png",
        "1": "1 may be a/1.png or b/1.png",
        "b/1.png": "the caption is empty",
        "b/2.jpg": "has no caption for it",
        "": "there is no image without a name",
        f"{table}, line 7": "this is not JSON",
    }.items():
        assert words in str(errors[id]), id


def test_own_captions(tmp_path: Path) -> None:
    records = [Record("1", tmp_path / "1.png", "A cone."), Record("2", tmp_path / "2.png")]
    one, two = own_captions(records)
    assert (one.caption, one.error) == ("A cone.", None)
    assert "2.png: it has no caption" in str(two.error)


def test_files_that_hold_no_captions(records: list[Record], tmp_path: Path) -> None:
    for name, content in {"c.txt": b"", "c.csv": b"\xff\xff", "c.parquet": b"no"}.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=name):
            join_captions(records, path)
    with pytest.raises(DataError, match="No such file"):
        join_captions(records, tmp_path / "absent.jsonl")
