"""Each rule drops what it should, says why, and the shards hold the rest, byte for byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.curation.files import (
    dropped_of,
    index_of,
    jpeg,
    run,
    scene,
    write_folder,
    write_shard,
    write_tar,
)
from tests.data.files import encode, png_16_bit
from vlv.curation.job import ShardJob
from vlv.curation.settings import FilterConfig, load_filter, preset_names
from vlv.curation.shards import ShardLimits
from vlv.curation.tables import read_table
from vlv.data.records import Columns
from vlv.data.source import find_records
from vlv.data.tars import index_tar
from vlv.errors import ConfigError, DataError, OutputError


def test_presets() -> None:
    assert preset_names() == ["clean", "paper", "relaxed"]
    paper = load_filter("paper")
    assert (paper.short_side_above, paper.aspect_min, paper.aspect_max) == (512, 0.5, 2.0)
    assert paper.watermark is not None
    assert paper.watermark.below == 0.5
    assert not paper.needs_pixels
    others = paper.model_dump(exclude={"short_side_above", "aspect_min", "aspect_max", "watermark"})
    assert others == FilterConfig().model_dump(include=set(others)), (
        "and nothing that is not the paper's"
    )
    assert load_filter("relaxed").needs_pixels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("watermark.below=null", "needs below or at_least"),
        ("watermark.model=x", "model needs label"),
        ("watermark.label=x", "no effect without model"),
        ("aspect_min=3", "above aspect_max"),
        ("short_side=3", "did you mean short_side_above"),
        ("near_duplicates=64", "near_duplicates is 64"),
        ("embedding_duplicates.cosine=0.9", "need file or backbone"),
    ],
)
def test_wrong_settings(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_filter("paper", [change])


def test_the_papers_rules_at_their_edges(tmp_path: Path) -> None:
    def image(width: int, height: int) -> bytes:
        return encode(Image.new("RGB", (width, height)), "PNG")

    cases = {
        "at_512": (image(512, 600), 0.1, "short_side"),
        "at_513": (image(513, 513), 0.1, None),
        "wide": (image(1027, 513), 0.1, "aspect_ratio"),
        "twice": (image(1026, 513), 0.1, None),
        "tall": (image(513, 1026), 0.1, None),
        "taller": (image(513, 1027), 0.1, "aspect_ratio"),
        "marked": (image(600, 600), 0.5, "watermark"),
        "hardly": (image(600, 600), 0.4999, None),
        "unknown": (image(600, 600), None, "watermark"),
    }
    members = []
    for name, (data, mark, _) in cases.items():
        members += [
            (f"{name}.png", data),
            (f"{name}.json", json.dumps({"PWatermark": mark}).encode()),
        ]
    write_tar(tmp_path / "in.tar", members)
    summary = run(
        ShardJob([str(tmp_path / "in.tar")], tmp_path / "out", config=load_filter("paper"))
    )
    assert dropped_of(tmp_path / "out") == {n: r for n, (_, _, r) in cases.items() if r}
    assert [row["id"] for row in index_of(tmp_path / "out")] == [
        name for name, (_, _, reason) in cases.items() if reason is None
    ]
    assert summary.dropped == {"watermark": 2, "short_side": 1, "aspect_ratio": 2}
    assert summary.exit_code == 0
    rows = {row["id"]: row for row in read_table(tmp_path / "out" / "dropped.parquet")}
    assert (rows["marked"]["value"], rows["marked"]["detail"]) == (
        "0.5",
        "watermark is 0.5, not below 0.5",
    )
    assert (rows["wide"]["value"], rows["wide"]["width"]) == ("2.002", 1027)


def test_upright_size_counts(tmp_path: Path) -> None:
    """A picture that is stored on its side is as wide as it is seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (60, 40)), "JPEG", exif=exif.tobytes())
    write_tar(tmp_path / "in.tar", [("a.jpg", data)])
    run(ShardJob([str(tmp_path / "in.tar")], tmp_path / "out"))
    (row,) = index_of(tmp_path / "out")
    assert (row["width"], row["height"]) == (40, 60)


