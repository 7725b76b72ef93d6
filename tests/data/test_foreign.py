"""What strange files do: they are refused or named in one sentence, at once, and never end or hold up a job."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import files
from vlv.curation.measure import measure_part
from vlv.curation.settings import FilterConfig
from vlv.data.foreign import parse_json, printable, read_file
from vlv.data.images import load_image
from vlv.data.quarantine import Quarantine
from vlv.data.records import BadRecord, Columns, Record
from vlv.data.source import Source, find_records
from vlv.errors import DataError, ImageError

PNG = files.noise_png(0)
DEEP = "[" * 100_000 + "]" * 100_000


def put_in_tar(path: Path, members: list[tuple[tarfile.TarInfo | str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for about, data in members:
            info = tarfile.TarInfo(about) if isinstance(about, str) else about
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def streamed(path: Path) -> list[Record | BadRecord]:
    return list(Source([path]).stream())


# Arrays and pixels


@pytest.mark.parametrize(
    "shape", ["(3, 100000, 100000000)", f"(3, {10**23}, {10**23})", "(3, -4, 4)", "(3, 0, 0)"]
)
def test_the_header_of_an_array_is_not_believed(tmp_path: Path, shape: str) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    bomb = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    (tmp_path / "x.png").write_bytes(bomb)
    pq.write_table(pa.table({"image": [bomb]}), tmp_path / "x.parquet")
    for record in find_records([tmp_path / "x.png", tmp_path / "x.parquet"]):
        with pytest.raises(ImageError):
            record.load()


def test_bare_pixels_are_believed_in_tables_alone(tmp_path: Path) -> None:
    page = b"<!doctype html>".ljust(768)
    (tmp_path / "page.png").write_bytes(page)
    put_in_tar(tmp_path / "x.tar", [("page.png", page)])
    pq.write_table(pa.table({"image": [page]}), tmp_path / "x.parquet")
    *others, cell = find_records([tmp_path / name for name in ("page.png", "x.tar", "x.parquet")])
    for record in (*others, *streamed(tmp_path / "x.tar")):
        assert isinstance(record, Record)
        with pytest.raises(ImageError, match="no image of a format"):
            record.decode(record.open())
    assert cell.load().size == (16, 16)


def test_whatever_a_decoder_raises_is_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class StrangeError(Exception):
        pass

    def fail(*args: object) -> None:
        raise StrangeError("out of the blue")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(PNG)


# Text


def test_a_file_name_that_is_no_unicode(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"bad\xff.png")  # noqa: PTH118
    Path(os.fsdecode(path)).write_bytes(PNG)
    (record,) = find_records([tmp_path])
    assert record.id == r"bad\xff.png"
    assert record.name == rf"{tmp_path}/bad\xff.png"
    assert record.load().size == (24, 24)
    Path(os.fsdecode(path)).write_bytes(b"")
    with pytest.raises(ImageError) as error:
        record.load()
    quarantine = Quarantine(tmp_path / "bad.jsonl", 1.0, 1)
    quarantine.count(record, str(error.value))
    assert json.loads((tmp_path / "bad.jsonl").read_text("utf-8"))["id"] == record.id


def test_lone_surrogates(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    line = r'{"file_name": "a.png", "caption": "x \ud83d y", "m\udc00": ["\ud83d\ude00"]}'
    (tmp_path / "a.jsonl").write_text(line)
    put_in_tar(tmp_path / "a.tar", [("a.png", PNG), ("a.json", line.encode())])
    for name in ("a.jsonl", "a.tar"):
        (record,) = find_records([tmp_path / name])
        assert record.caption == "x \ufffd y"
        assert record.meta is not None
        assert record.meta["m\ufffd"] == ["\U0001f600"]
        json.dumps(record.meta, ensure_ascii=False).encode()


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    caption = "one\u2028two\x85three\x0cfour"
    row = json.dumps({"file_name": "a.png", "caption": caption}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"{row}\r\n{row}\n", newline="")
    assert [record.caption for record in find_records([tmp_path / "a.jsonl"])] == [caption] * 2
    bad = tmp_path / "bad.jsonl"
    for name in ("b\u2028c", "d"):
        quarantine = Quarantine(bad, 1.0, 1)
        quarantine.count(Record("b\u2028c", tmp_path), "bad")
        quarantine.count(Record(name, tmp_path), "bad")
    assert len(bad.read_text("utf-8").split("\n")) == 3, "each is written once"


def test_deep_json(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    deep = f'{{"file_name": "a.png", "x": {DEEP}}}'
    (tmp_path / "a.jsonl").write_text(deep)
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: the JSON is nested too deeply"):
        find_records([tmp_path / "a.jsonl"])
    put_in_tar(tmp_path / "a.tar", [("a.png", PNG), ("a.json", deep.encode())])
    (record,) = find_records([tmp_path / "a.tar"])
    with pytest.raises(DataError, match="nested too deeply"):
        _ = record.meta
    with pytest.raises(DataError, match="nested too deeply"):
        parse_json("[" * 201 + "]" * 201, "x")
    assert parse_json("[" * 200 + "]" * 200, "x")


def test_a_tar_of_thousands_of_extended_headers(tmp_path: Path) -> None:
    header, content = tarfile.TarInfo("x"), b"13 comment=x\n"
    header.type, header.size = tarfile.XHDTYPE, len(content)
    (tmp_path / "a.tar").write_bytes((header.tobuf() + content.ljust(512, b"\0")) * 3000)
    with pytest.raises(DataError, match=r"a\.tar: "):
        find_records([tmp_path / "a.tar"])
    (bad,) = streamed(tmp_path / "a.tar")
    assert isinstance(bad, BadRecord)


@pytest.mark.parametrize("size", [10**30, 2**62, -2048])
def test_a_member_of_an_absurd_size_ends_the_tar(tmp_path: Path, size: int) -> None:
    member = tarfile.TarInfo("a.png")
    member.pax_headers = {"size": str(size)}
    path = put_in_tar(tmp_path / "a.tar", [("b.png", PNG), (member, PNG)])
    good, bad = streamed(path)
    assert good.id == f"{path}/b"
    assert isinstance(bad, BadRecord)
    assert [record.id for record in find_records([path], on_damage="keep")] == ["b"]


# What is no regular file, and what has no end


@pytest.mark.parametrize("name", ["b.png", "b.tar", "b.parquet", "b.jsonl", "b.safetensors"])
def test_fifos_are_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="no regular file"):
        find_records([tmp_path / name])[0].load()
    if name in ("b.tar", "b.parquet"):
        (bad,) = streamed(tmp_path / name)
        assert isinstance(bad, BadRecord)


def test_fifos_beside_an_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    os.mkfifo(tmp_path / "a.txt")
    (record,) = find_records([tmp_path])
    assert record.caption is None
    assert "a.txt: cannot be read (it is no regular file)" in caplog.text


def test_devices_are_refused(tmp_path: Path) -> None:
    (tmp_path / "z.png").symlink_to("/dev/zero")
    (tmp_path / "z.jsonl").write_text('{"file_name": "/dev/zero"}')
    columns = Columns(image_root="/dev")
    for record in find_records([tmp_path / "z.png", tmp_path / "z.jsonl"], columns=columns):
        for read in (record.open, record.load):
            with pytest.raises(DataError, match="no regular file"):
                read()
    with pytest.raises(DataError, match="no regular file"):
        read_file("/dev/zero")
    with pytest.raises(DataError, match="cannot be read"):
        read_file(tmp_path / "with\0nul")


def test_a_file_over_the_limit_is_not_read_on(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="larger than the limit of 1000 bytes"):
        read_file(tmp_path / "big", 1000)


def test_a_sparse_member_is_no_image(tmp_path: Path) -> None:
    """A tar of a few blocks whose member says that it is 5 GiB."""
    info = tarfile.TarInfo("a.png")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398] = b"00000000000\0"  # where the only piece begins
    header[398:410] = b"00000000000\0"  # its size
    header[483:495] = b"%011o\0" % (5 * 2**30)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    sound = put_in_tar(tmp_path / "b.tar", [("b.png", PNG)]).read_bytes()
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(header) + sound)
    with tarfile.open(path) as tar:
        assert tar.getmember("a.png").size == 5 * 2**30
    assert [record.id for record in find_records([path])] == ["b"]
    assert [entry.id for entry in streamed(path)] == [f"{path}/b"]


def test_of_a_member_that_occurs_twice_the_first_counts_listed_and_streamed(tmp_path: Path) -> None:
    other = files.noise_png(1)
    path = put_in_tar(tmp_path / "a.tar", [("a.png", PNG), ("a.png", other), ("b.png", other)])
    listed = find_records([path], on_damage="keep")
    passing = [entry for entry in streamed(path) if isinstance(entry, Record)]
    assert [record.open() for record in listed] == [PNG, other]
    assert [record.open() for record in passing] == [PNG, other]


def test_a_large_member_is_not_taken_into_memory(tmp_path: Path) -> None:
    path = put_in_tar(tmp_path / "a.tar", [("a.png", bytes(20_000_001)), ("b.png", PNG)])
    bad, good = streamed(path)
    assert isinstance(bad, BadRecord)
    assert bad.reason.endswith("/a: larger than the limit of 20000000 bytes")
    assert isinstance(good, Record)


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE],
    ids=["symbolic link", "hard link", "FIFO", "device", "folder"],
)
def test_what_is_no_file_in_a_tar_is_passed_over_listed_and_streamed(
    tmp_path: Path, kind: bytes
) -> None:
    link = tarfile.TarInfo("b.png")
    link.type, link.linkname = kind, "a.png" if kind == tarfile.LNKTYPE else "/etc/hostname"
    path = put_in_tar(tmp_path / "a.tar", [("a.png", PNG), (link, b""), ("c.png", PNG)])
    assert [entry.id for entry in streamed(path)] == [f"{path}/a", f"{path}/c"]
    assert [record.id for record in find_records([path])] == ["a", "c"]


# Paths in tables


@pytest.mark.parametrize("kind", ["absolute", "relative", "link"])
def test_a_table_of_structs_names_only_files_below_itself(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "in.png").write_bytes(PNG)
    (tmp_path / "out.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    outside = {"absolute": str(tmp_path / "out.png"), "relative": "../out.png", "link": "link.png"}
    cells = [
        {"bytes": None, "path": name}
        for name in ("images/in.png", str(folder / "images" / "in.png"), outside[kind])
    ]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(cells, struct)}), folder / "x.parquet")
    for records in (find_records([folder / "x.parquet"]), streamed(folder / "x.parquet")):
        *inside, other = records
        for record in inside:
            assert isinstance(record, Record)
            assert record.open() == PNG
        assert isinstance(other, Record)
        with pytest.raises(DataError, match="lies outside the folder of its table"):
            other.open()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tables_name_images_below_their_folder_or_the_root_alone(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, other = tmp_path / "set", tmp_path / "other"
    for path in (folder / "in" / "a.png", other / "b.png", tmp_path / "c.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
    (folder / "link").symlink_to(tmp_path)
    names = ["in/a.png", str(folder / "in" / "a.png"), "../other/b.png", "link/c.png"]
    names += ["link/other/../set/in/a.png", "link/../c.png", str(tmp_path / "c.png")]
    table = write_names(folder / f"x{suffix}", names)
    inside = [str(record.source) for record in find_records([table])]
    assert inside == [str(folder / name) for name in (*names[:2], names[4])]
    assert "../other/b.png lies outside the folder of its table" in caplog.text
    with_root = find_records([table], columns=Columns(image_root=str(other)))
    assert [str(record.source) for record in with_root][2] == str(folder / names[2])
    with pytest.raises(DataError, match="lies outside the folder of its table"):
        find_records([write_names(folder / f"y{suffix}", names[2:4])])


def write_names(path: Path, names: list[str]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"file_name": name}) + "\n" for name in names))
    else:
        pq.write_table(pa.table({"file_name": names}), path)
    return path


# Names


def test_names_in_files_are_names_and_nothing_is_written_or_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths that lead out of a tar, and a command in a table."""
    folder = tmp_path / "set"
    folder.mkdir()
    monkeypatch.chdir(folder)
    put_in_tar(
        folder / "x.tar", [("../../out.png", PNG), ("/abs/y.png", PNG), ("a/../../b.png", PNG)]
    )
    commands = [f"pipe:touch {tmp_path}/run", "pipe:touch run", "file:///etc/hostname"]
    table = [json.dumps({"file_name": name}) for name in commands]
    (folder / "x.jsonl").write_text("\n".join(table))
    before = set(tmp_path.rglob("*"))
    for record in (*find_records(["x.tar"]), *streamed(folder / "x.tar")):
        assert isinstance(record, Record)
        assert record.load().size == (24, 24)
    for record in Source(["x.jsonl"]).records():
        with pytest.raises(DataError, match=r"\(No such file or directory\)"):
            record.open()
    assert set(tmp_path.rglob("*")) == before


