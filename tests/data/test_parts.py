"""Every kind of input gives the same records; whatever is damaged is named, and nothing whole is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.curation.files import jpeg, scene, write_folder, write_shard, write_tar
from vlv.data import source as sources
from vlv.data import tables
from vlv.data.parts import ImageFiles
from vlv.data.records import BadRecord, Entry, Record
from vlv.data.source import Source, fingerprint
from vlv.errors import DataError


def parts_of(*inputs: str | Path) -> list[Any]:
    return list(Source(inputs, detail="all").parts())


def entries_of(*inputs: str | Path) -> list[Entry]:
    return [entry for part in parts_of(*inputs) for entry in part.entries("all")]


def records_of(*inputs: str | Path) -> list[Record]:
    return [entry for entry in entries_of(*inputs) if isinstance(entry, Record)]


def bad_of(*inputs: str | Path) -> list[BadRecord]:
    return [entry for entry in entries_of(*inputs) if isinstance(entry, BadRecord)]


def images_of(*inputs: str | Path) -> dict[str, bytes]:
    return {record.id: record.open() for record in records_of(*inputs)}


def faults_of(*inputs: str | Path) -> list[tuple[str, str]]:
    return [(bad.id, bad.kind) for bad in bad_of(*inputs)]


def smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sources, tables):
        monkeypatch.setattr(module, "RECORDS", 2)


def write_parquet(path: Path, columns: dict[str, list[Any]], group: int = 1000) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smaller_parts(monkeypatch)
    folder = write_folder(tmp_path / "in", range(5))
    (folder / "more").mkdir()
    (folder / "more" / "x.jpg").write_bytes(jpeg(9))
    (folder / "more" / "x.json").write_text('{"pwatermark": 0.3, "caption": "from the JSON"}')
    found = records_of(folder)
    assert [record.id for record in found] == [*(f"00{n}.jpg" for n in range(5)), "more/x.jpg"]
    assert found[1].caption == "a caption of 1"
    assert found[5].caption == "from the JSON"
    assert found[5].meta == {"pwatermark": 0.3, "caption": "from the JSON"}
    parts = parts_of(folder)
    assert all(isinstance(part, ImageFiles) for part in parts)
    assert [len(part.names) for part in parts] == [2, 2, 2]
    assert images_of(folder)["003.jpg"] == jpeg(3)
    assert images_of(f"{folder}/00[13].jpg") == {"001.jpg": jpeg(1), "003.jpg": jpeg(3)}


def test_tar_with_other_members(tmp_path: Path) -> None:
    members = [("b.jpg", jpeg(1)), ("a.jpg", jpeg(2)), ("a.txt", b"a"), ("b.cls", b"7")]
    tar = write_tar(tmp_path / "s.tar", [*members, (".hidden", b"x")])
    found = {record.id: record for record in records_of(tar)}
    assert list(found) == ["b", "a"]
    assert found["a"].caption == "a"
    assert found["b"].extras is not None
    assert found["b"].extras["cls"].read() == b"7"
    assert images_of(tar) == {"b": jpeg(1), "a": jpeg(2)}


def test_parquet_of_bytes_structs_and_paths(tmp_path: Path) -> None:
    data = [jpeg(seed) for seed in range(5)]
    plain = write_parquet(
        tmp_path / "plain.parquet",
        {"image": data, "text": list("abcde"), "pwatermark": [0.1] * 5},
        2,
    )
    structs = [{"bytes": content, "path": None} for content in data]
    hub = write_parquet(tmp_path / "hub.parquet", {"image": structs, "key": list("vwxyz")})
    for seed in range(2):
        (tmp_path / f"{seed}.jpg").write_bytes(data[seed])
    paths = write_parquet(tmp_path / "paths.parquet", {"path": ["0.jpg", "1.jpg"]})
    assert list(images_of(plain).values()) == data
    assert [record.caption for record in records_of(plain)] == list("abcde")
    assert records_of(plain)[4].id == "00002-000000"
    assert records_of(plain)[0].meta == {"pwatermark": 0.1}
    assert images_of(hub) == dict(zip("vwxyz", data, strict=True))
    assert list(images_of(paths).values()) == data[:2]


def test_jsonl_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smaller_parts(monkeypatch)
    write_folder(tmp_path, range(3))
    lines = [json.dumps({"file_name": f"00{n}.jpg", "caption": f"c{n}", "n": n}) for n in range(3)]
    table = tmp_path / "list.jsonl"
    table.write_text(
        "\n".join([lines[0], "{broken", lines[1], '["no object"]', '{"x": 1}', lines[2]])
    )
    assert [(record.id, record.caption, record.meta) for record in records_of(table)] == [
        (f"00{n}.jpg", f"c{n}", {"n": n}) for n in range(3)
    ]
    assert [bad.kind for bad in bad_of(table)] == ["damaged_file", "damaged_file", "missing_image"]
    assert [bad.id.rpartition(", ")[2] for bad in bad_of(table)] == ["line 2", "line 4", "line 5"]
    assert len(parts_of(table)) == 3


def test_saved_dataset(tmp_path: Path) -> None:
    import datasets

    images = [scene(seed) for seed in range(3)]
    data = datasets.Dataset.from_dict(
        {"picture": images, "text": list("abc")},
        features=datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")}),
    )
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(tmp_path / "d")
    found = records_of(tmp_path / "d")
    assert [record.caption for record in found] == ["c", "a", "b", "c"]
    assert found[1].open()[:4] == b"\x89PNG"
    assert [record.caption for record in records_of(f"hf:{tmp_path}/d:test")] == ["c"]
    data.save_to_disk(tmp_path / "one")
    assert len(records_of(tmp_path / "one")) == 3
    data.remove_columns(["picture"]).save_to_disk(tmp_path / "words")
    assert faults_of(tmp_path / "words") == [(f"hf:{tmp_path}/words", "damaged_file")]
    with pytest.raises(DataError, match="hf:nobody/nothing: the dataset cannot be opened"):
        parts_of("hf:nobody/nothing")


def test_tables_of_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in "ba":
        write_parquet(tmp_path / "data" / f"{name}.parquet", {"image": [jpeg(1)], "id": [name]})
    assert [record.id for record in records_of(tmp_path)] == ["a", "b"]
    assert [record.id for record in Source([tmp_path]).records()] == ["a", "b"]


def img2dataset_shard(folder: Path, number: int, *, finished: bool = True, says: int = 2) -> None:
    """What img2dataset writes: a tar, a table with the failures too, and statistics."""
    name = f"{number:05d}"
    keys = [f"{name}{row:04d}" for row in range(3)]
    members = []
    for key in keys[:2]:
        meta = {"key": key, "status": "success", "width": 96, "height": 80}
        members += [(f"{key}.jpg", jpeg(int(key))), (f"{key}.json", json.dumps(meta).encode())]
    write_tar(folder / f"{name}.tar", members)
    columns = {
        "url": [f"http://x/{key}" for key in keys],
        "key": keys,
        "status": ["success", "success", "failed_to_download"],
        "error_message": [None, None, "HTTP Error 404"],
        "pwatermark": [0.2, 0.7, 0.1],
    }
    write_parquet(folder / f"{name}.parquet", columns)
    if finished:
        stats = {"count": 3, "successes": says, "failed_to_download": 1, "failed_to_resize": 0}
        (folder / f"{name}_stats.json").write_text(json.dumps(stats))


def test_output_of_img2dataset(tmp_path: Path) -> None:
    img2dataset_shard(tmp_path, 0)
    img2dataset_shard(tmp_path, 1, finished=False)
    img2dataset_shard(tmp_path, 2, says=5)
    metas = [record.meta or {} for record in records_of(tmp_path)]
    assert [meta["pwatermark"] for meta in metas] == [0.2, 0.7] * 3, "joined from the table"
    assert metas[0]["width"] == 96
    missing = [bad for bad in bad_of(tmp_path) if bad.kind == "not_downloaded"]
    assert [bad.id for bad in missing] == ["000000002", "000010002", "000020002"]
    assert missing[0].reason == "http://x/000000002: HTTP Error 404"
    damaged = [bad.reason for bad in bad_of(tmp_path) if bad.kind == "damaged_file"]
    assert "has not finished this shard (00001_stats.json is missing)" in damaged[0]
    assert "2 images, but 00002_stats.json says 5" in damaged[1]


def test_img2dataset_files_and_parquet(tmp_path: Path) -> None:
    shard = write_folder(tmp_path / "files" / "00000", range(2))
    keys = ["000", "001", "002"]
    status = ["success", "success", "failed_to_resize"]
    columns = {
        "key": keys,
        "status": status,
        "url": keys,
        "error_message": [None, None, "too small"],
    }
    write_parquet(shard.with_name("00000.parquet"), {**columns, "punsafe": [0.1, 0.2, 0.3]})
    metas = [record.meta or {} for record in records_of(tmp_path / "files")]
    assert [meta["punsafe"] for meta in metas] == [0.1, 0.2]
    assert faults_of(tmp_path / "files") == [("002", "not_downloaded")]
    write_parquet(tmp_path / "p.parquet", {**columns, "jpg": [jpeg(0), jpeg(1), None]})
    assert faults_of(tmp_path / "p.parquet") == [("002", "not_downloaded")]
    assert bad_of(tmp_path / "p.parquet")[0].reason == "002: too small"


def test_truncated_tar_keeps_what_is_whole(tmp_path: Path) -> None:
    tar = write_shard(tmp_path / "s.tar", range(4))
    content = tar.read_bytes()
    tar.write_bytes(content[: content.index(b"000003.jpg") + 700])
    assert len(records_of(tar)) == 3
    (bad,) = bad_of(tar)
    assert bad.kind == "damaged_file"
    assert bad.is_file
    assert bad.reason.endswith("damaged after 9 members; 000003.jpg is cut off")


def test_damage_is_named(tmp_path: Path) -> None:
    data = jpeg(1)
    tar = write_tar(
        tmp_path / "dup.tar", [("a.jpg", data), ("a.jpg", jpeg(2)), ("b.txt", b"lonely")]
    )
    assert faults_of(tar) == [("b", "missing_image"), ("a.jpg", "duplicate_key")]
    assert images_of(tar)["a"] == data, "the first counts"
    (tmp_path / "no.tar").write_bytes(b"this is no tar" * 99)
    (tmp_path / "no.parquet").write_bytes(b"PAR1 and then nothing")
    for name in ("no.tar", "no.parquet"):
        assert faults_of(tmp_path / name) == [(str(tmp_path / name), "damaged_file")]


def test_a_damaged_row_group_costs_only_its_rows(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "t.parquet", {"path": [f"{n:05d}.jpg" for n in range(4000)]}, 1000
    )
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    content[start : start + 400] = bytes(400)
    path.write_bytes(content)
    assert len(records_of(path)) == 3000
    assert [bad.kind for bad in bad_of(path)] == ["damaged_file"]


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.doc").write_text("x")
    for inputs, message in (
        ([], "no input was given"),
        ([tmp_path / "none"], "there is no such file or folder"),
        ([tmp_path / "empty"], "holds no images, no .tar shards and no tables"),
        ([tmp_path / "note.doc"], "does not read this type of file"),
        ([f"{tmp_path}/*.zip"], "matches nothing"),
    ):
        with pytest.raises(DataError, match=message):
            Source(inputs).parts()


def test_fingerprint_follows_names_and_sizes(tmp_path: Path) -> None:
    tar = write_shard(tmp_path / "s.tar", range(2))
    before = fingerprint(parts_of(tar))
    assert fingerprint(parts_of(tar)) == before
    write_shard(tar, range(9))
    assert fingerprint(parts_of(tar)) != before
