"""Files that survive a crash."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from vlv.errors import CheckpointError, OutputError
from vlv.storage import (
    Journal,
    check_settings,
    check_writable,
    differences,
    lock,
    new_array,
    read_journal,
    read_settings,
    remove_temporaries,
    replacing,
    replacing_folder,
    temporary_beside,
    write_json,
    write_text,
)


def fail_half_way(path: Path) -> None:
    path.write_text("half")
    raise ZeroDivisionError


def test_a_failed_block_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old\n")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        fail_half_way(temporary)
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf8_with_lf(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "é\r\n\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"\xc3\xa9\r\n\n"


def test_a_name_at_the_limit_of_the_file_system_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write_text(path, "content")
    assert path.read_text() == "content"


@pytest.mark.parametrize("name", ["x" * 256, "no\0name"])
def test_a_disk_that_refuses_is_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="cannot be written") as caught:
        write_text(tmp_path / name, "content")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for text in ("first", "second"):
        with replacing_folder(folder) as temporary:
            (temporary / "part").mkdir()
            (temporary / "part" / "a").write_text(text)
    with pytest.raises(ZeroDivisionError), replacing_folder(folder) as temporary:
        fail_half_way(temporary / "b")
    assert (folder / "part" / "a").read_text() == "second"
    assert list(tmp_path.iterdir()) == [folder]


def test_what_killed_processes_leave_is_removed(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    temporary_beside(tmp_path / "deep" / "a").write_text("half")
    temporary_beside(tmp_path / "b").mkdir()
    (tmp_path / "kept").write_text("whole")
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "kept"]


def test_a_place_is_refused_before_the_work_for_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "a", tmp_path / ("x" * 256), tmp_path / "no\0name"):
        with pytest.raises(OutputError, match="cannot be written"):
            check_writable(tmp_path / "good", path)
    check_writable(None, tmp_path / "new" / ("x" * 255), tmp_path / "file")
    assert list((tmp_path / "new").iterdir()) == []
    assert (tmp_path / "file").read_text() == ""


def test_an_array_has_its_room_on_the_disk_before_it_is_written(tmp_path: Path) -> None:
    """A page of a sparse file that finds no room would end the process by SIGBUS."""
    path = tmp_path / "new" / "a.npy"
    array = new_array(path, np.float16, (300, 1000))
    about = path.stat()
    assert about.st_blocks * 512 >= about.st_size >= 600_000
    array[:] = 2
    array.flush()
    assert np.load(path).sum(dtype=np.float64) == 600_000


def test_an_array_without_room_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"a.npy cannot be written \(No space left"):
        new_array(tmp_path / "a.npy", np.uint8, (10,))
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_is_removed_or_replaced_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "run" / "rows.jsonl"
    with Journal(path) as journal:
        journal.append([{"id": 1}])
        path.rename(tmp_path / "other")
        path.write_bytes((tmp_path / "other").read_bytes())
        for _ in range(2):
            with pytest.raises(OutputError, match=r"rows.jsonl was removed or replaced while"):
                journal.append([{"id": 2}])
            shutil.rmtree(path.parent, ignore_errors=True)
    assert not path.parent.exists()


def test_a_journal_goes_on_after_a_torn_line_without_touching_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Journal(path) as journal:
        journal.append([{"id": "a", "text": "x\u2028y"}, {"id": "b"}])
    before = path.read_bytes()
    path.write_bytes(before + b'{"id": "c", "te')
    assert [row["id"] for row in read_journal(path)] == ["a", "b"]
    with Journal(path) as journal:
        journal.append([{"id": "d"}])
    assert path.read_bytes() == before + b'{"id": "d"}\n'
    assert next(iter(read_journal(path))) == {"id": "a", "text": "x\u2028y"}


def test_a_journal_that_is_one_torn_line_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * 200_000)
    Journal(path).close()
    assert path.read_bytes() == b""
    assert list(read_journal(tmp_path / "missing")) == []


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 1}\n[2]\n{"id": 3}\n')
    with pytest.raises(OutputError, match=r"line 2 of .*rows\.jsonl is damaged"):
        list(read_journal(path))


def test_deep_nesting_is_damage_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": ' + b"[" * 100_000 + b"\n")
    with pytest.raises(OutputError, match="line 1"):
        list(read_journal(path))


def test_rows_are_on_disk_when_append_returns(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from vlv.storage import Journal\n"
        "journal = Journal(Path(sys.argv[1])); journal.append([{'id': 1}]); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "rows.jsonl")], check=False)
    assert list(read_journal(tmp_path / "rows.jsonl")) == [{"id": 1}]


@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_full_disk_leaves_no_part_of_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "rows.jsonl"
    with Journal(path) as journal:
        journal.append([{"n": 1}])
        with monkeypatch.context() as patch:
            if call == "fsync":

                def full(descriptor: int) -> None:
                    raise OSError(28, "No space left on device")

                patch.setattr("vlv.storage.os.fsync", full)
            else:
                limits = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (15, limits[1]))
            try:
                with pytest.raises(OutputError, match=r"rows\.jsonl cannot be written"):
                    journal.append([{"n": 2}, {"n": 3}])
            finally:
                if call == "write":
                    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_text() == '{"n": 1}\n'
        journal.append([{"n": 4}])
    assert [row["n"] for row in read_journal(path)] == [1, 4]


def test_a_full_disk_behind_safetensors_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left"), replacing(tmp_path / "z"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_a_second_writer_of_a_journal_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Journal(path) as ours, Journal(path) as other:
        other.append([{"id": 1}])
        with pytest.raises(OutputError, match="another process writes"):
            ours.append([{"id": 2}])


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    second = lock(path, "out")
    with lock(path, "out"), pytest.raises(OutputError, match="another process works in out"):
        second.__enter__()
    with lock(path, "out"):
        assert path.exists()


def test_settings_that_differ_are_named_with_both_values() -> None:
    old = {"model": {"name": "a", "steps": 2}, "seed": 0, "sizes": [1, 2]}
    new = {"model": {"name": "b", "steps": 2}, "seed": 0, "sizes": (1, 2), "extra": Path("x")}
    assert [str(d) for d in differences(old, new)] == [
        "extra was None, now x",
        "model.name was a, now b",
    ]
    assert differences(old, new, free={"model.name"}, defaults={"extra": "x"}) == []
    with pytest.raises(CheckpointError, match=r"run was made with other settings \(extra was"):
        check_settings("run", old, new, mend="put it back", error=CheckpointError)
    check_settings("run", old, old)


def test_settings_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    assert read_settings(path) is None
    write_json(path, {"a": 1})
    assert read_settings(path) == {"a": 1}
    path.write_text("[]")
    with pytest.raises(OutputError, match=r"settings.json is damaged .*; name another output"):
        read_settings(path)


def test_writing_honours_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "content")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_folder_with_a_relative_path_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with replacing_folder(Path("out/model")) as temporary:
        (temporary / "part").mkdir()
        (temporary / "part" / "weights").write_text("new")
    assert (tmp_path / "out/model/part/weights").read_text() == "new"