def test_control_characters_in_names_are_refused_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.png", "line\nfeed.png"):
        (tmp_path / name).write_bytes(PNG)
    lines = [{"file_name": "a.png"}, {"file_name": "a\0.png"}, {"file_name": "a.png", "id": "b\0"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ids = {"image": [PNG] * 2, "id": ["good", "e\x1bvil"]}
    pq.write_table(pa.table(ids), tmp_path / "x.parquet")
    member = tarfile.TarInfo("x")
    member.pax_headers = {"path": "c\0.png"}
    put_in_tar(tmp_path / "x.tar", [("good.png", PNG), (member, PNG)])
    for name, expected, bad in (
        ("", ["a.png", "good"], [r"line\x0afeed.png", r"c\x00"]),
        ("x.jsonl", ["a.png"], [r"a\x00.png", r"b\x00"]),
        ("x.parquet", ["good"], [r"e\x1bvil"]),
    ):
        caplog.clear()
        assert [record.id for record in find_records([tmp_path / name])] == expected
        assert all(text in caplog.text for text in bad)
        assert caplog.text.count("holds a control character") == len(bad)
    for name in ("x.tar", "x.parquet"):
        good, refused = streamed(tmp_path / name)
        assert isinstance(good, Record)
        assert isinstance(refused, BadRecord)
        assert "holds a control character" in refused.reason


def test_reasons_have_one_line(tmp_path: Path) -> None:
    put_in_tar(tmp_path / "x.tar", [("a\nb.txt", b"x"), ("c.png", PNG)])
    bad, good = streamed(tmp_path / "x.tar")
    assert isinstance(bad, BadRecord)
    assert bad.reason.endswith(r"/a\x0ab: the sample has no image")
    assert isinstance(good, Record)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [PNG]}), path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes()[:4] + bytes(20) + path.read_bytes()[24:])
    (row,) = measure_part(Source([path], detail="all").parts()[0], FilterConfig())
    assert "cannot be read as Parquet (" in row["detail"]
    assert "\n" not in row["detail"]


