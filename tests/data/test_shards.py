import io
import json
import multiprocessing
import os
import tarfile

import pytest

from vlv.data.records import Span
from vlv.data.shards import TarShardWriter, shard_path
from vlv.data.source import find_records
from vlv.data.tars import index_tar
from vlv.errors import DataError, OutputError


def parts(i: int) -> dict:
    return {"png": b"pixels of %d" % i, "txt": f"caption {i}", "json": {"number": i, "word": "é"}}


def write(folder, count: int, **options) -> None:
    with TarShardWriter(folder, **options) as writer:
        for i in range(count):
            writer.write(f"{i:04d}", parts(i))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_what_is_read(tmp_path):
    write(tmp_path, 5, per_shard=2)
    assert names(tmp_path) == ["shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]
    index = index_tar(tmp_path / "shard-00001.tar")
    assert index.damage == ""
    assert list(index.keys) == ["0002", "0003"]
    spans = index.keys["0003"]
    assert spans["png"].read() == b"pixels of 3"
    assert spans["txt"].read() == b"caption 3"
    assert json.loads(spans["json"].read()) == {"number": 3, "word": "é"}


def test_other_tools_can_read_the_shards(tmp_path):
    write(tmp_path, 1)
    with tarfile.open(shard_path(tmp_path, 0)) as tar:
        assert tar.getnames() == ["0000.png", "0000.txt", "0000.json"]


def test_the_same_records_give_the_same_bytes(tmp_path):
    for name in "ab":
        write(tmp_path / name, 3)
    first, second = (shard_path(tmp_path / name, 0).read_bytes() for name in "ab")
    assert first == second


def test_an_unfinished_shard_never_bears_the_final_name(tmp_path):
    writer = TarShardWriter(tmp_path, per_shard=2)
    for i in range(3):
        writer.write(f"{i}", parts(i))
    assert names(tmp_path) == [".shard-00001.tar.vlv-tmp", "shard-00000.tar"]
    writer.close()
    assert names(tmp_path) == ["shard-00000.tar", "shard-00001.tar"]
    writer.close()  # nothing left to do
    assert len(names(tmp_path)) == 2


def break_off(writer: TarShardWriter) -> None:
    with writer:
        for i in range(3):
            writer.write(f"{i}", parts(i))
        raise KeyError


def test_an_exception_discards_the_unfinished_shard(tmp_path):
    with pytest.raises(KeyError):
        break_off(TarShardWriter(tmp_path, per_shard=2))
    assert names(tmp_path) == ["shard-00000.tar"]


def test_what_a_killed_writer_left_is_overwritten(tmp_path):
    (tmp_path / ".shard-00000.tar.vlv-tmp").write_bytes(b"torn" * 10_000)
    write(tmp_path, 1)
    assert names(tmp_path) == ["shard-00000.tar"]
    assert list(index_tar(shard_path(tmp_path, 0)).keys) == ["0000"]


def test_a_complete_shard_is_never_overwritten(tmp_path):
    write(tmp_path, 1)
    before = shard_path(tmp_path, 0).read_bytes()
    with pytest.raises(OutputError, match=r"shard-00000\.tar exists already"):
        write(tmp_path, 2)
    assert shard_path(tmp_path, 0).read_bytes() == before


def write_one_shard(folder, number: int) -> None:
    with TarShardWriter(folder, per_shard=2, index=number) as writer:
        for i in (2 * number, 2 * number + 1):
            writer.write(f"{i:04d}", parts(i))


def test_processes_write_shards_of_one_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_one_shard, args=(tmp_path, n)) for n in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert names(tmp_path) == ["shard-00000.tar", "shard-00001.tar"]


@pytest.mark.parametrize("key", ["", "a.b", "folder/", "0000", "./x"])
def test_keys_that_cannot_be_told_apart_are_refused(tmp_path, key):
    writer = TarShardWriter(tmp_path)
    writer.write("0000", parts(0))
    with pytest.raises(OutputError, match="is no key"):
        writer.write(key, parts(1))
    writer.discard()


