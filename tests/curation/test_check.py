"""The check names everything that is wrong, and nothing that is not."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.curation.files import contents, index_of, jpeg, run, write_folder, write_shard, write_tar
from vlv.curation.check import Report, check
from vlv.curation.engine import LocalEngine
from vlv.curation.job import ShardJob
from vlv.curation.shards import ShardLimits


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Three shards of three with an index."""
    write_shard(tmp_path / "in.tar", range(9))
    run(ShardJob([str(tmp_path / "in.tar")], tmp_path / "out", "pack", limits=ShardLimits(3)))
    return tmp_path / "out"


def look(*inputs: Path, workers: int = 1) -> Report:
    with LocalEngine(workers) as engine:
        return check([str(path) for path in inputs], engine)


def problems(report: Report) -> list[tuple[str, str]]:
    return [(problem.kind, problem.id) for problem in report.problems]


def test_sound_shards(packed: Path, tmp_path: Path) -> None:
    before = contents(packed)
    report = look(packed)
    assert (report.images, report.indexed, report.problems, report.exit_code) == (9, 9, [], 0)
    assert report.table().endswith("all are whole")
    assert contents(packed) == before
    loose = look(write_folder(tmp_path / "loose", range(3)))
    assert (loose.images, loose.indexed, loose.exit_code) == (3, 0, 0)


def test_other_bytes(packed: Path) -> None:
    """One bit in the pixels of an image that still decodes."""
    row = index_of(packed)[4]
    path = packed / row["shard"]
    content = bytearray(path.read_bytes())
    content[row["offset"] + 25] ^= 1  # a quantisation table
    path.write_bytes(content)
    report = look(packed)
    assert problems(report) == [("wrong_hash", "00001-00001")]
    assert "other bytes than the index says" in report.problems[0].detail
    assert report.exit_code == 2


def test_shards_and_index_apart(packed: Path) -> None:
    (packed / "shard-00002.tar").unlink()
    write_tar(packed / "shard-00000.tar", [("00000-00000.jpg", jpeg(0)), ("new.jpg", jpeg(50))])
    found = problems(look(packed))
    assert ("missing_shard", "shard-00002.tar") in found
    assert ("not_in_index", "new") in found
    assert [name for kind, name in found if kind == "missing_record"] == [
        "00000-00001",
        "00000-00002",
    ]
    assert len(found) == 4


def test_damaged_or_foreign_index(packed: Path) -> None:
    (packed / "index.parquet").write_bytes(b"PAR1")
    found = look(packed)
    assert {kind for kind, _ in problems(found)} == {"damaged_index"}
    assert found.images == 9
    table = pq.read_table(packed / "dropped.parquet")
    pq.write_table(table, packed / "index.parquet")
    assert "this is no index of vlv" in look(packed).problems[0].detail


def test_damage_of_every_kind(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    tar = write_shard(folder / "0.tar", range(3))
    content = tar.read_bytes()
    tar.write_bytes(content[: content.index(b"000002.jpg") + 700])
    write_tar(folder / "1.tar", [("a.jpg", jpeg(1)[:-300]), ("b.txt", b"b"), ("c.jpg", b"")])
    write_tar(folder / "2.tar", [("a.jpg", jpeg(1)), ("d.jpg", jpeg(4)), ("d.jpg", jpeg(5))])
    report = look(folder)
    assert sorted(problems(report)) == [
        ("damaged_file", str(tar)),
        ("duplicate_key", "a"),
        ("duplicate_key", "d.jpg"),
        ("missing_image", "b"),
        ("unreadable", "a"),
        ("unreadable", "c"),
    ]
    again = next(
        problem
        for problem in report.problems
        if problem.id == "a" and problem.kind == "duplicate_key"
    )
    assert again.detail == f"the key a is in {folder}/1.tar and in {folder}/2.tar"
    report.write(tmp_path / "report.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["id"]) for line in lines] == problems(report)
    assert "duplicate key                  2" in report.table()
    assert "... and 3 more" in report.table(3)