def test_whatever_pyarrow_raises_is_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `ArrowNotImplementedError`, which a type of 7 bits in the schema brings about."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [PNG], "caption": ["a"]}), path)
    (record,) = find_records([path])

    def fail(*args: object, **options: object) -> None:
        raise pa.ArrowNotImplementedError("integers of\n7 bits")

    for name, read in (
        ("iter_batches", record.open),
        ("iter_batches", lambda: find_records([path])),
        ("__init__", lambda: find_records([path])),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(pq.ParquetFile, name, fail)
            with pytest.raises(DataError, match=r"x\.parquet.*: cannot be read.*\(integers of\)"):
                read()
            if name != "read_row_group":
                (bad,) = streamed(path)
                assert isinstance(bad, BadRecord)


def test_names_are_shown_as_they_can_be_written() -> None:
    assert printable("bild-\u00e9.png") == "bild-\u00e9.png"
    assert printable(os.fsdecode(b"\xc3\xa9\xff.png")) == r"é\xff.png"


def test_all_the_numbers_of_an_array_are_needed(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((3, 20, 20), np.uint8))
    pq.write_table(pa.table({"image": [buffer.getvalue() + b"x"]}), tmp_path / "x.parquet")
    with pytest.raises(ImageError, match="not as long as it says"):
        find_records([tmp_path / "x.parquet"])[0].load()