def test_quality_and_duplicates(tmp_path: Path) -> None:
    cut = jpeg(5)[:-400]
    members = [
        ("small.jpg", jpeg(1, (96, 80))),
        ("large.jpg", jpeg(1, (192, 160))),
        ("other.jpg", jpeg(2)),
        ("again.jpg", jpeg(2)),
        ("flat.jpg", encode(Image.new("RGB", (16, 16), "red"), "JPEG")),
        ("crushed.jpg", encode(scene(3, (900, 900)), "JPEG", quality=1)),
        ("cut.jpg", cut),
    ]
    write_tar(tmp_path / "in.tar", members)
    config = FilterConfig(
        decode=True,
        min_contrast=4,
        min_bytes_per_pixel=0.03,
        exact_duplicates=True,
        near_duplicates=4,
    )
    summary = run(ShardJob([str(tmp_path / "in.tar")], tmp_path / "out", config=config))
    assert dropped_of(tmp_path / "out") == {
        "small": "near_duplicate",
        "again": "exact_duplicate",
        "flat": "flat",
        "crushed": "compression",
        "cut": "unreadable",
    }
    rows = {row["id"]: row for row in read_table(tmp_path / "out" / "dropped.parquet")}
    assert rows["small"]["detail"] == "like large, which stays"
    assert int(rows["small"]["value"]) <= 4
    assert rows["again"]["detail"] == "like other, which stays"
    assert summary.exit_code == 2, "one is damaged"
    header_only = run(ShardJob([str(tmp_path / "in.tar")], tmp_path / "header"))
    assert header_only.kept == 7, "nobody has decoded it"


def test_language_nsfw_and_aesthetic(tmp_path: Path) -> None:
    for number, meta in enumerate(
        (
            {"LANGUAGE": "en", "punsafe": 0.1, "AESTHETIC_SCORE": 6},
            {"LANGUAGE": "de", "punsafe": 0.1, "AESTHETIC_SCORE": 6},
            {"LANGUAGE": "en", "punsafe": 0.9, "AESTHETIC_SCORE": 6},
            {"LANGUAGE": "en", "punsafe": None, "AESTHETIC_SCORE": "5.5"},
        )
    ):
        write_shard(tmp_path / "in" / f"{number}.tar", [number], meta=meta)
    config = load_filter(
        "paper",
        [
            "short_side_above=null",
            "languages=[en]",
            "aesthetic.at_least=5.5",
            "nsfw.below=0.5",
            "nsfw.unknown=keep",
            "watermark=null",
        ],
    )
    run(ShardJob([str(tmp_path / "in")], tmp_path / "out", config=config))
    assert dropped_of(tmp_path / "out") == {"000001": "language", "000002": "nsfw"}
    assert [
        (row["nsfw"], row["aesthetic"], row["language"]) for row in index_of(tmp_path / "out")
    ] == [
        (0.1, 6.0, "en"),
        (None, 5.5, "en"),
    ]


def test_unknown_column(tmp_path: Path) -> None:
    write_shard(tmp_path / "in.tar", range(2))
    job = ShardJob(
        [str(tmp_path / "in.tar")],
        tmp_path / "out",
        config=load_filter("paper", ["nsfw.below=0.5"]),
    )
    with pytest.raises(
        DataError, match=r"nsfw needs the column punsafe.*\(columns: pwatermark, seed\)"
    ):
        run(job)
    assert not (tmp_path / "out").exists(), "other settings can be tried at once"


def test_shards_hold_what_went_in(tmp_path: Path) -> None:
    members = [("b.jpg", jpeg(1)), ("b.cls", b"7"), ("b.json", b'{"id": "first", "sha256": "old"}')]
    write_tar(tmp_path / "in" / "a.tar", members)
    write_folder(tmp_path / "in" / "folder", [2])
    table = pa.table({"image": [jpeg(3)], "text": ["three"]})
    pq.write_table(table, tmp_path / "t.parquet")
    run(ShardJob([str(tmp_path / "in"), str(tmp_path / "t.parquet")], tmp_path / "out"))
    index = index_of(tmp_path / "out")
    assert [row["id"] for row in index] == ["b", "folder/002.jpg", "00000-000000"]
    tar = (tmp_path / "out" / "shard-00000.tar").read_bytes()
    for row, seed in zip(index, (1, 2, 3), strict=True):
        data = tar[row["offset"] : row["offset"] + row["size"]]
        assert data == jpeg(seed)
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
    records = find_records([tmp_path / "out"])  # as training reads it
    assert [record.caption for record in records] == [None, "a caption of 2", "three"]
    known = {"id": "first", "source_sha256": "old", "sha256": index[0]["sha256"]}
    assert records[0].meta == known
    checked = find_records([tmp_path / "out"], columns=Columns(sha256="sha256"))
    assert [record.load().size for record in checked] == [(96, 80)] * 3
    parts = index_tar(tmp_path / "out" / "shard-00000.tar").keys
    assert list(parts["00000-00000"]) == ["jpg", "json", "cls"]


