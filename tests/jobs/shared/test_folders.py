"""Shared folders: the same on a disk and in object stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlv.errors import OutputError
from vlv.jobs.shared.folders import open_folder


def test_files_come_and_go(place: str, tmp_path: Path) -> None:
    folder = open_folder(place)
    assert (folder.names(), folder.read("a"), folder.exists("a")) == ([], None, False)
    assert folder.create("a", b"1")
    assert not folder.create("a", b"2")
    assert folder.read("a") == b"1"
    folder.write("a", b"3")
    assert folder.create("below/b", b"4")
    (tmp_path / "local").write_bytes(b"5")
    folder.put("c", tmp_path / "local")
    assert (sorted(folder.names()), folder.names("below")) == (["a", "c"], ["b"])
    assert [open_folder(place).read(name) for name in ("a", "below/b", "c")] == [b"3", b"4", b"5"]
    for _ in range(2):
        folder.remove("a")
        folder.tidy()
    assert sorted(folder.names()) == ["c"]


@pytest.mark.parametrize("output", ["nothing-like-it://x/y", "s3+none://x"])
def test_a_protocol_that_nobody_knows_is_one_sentence(output: str) -> None:
    with pytest.raises(OutputError, match=r"cannot be used .*[Pp]rotocol"):
        open_folder(output)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        open_folder(str(tmp_path / "file"))
