"""`vlv data filter`, `pack` and `split`: options, exit codes, what is printed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import Vlv
from tests.curation.files import dropped_of, index_of, jpeg, write_folder, write_shard
from vlv.curation.engine import LocalEngine


def test_filter(vlv: Vlv, tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "a.tar", range(3), (600, 520))
    write_shard(tmp_path / "in" / "b.tar", range(3, 7), (96, 80))
    arguments = ("data", "filter", tmp_path / "in", "-o", tmp_path / "out", "--workers", 1)
    arguments += ("--config", "paper")
    result = vlv(*arguments)
    assert result.code == 0
    lines = [line.split() for line in result.out.splitlines()]
    assert lines[1:] == [
        ["images", "7"],
        ["short", "side", "4", "3", "57.14", "%"],
        ["kept", "3", "42.86", "%"],
    ]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "dropped.parquet",
        "index.parquet",
        "shard-00000.tar",
        "summary.json",
        "summary.svg",
    ]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["kept"], summary["dropped"]) == (3, {"short_side": 4})
    assert summary["settings"]["rules"]["short_side_above"] == 512
    assert vlv(*arguments).out == result.out, "a finished job says the same again"
    refused = vlv(*arguments, "--set", "short_side_above=64")
    assert refused.code == 1
    assert "rules.short_side_above was 512, now 64" in refused.err


def test_filter_of_a_folder_needs_no_option(vlv: Vlv, tmp_path: Path) -> None:
    write_folder(tmp_path / "in", range(3))
    (tmp_path / "in" / "small.jpg").write_bytes(jpeg(8, (40, 30)))
    result = vlv("data", "filter", tmp_path / "in", "-o", tmp_path / "out", "--workers", 1)
    assert result.code == 0
    assert dropped_of(tmp_path / "out") == {"small.jpg": "short_side"}


def test_damage_gives_exit_code_2(vlv: Vlv, tmp_path: Path) -> None:
    write_folder(tmp_path / "in", range(3))
    (tmp_path / "in" / "x.jpg").write_bytes(b"")
    result = vlv("data", "pack", tmp_path / "in", "-o", tmp_path / "out", "--workers", 1)
    assert result.code == 2
    assert "1 images or files are damaged; each is named in" in result.err
    assert dropped_of(tmp_path / "out") == {"x.jpg": "unreadable"}


@pytest.mark.slow
def test_pack_by_number_and_bytes(vlv: Vlv, tmp_path: Path) -> None:
    write_folder(tmp_path / "in", range(7))
    pack = ("data", "pack", tmp_path / "in", "--workers", 1)
    assert vlv(*pack, "-o", tmp_path / "number", "--per-shard", 3).code == 0
    assert [row["shard"][-9:-4] for row in index_of(tmp_path / "number")] == ["00000"] * 3 + [
        "00001"
    ] * 3 + ["00002"]
    assert vlv(*pack, "-o", tmp_path / "bytes", "--shard-mb", 0.005).code == 0
    sizes: dict[str, int] = {}
    for row in index_of(tmp_path / "bytes"):
        sizes[row["shard"]] = sizes.get(row["shard"], 0) + row["size"]
    assert len(sizes) >= 3
    assert max(sizes.values()) <= 5000


def test_split(vlv: Vlv, tmp_path: Path) -> None:
    write_folder(tmp_path / "in", range(30))
    shares = ("--train", 0.5, "--val", 0.5, "--test", 0)
    command = ("data", "split", tmp_path / "in", "-o", tmp_path / "out", "--workers", 1)
    result = vlv(*command, *shares)
    assert result.code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == [
        "train",
        "val",
    ]
    train, val = (len(index_of(tmp_path / "out" / name)) for name in ("train", "val"))
    assert train + val == 30
    assert min(train, val) > 5
    assert [line.split()[:2] for line in result.out.splitlines()[-2:]] == [
        ["train", str(train)],
        ["val", str(val)],
    ]
    assert "add up to 1" in vlv(*command[:-4], "-o", tmp_path / "other", "--train", 0.5).err
    assert "seed was 0, now 1" in vlv(*command, *shares, "--seed", 1).err


def test_table(vlv: Vlv, tmp_path: Path) -> None:
    columns = {
        "URL": ["a", "b"],
        "WIDTH": [600, 600],
        "HEIGHT": [600, 100],
        "pwatermark": [0.1, 0.1],
    }
    pq.write_table(pa.table(columns), tmp_path / "laion.parquet")
    filter_ = ("data", "filter", tmp_path / "laion.parquet", "-o", tmp_path / "out", "--workers", 1)
    assert "filter a table of addresses with --table" in vlv(*filter_).err
    assert vlv(*filter_, "--table").code == 0
    assert pq.read_table(tmp_path / "out" / "part-00000.parquet").column("URL").to_pylist() == ["a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--config", "papper"), "did you mean paper"),
        (("--config", "paper"), "watermark needs the column pwatermark"),
        (("--config", "relaxed", "--ray-address", "auto"), "no effect with --engine local"),
        (("--config", "relaxed", "--set", "near_duplicates=99"), "near_duplicates is 99"),
    ],
)
def test_refusals(vlv: Vlv, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    write_folder(tmp_path / "in", range(2))
    result = vlv(
        "data", "filter", tmp_path / "in", "-o", tmp_path / "out", "--workers", 1, *options
    )
    assert result.code == 1
    assert message in result.err
    assert not (tmp_path / "out").exists()


def test_interrupted(vlv: Vlv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_shard(tmp_path / "in" / f"{number}.tar", [number])

    def interrupted(self: LocalEngine, function, tasks):  # type: ignore[no-untyped-def]
        yield function(tasks[0])
        raise KeyboardInterrupt

    command = ("data", "pack", tmp_path / "in", "-o", tmp_path / "out", "--workers", 1)
    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "run", interrupted)
        result = vlv(*command)
    assert result.code == 130
    assert "the same command goes on" in result.err
    assert vlv(*command).code == 0
    assert [row["id"] for row in index_of(tmp_path / "out")] == ["000000", "000001", "000002"]
