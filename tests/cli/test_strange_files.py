"""A folder from the web with everything that once ended or held up a job: the rest of it is done, and each is named."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.cli.conftest import Vlv, write_image
from tests.data.files import encode, noise_png
from tests.data.test_image_costs import with_scans
from vlv.jobs.formats import read_rows

BAD = {
    "array.png": "no image of a format",
    "page.png": "no image of a format",
    "pipe.png": "no regular file",
    "zero.png": "no regular file",
    "scans.jpg": "scans, above the limit",
    "long.png": "more elongated than 20:1",
    "empty.png": "empty",
}
GOOD = ("1.png", r"bad\xff.png", "deep.png", "half.png", "numbers.tiff")
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def web(tmp_path: Path) -> Path:
    folder = tmp_path / "web"
    write_image(folder / "1.png")
    for name in ("deep.png", "half.png", os.fsdecode(b"bad\xff.png"), "line\nfeed.png"):
        (folder / name).write_bytes(noise_png(len(name)))
    (folder / "deep.json").write_text(DEEP)
    (folder / "half.json").write_text('{"caption": "x \\ud83d y", "n": ' + "9" * 5000 + "}")
    Image.fromarray(np.linspace(-3, 9, 1024, dtype=np.float32).reshape(32, 32)).save(
        folder / "numbers.tiff"
    )
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (3, 100000, 100000000), }\n"
    head = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    (folder / "array.png").write_bytes(head)
    (folder / "page.png").write_bytes(b"<!doctype html>".ljust(768))
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "1.txt")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "scans.jpg").write_bytes(with_scans(2000))
    (folder / "long.png").write_bytes(encode(Image.new("RGB", (500, 5)), "PNG"))
    (folder / "empty.png").touch()
    return folder


def test_captions_of_all_that_can_be_read(
    vlv: Vlv, web: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    command = ("caption", web, "--model", tiny_folder, "--max-new-tokens", 3, "-o", output)
    result = vlv(*command)
    assert result.code == 2
    rows = {row["id"]: row for row in read_rows(output)}
    assert sorted(rows) == sorted([*GOOD, *BAD])
    for name, reason in BAD.items():
        assert reason in rows[name]["error"], name
    assert all(rows[name]["error"] is None for name in GOOD)
    assert r"line\x0afeed.png: the name holds a control character" in result.err
    again = vlv(*command)
    assert f"skipped {len(GOOD)}, failed {len(BAD)}" in again.err


def test_sidecars_beside_all_that_can_be_read(vlv: Vlv, web: Path, tiny_folder: Path) -> None:
    (web / "1.txt").unlink()
    command = ("caption", web, "--model", tiny_folder, "--max-new-tokens", 3)
    assert vlv(*command, "--sidecar", ".txt").code == 2
    written = sorted(path.name for path in web.glob("*.txt"))
    assert written == sorted(
        os.fsdecode(name)
        for name in (b"1.txt", b"bad\xff.txt", b"deep.txt", b"half.txt", b"numbers.txt")
    )


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
def test_the_filter_and_the_check_name_what_is_bad(
    vlv: Vlv, web: Path, tmp_path: Path, packed: bool
) -> None:
    source = pack(web, tmp_path / "web.tar") if packed else web
    bad = BAD.keys() - {"pipe.png", "zero.png"} if packed else BAD
    result = vlv("data", "filter", source, "-o", tmp_path / "out", "--workers", 1)
    assert result.code in (0, 2)
    rows = pq.read_table(tmp_path / "out" / "dropped.parquet").to_pylist()
    lost = {row["id"].rpartition("/")[2]: row for row in rows}
    for name in bad:
        row = lost.get(name) or lost[name.rpartition(".")[0]]
        assert row["detail"], name
        assert "\n" not in row["detail"], name
    assert any("control character" in (row["detail"] or "") for row in rows)
    checked = vlv("data", "check", source)
    assert checked.code == 2
    assert r"line\x0afeed" in checked.out + checked.err


def pack(folder: Path, path: Path) -> Path:
    """All regular files of a folder, and a link, in a tar."""
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.iterdir()):
            if file.is_file() and not file.is_symlink():
                info = tarfile.TarInfo(file.name)
                info.size = file.stat().st_size
                tar.addfile(info, io.BytesIO(file.read_bytes()))
        link = tarfile.TarInfo("zz.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    return path


@pytest.mark.slow
def test_tables_from_elsewhere(vlv: Vlv, tiny_folder: Path, tmp_path: Path) -> None:
    """Deep and damaged lines are named; images outside are left out; vlv's own lines are read whatever they hold."""
    folder, model = tmp_path / "set", ("--model", tiny_folder, "--max-new-tokens", 3)
    write_image(folder / "a.png")
    secret = write_image(tmp_path / "secret.png")
    rows = [{"file_name": "a.png", "caption": "one\u2028two"}, {"file_name": str(secret)}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "x.jsonl").write_text(text)
    result = vlv("caption", folder / "x.jsonl", *model)
    assert result.code == 0
    assert "secret.png lies outside the folder of its table" in result.err
    both = vlv("caption", folder / "x.jsonl", *model, "--image-root", tmp_path)
    assert (both.code, both.out.count("\n")) == (0, result.out.count("\n") + 1)
    (folder / "x.jsonl").write_text(text + f'{{"file_name": "a.png", "x": {DEEP}}}\n')
    result = vlv("caption", folder / "x.jsonl", *model)
    assert result.code == 1
    assert "x.jsonl, line 3: the JSON is nested too deeply" in result.err
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": noise_png(0), "path": None}, {"bytes": None, "path": str(secret)}]
    pq.write_table(pa.table({"image": pa.array(cells, struct)}), folder / "x.parquet")
    result = vlv("caption", folder / "x.parquet", *model, "-o", tmp_path / "p.jsonl")
    assert result.code == 2
    good, bad = read_rows(tmp_path / "p.jsonl")
    assert good["error"] is None
    assert "lies outside the folder of its table" in bad["error"]