def test_keys_may_have_folders_and_be_long(tmp_path):
    keys = ["v1.2/a", "b" * 150]
    with TarShardWriter(tmp_path) as writer:
        for key in keys:
            writer.write(key, parts(0))
    assert list(index_tar(shard_path(tmp_path, 0)).keys) == keys


@pytest.mark.parametrize("when", ["write", "rename"])
def test_a_full_disk_leaves_no_torn_shard(tmp_path, monkeypatch, when):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    writer = TarShardWriter(tmp_path)
    writer.write("0000", parts(0))
    if when == "write":
        monkeypatch.setattr(tarfile.TarFile, "addfile", full)
        with pytest.raises(OutputError, match=r"shard-00000\.tar: .*No space left"):
            writer.write("0001", parts(1))
    else:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"shard-00000\.tar: .*No space left"):
            writer.close()
    assert names(tmp_path) == []


def test_per_shard_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="not 0"):
        TarShardWriter(tmp_path, per_shard=0)


# Reading


def tar_bytes(members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_and_suffixes_follow_webdataset(tmp_path, format):
    members = [
        ("./d.x/a.PNG", b"1"),
        ("d.x/a.seg.png", b"2"),
        ("d.x/b.jpg", b"3"),
        ("._a.png", b"4"),
    ]
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(members, format))
    index = index_tar(path)
    assert {key: sorted(found) for key, found in index.keys.items()} == {
        "d.x/a": ["png", "seg.png"],
        "d.x/b": ["jpg"],
    }
    assert index.keys["d.x/a"]["seg.png"].read() == b"2"


def test_members_of_a_key_need_not_lie_together(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes([("a.png", b"1"), ("b.png", b"2"), ("a.txt", b"3")]))
    assert sorted(index_tar(path).keys["a"]) == ["png", "txt"]


def test_a_member_that_occurs_twice_is_an_error(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes([("a.png", b"1"), ("a.png", b"2")]))
    assert index_tar(path).repeated == ["a.png"]
    with pytest.raises(DataError, match=r"x\.tar: the member a\.png occurs twice"):
        find_records([path])


def test_every_truncation_is_noticed(tmp_path):
    """Cut at the borders of blocks and within them: only whole members are listed."""
    members = [(f"{i}.png", bytes([i]) * 700) for i in range(4)]
    whole = tar_bytes(members)
    path = tmp_path / "x.tar"
    each = 512 + 1024
    for cut in range(256, 4 * each + 1, 256):
        path.write_bytes(whole[:cut])
        if cut < 512:
            with pytest.raises(DataError, match=r"x\.tar: this is no tar"):
                index_tar(path)
            continue
        index = index_tar(path)
        assert "truncated" in index.damage
        complete = [str(i) for i in range(4) if i * each + 512 + 700 <= cut]
        assert list(index.keys) == complete
    path.write_bytes(whole[: 4 * each + 512])
    assert index_tar(path).damage == ""


def test_a_damaged_header_is_noticed(tmp_path):
    data = bytearray(tar_bytes([("a.png", b"1"), ("b.png", b"2"), ("c.png", b"3")]))
    data[1024 + 3] ^= 0xFF
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    index = index_tar(path)
    assert list(index.keys) == ["a"]
    assert "damaged" in index.damage


@pytest.mark.parametrize("data", [b"", b"not a tar" * 100, b"\0" * 300])
def test_files_that_are_no_tar(tmp_path, data):
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.tar: this is no tar"):
        index_tar(path)
    with pytest.raises(DataError, match=r"y\.tar: cannot be read"):
        index_tar(tmp_path / "y.tar")


def test_a_file_that_shrank_after_indexing(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert Span(path, 1, 3).read() == b"234"
    with pytest.raises(DataError, match="shorter than when it was indexed"):
        Span(path, 3, 3).read()
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        Span(path, 0, 1).read()
