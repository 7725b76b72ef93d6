"""Whatever the disk does, and whenever the process dies: a complete checkpoint is found afterwards."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from vlv.errors import OutputError
from vlv.training import checkpoint as module
from vlv.training.checkpoint import latest_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ERRORS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EINTR]
OPERATIONS: list[tuple[Any, str]] = [
    (os, "mkdir"),
    (os, "open"),
    (os, "fsync"),
    (os, "rename"),
    (os, "close"),
    (shutil, "rmtree"),
    (shutil, "disk_usage"),
    (module, "save_file"),
    (module, "safe_open"),
    (Path, "write_text"),
    (Path, "read_text"),
    (Path, "open"),
]


def save(folder: Path, step: int, *, keep_last: int = 2) -> None:
    tensors = {
        name: {"w": torch.full((300,), float(step)), "v": torch.arange(7.0)}
        for name in ("trainable", "ema", "optimizer")
    }
    save_checkpoint(folder, tensors, {"step": step}, keep_last=keep_last)


def loaded_step(folder: Path) -> int:
    """The step of the newest good checkpoint, after reading all of it."""
    found = latest_checkpoint(folder)
    assert found is not None
    for name in ("trainable", "ema", "optimizer"):
        tensors = found.tensors(name)
        assert tensors["w"].tolist() == [float(found.step)] * 300
        assert tensors["v"].tolist() == list(range(7))
    return found.step


def faulty(
    patch: pytest.MonkeyPatch,
    number: int,
    fault: Callable[[Callable[[], Any], Any], Any],
    operations: list[tuple[Any, str]] = OPERATIONS,
) -> list[int]:
    """Let operation `number`, counted from 0, go wrong; the count of operations so far is returned."""
    count = [0]

    def wrap(plain: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == number + 1:
                return fault(lambda: plain(*args, **kwargs), args)
            return plain(*args, **kwargs)

        return call

    for owner, name in operations:
        patch.setattr(owner, name, wrap(getattr(owner, name)))
    return count


def faults() -> Iterator[tuple[str, Any, list[tuple[Any, str]]]]:
    """Kinds of faults and where they can happen: an error before the operation, one after it, half a file written."""
    for code in ERRORS:

        def before(plain: Callable[[], Any], args: Any, code: int = code) -> Any:
            raise OSError(code, os.strerror(code))

        yield errno.errorcode[code], before, OPERATIONS

    def after(plain: Callable[[], Any], args: Any) -> Any:
        plain()
        raise OSError(errno.EIO, "after it was done")

    def half(plain: Callable[[], Any], args: Any) -> Any:
        value = plain()
        (file,) = (argument for argument in args if isinstance(argument, Path))
        os.truncate(file, file.stat().st_size // 2)
        return value

    yield "after", after, OPERATIONS
    yield "half", half, [(module, "save_file"), (Path, "write_text")]


@pytest.mark.slow
def test_no_fault_leaves_a_torn_checkpoint(tmp_path: Path) -> None:
    injected = failed = 0
    for name, fault, operations in faults():
        for number in range(1000):
            folder = tmp_path / f"{name}-{number}"
            save(folder, 1)
            with pytest.MonkeyPatch.context() as patch:
                count = faulty(patch, number, fault, operations)
                try:
                    save(folder, 2, keep_last=1)
                    saved = True
                except (OSError, OutputError):
                    saved = False
            if count[0] <= number:
                break
            injected += 1
            failed += not saved
            assert loaded_step(folder) in ((2,) if saved else (1, 2)), (name, number)
            save(folder, 3, keep_last=1)
            assert loaded_step(folder) == 3
            assert not list(folder.glob(".*"))
    assert injected >= 200
    assert failed >= 100


@pytest.mark.slow
def test_no_kill_leaves_a_torn_checkpoint(tmp_path: Path) -> None:
    steps = set()
    for number in range(1000):
        folder = tmp_path / str(number)
        save(folder, 1)
        child = os.fork()
        if not child:
            with pytest.MonkeyPatch.context() as patch:
                count = faulty(patch, number, lambda plain, args: os._exit(9))
                save(folder, 2)
                os._exit(0 if count[0] <= number else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            break
        assert code == 9
        steps.add(loaded_step(folder))
        save(folder, 3)
        assert loaded_step(folder) == 3
        assert not list(folder.glob(".*"))
    assert number >= 30
    assert steps == {1, 2}


def test_room_is_looked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(module, "save_file", lambda *args: pytest.fail("written anyway"))
    with pytest.raises(OutputError, match=r"needs 1,0.* bytes and 5,000 are free"):
        save(tmp_path, 2)
    assert loaded_step(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_best_is_kept_beside_the_last(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_checkpoint(tmp_path, {}, {"step": step}, keep_last=1, keep=[2])
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "6"]