def test_shard_sizes() -> None:
    sizes = np.array([10, 10, 30, 100, 5, 5])
    assert ShardLimits(4).cut(sizes) == [(0, 4), (4, 6)]
    assert ShardLimits(4, 40).cut(sizes) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert ShardLimits(4).cut(sizes[:0]) == []


def test_nothing_left_is_no_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "in.tar", range(3))
    summary = run(
        ShardJob([str(tmp_path / "in.tar")], tmp_path / "out", config=load_filter("paper"))
    )
    assert (summary.kept, summary.shards) == (0, 0)
    assert index_of(tmp_path / "out") == []
    assert "short side" in summary.table()


def test_hostile_images_are_named(tmp_path: Path) -> None:
    grey = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    cmyk = scene(1).convert("CMYK")
    frames = [scene(seed) for seed in (4, 5, 6)]
    bomb = encode(Image.new("L", (9000, 9000)), "PNG")
    members = {
        "zero.jpg": b"",
        "aspect.png": encode(Image.new("L", (1, 4000)), "PNG"),
        "bomb.png": bomb,
        "text.jpg": b"<html>not found</html>",
        "grey16.png": png_16_bit(grey),
        "cmyk.jpg": encode(cmyk, "JPEG"),
        "moving.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }
    write_tar(tmp_path / "in.tar", list(members.items()))
    job = ShardJob([str(tmp_path / "in.tar")], tmp_path / "out", config=FilterConfig(decode=True))
    summary = run(job)
    rows = {row["id"]: row for row in read_table(tmp_path / "out" / "dropped.parquet")}
    assert {row["reason"] for row in rows.values()} == {"unreadable"}
    for name, words in {
        "zero": "the file is empty",
        "aspect": "more elongated than 20:1",
        "bomb": "exceeds the limit of 50000000 pixels",
        "text": "no image of a format",
    }.items():
        assert words in rows[name]["detail"]
    assert [row["id"] for row in index_of(tmp_path / "out")] == ["grey16", "cmyk", "moving"]
    assert (summary.images, summary.kept, summary.exit_code) == (7, 3, 2)


def test_every_record_is_accounted_for(tmp_path: Path) -> None:
    tar = write_shard(tmp_path / "in" / "a.tar", range(4))
    content = tar.read_bytes()
    tar.write_bytes(content[: content.index(b"000003.jpg") + 700])
    write_tar(tmp_path / "in" / "b.tar", [("x.txt", b"x"), ("y.jpg", jpeg(9)), ("y.jpg", jpeg(8))])
    (tmp_path / "in" / "c.tar").write_bytes(b"no tar" * 999)
    summary = run(ShardJob([str(tmp_path / "in")], tmp_path / "out"))
    assert (summary.images, summary.kept, summary.damaged_files) == (6, 4, 2)
    assert summary.dropped == {"duplicate_key": 1, "missing_image": 1}
    assert summary.images == summary.kept + sum(summary.dropped.values())
    assert summary.exit_code == 2
    named = dropped_of(tmp_path / "out")
    assert named[str(tar)] == "damaged_file"
    assert {named["x"], named["y.jpg"]} == {"missing_image", "duplicate_key"}


def test_output_within_the_input_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", range(2))
    for output in (tmp_path / "in" / "out", tmp_path / "in"):
        with pytest.raises(OutputError, match="lies in the input"):
            run(ShardJob([str(tmp_path / "in")], output))