ON_TABLES: dict[str, Callable[[Path, Path], list[object]]] = {
    "filter": lambda table, out: ["data", "filter", table, "-o", out, "--workers", 1],
    "pack": lambda table, out: ["data", "pack", table, "-o", out, "--workers", 1],
    "split": lambda table, out: ["data", "split", table, "-o", out, "--workers", 1],
    "check": lambda table, out: ["data", "check", table, "--workers", 1],
    "stats": lambda table, out: ["data", "stats", table, "-o", f"{out}.html", "--workers", 1],
    "mix": lambda table, out: ["mix", table, "-o", f"{out}.png", "--steps", 1, "--weights", ".5,.5"],
    "demo": lambda table, out: ["demo", table, "-o", f"{out}.html", "--steps", 1],
    "predict": lambda table, out: ["eval", "predict", "arena", "--run-dir", out, "--from", "true", "--images", table],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("command", ON_TABLES)
def test_every_command_follows_paths_only_below_a_root_that_was_named(
    vlv: Vlv, tiny_folder: Path, tmp_path: Path, command: str, kind: str
) -> None:
    """Lines of JSON, and the paths in the structs of a Parquet file."""
    model = ("--model", tiny_folder) if command in ("mix", "demo") else ()
    outside = [write_image(tmp_path / "secret" / f"{n}.png", n, (160, 140)) for n in range(2)]
    table = table_of(tmp_path / "set", outside, kind)
    refused = vlv(*ON_TABLES[command](table, tmp_path / "refused"), *model)
    if (command, kind) == ("predict", "parquet"):
        assert refused.code == 0, "captions of the table are compared, and no image is opened"
    else:
        assert refused.code != 0
    if command in ("filter", "pack", "split"):
        rows = pq.read_table(tmp_path / "refused" / "dropped.parquet").to_pylist()
        assert [OUTSIDE in row["detail"] for row in rows] == [True, True]
    elif kind == "jsonl" and command != "stats":
        assert OUTSIDE in refused.out + refused.err
    root = ("--image-root", tmp_path / "secret")
    read = vlv(*ON_TABLES[command](table, tmp_path / "read"), *root, *model)
    assert read.code == 0, read
    if command in ("filter", "pack", "split"):
        indexes = (tmp_path / "read").rglob("index.parquet")
        assert sum(pq.read_metadata(path).num_rows for path in indexes) == 2


OUTSIDE = "lies outside the folder of its table"


def table_of(folder: Path, images: list[Path], kind: str) -> Path:
    """A table that names images elsewhere, with captions."""
    folder.mkdir()
    table = folder / f"x.{kind}"
    if kind == "parquet":
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        cells = pa.array([{"bytes": None, "path": str(path)} for path in images], struct)
        pq.write_table(pa.table({"image": cells, "caption": ["a cube"] * len(images)}), table)
    else:
        rows = [{"file_name": str(path), "caption": "a cube"} for path in images]
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def test_an_image_root_without_effect_is_refused(vlv: Vlv, tmp_path: Path) -> None:
    for command in (
        ("demo",),
        ("eval", "predict", "arena", "--run-dir", tmp_path / "run", "--from", "true"),
        ("data", "filter", "x.parquet", "-o", tmp_path / "out", "--table"),
    ):
        result = vlv(*command, "--image-root", tmp_path)
        assert result.code == 1
        assert "--image-root has no effect with" in result.err
