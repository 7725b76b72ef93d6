"""A killed job goes on with nothing lost or doubled; the number of workers changes nothing; a rerun does nothing."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.curation.files import contents, dropped_of, index_of, run, write_shard
from vlv.cli import run as vlv
from vlv.curation import job as jobs
from vlv.curation.engine import LocalEngine, make_engine
from vlv.curation.job import ShardJob
from vlv.curation.measure import MeasureTask, measure
from vlv.curation.settings import FilterConfig
from vlv.curation.shards import ShardLimits, ShardTask
from vlv.curation.shards import write_shard as write_output
from vlv.data.shards import TarShardWriter
from vlv.errors import ConfigError, DataError, OutputError

RULES = FilterConfig(decode=True, exact_duplicates=True, near_duplicates=4)


def write_shards(folder: Path) -> Path:
    """Six shards; each repeats an image of the one before, in another size."""
    for number in range(6):
        path = folder / f"{number}.tar"
        write_shard(path, range(number * 4, number * 4 + 5), (96 + 8 * number, 80))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "in")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Six shards that are only read, and what a job that nobody ends makes of them."""
    folder = tmp_path_factory.mktemp("whole")
    shards = write_shards(folder / "in")
    run(make_job(shards, folder / "out"))
    return shards, contents(folder / "out")


def make_job(shards: Path, output: Path, **changes: Any) -> ShardJob:
    return ShardJob([str(shards)], output, config=RULES, limits=ShardLimits(4), **changes)


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(shards: Path, tmp_path: Path) -> None:
    run(make_job(shards, tmp_path / "one"))
    run(make_job(shards, tmp_path / "two"), workers=2)
    one = contents(tmp_path / "one")
    assert len(one) == 7 + 4
    assert contents(tmp_path / "two") == one
    assert not multiprocessing.active_children()


class Killed(BaseException):
    """What no code catches."""


@pytest.mark.slow
@pytest.mark.parametrize("at", range(0, 15, 2))
def test_killed_anywhere_and_resumed(
    whole: tuple[Path, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    """Killed before the n-th write of any kind; then once more, two writes later."""
    shards, expected = whole
    for more in (at, 2):
        with monkeypatch.context() as patch:
            _die_after(patch, more)
            with pytest.raises(Killed):
                run(make_job(shards, tmp_path / "out"))
    measured: list[MeasureTask] = []
    monkeypatch.setattr(jobs, "measure", lambda task: measured.append(task) or measure(task))
    run(make_job(shards, tmp_path / "out"))
    assert len(measured) <= max(0, 6 - at - 2), "what was measured is not measured again"
    assert contents(tmp_path / "out") == expected


def _die_after(patch: pytest.MonkeyPatch, count: int) -> None:
    writes = itertools.count()
    replace = Path.replace

    def dying(self: Path, target: Path) -> Path:
        if "job.json" not in str(target) and next(writes) == count:
            raise Killed
        return replace(self, target)

    patch.setattr(Path, "replace", dying)


def test_finished_job_is_left_alone(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(make_job(shards, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(jobs, "measure", lambda task: pytest.fail("worked again"))
    assert run(make_job(shards, tmp_path / "out")) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_other_settings_and_inputs_are_refused(shards: Path, tmp_path: Path) -> None:
    run(make_job(shards, tmp_path / "out"))
    with pytest.raises(OutputError, match=r"rules.near_duplicates was 4, now None"):
        run(ShardJob([str(shards)], tmp_path / "out", limits=ShardLimits(4)))
    with pytest.raises(OutputError, match="command was filter, now pack"):
        run(make_job(shards, tmp_path / "out", command="pack"))
    write_shard(shards / "9.tar", [99])
    with pytest.raises(OutputError, match="other inputs, or they have changed"):
        run(make_job(shards, tmp_path / "out"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="holds other files"):
        run(make_job(shards, tmp_path / "foreign"))


def test_one_process_at_a_time(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(task: MeasureTask) -> int:
        with pytest.raises(OutputError, match="another process works in"):
            run(make_job(shards, tmp_path / "out"))
        return measure(task)

    monkeypatch.setattr(jobs, "measure", second)
    assert run(make_job(shards, tmp_path / "out")).kept > 0


def test_disk_full_while_a_shard_is_written(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_job(shards, tmp_path / "whole"))
    append, calls = TarShardWriter._append, itertools.count()

    def full(self: TarShardWriter, *rest: Any) -> None:
        if next(calls) >= 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(TarShardWriter, "_append", full)
        with pytest.raises(
            OutputError, match=r"shard-00001.tar: cannot be written \(No space left"
        ):
            run(make_job(shards, tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".work",
        "shard-00000.tar",
    ]
    run(make_job(shards, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_disk_full_while_a_table_is_written(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def full(*rest: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vlv.storage.os.fsync", full)
        with pytest.raises(OutputError, match=r"cannot be written \(No space left"):
            run(make_job(shards, tmp_path / "out"))
        patch.setattr("vlv.storage.os.fsync", lambda descriptor: next(calls) > 2 and full())
        with pytest.raises(OutputError, match="No space left"):
            run(make_job(shards, tmp_path / "out"))
    assert run(make_job(shards, tmp_path / "out")).kept > 0


def test_an_image_that_changes_on_the_way_is_noticed(shards: Path, tmp_path: Path) -> None:
    class Meddling(LocalEngine):
        def run(self, function: Any, tasks: Any) -> Any:
            yield from super().run(function, tasks)
            path = shards / "2.tar"
            content = bytearray(path.read_bytes())
            content[600:700] = bytes(100)
            path.write_bytes(content)

    with pytest.raises(DataError, match=r"2.tar at byte 512: the image has changed"):
        make_job(shards, tmp_path / "out").run(Meddling(1))


def _dies(task: Any) -> int:
    """A worker that is killed at its first try, as by the system when memory is short."""
    marker = Path(str(task)).with_suffix(".tried")
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return len(str(task))


def _always_dies(task: Any) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


@pytest.mark.slow
def test_a_dead_worker_costs_nothing(tmp_path: Path) -> None:
    tasks = [tmp_path / f"{number}" for number in range(2)]
    with LocalEngine(2) as engine:
        assert list(engine.run(_dies, tasks)) == [len(str(task)) for task in tasks]
    with LocalEngine(2) as engine, pytest.raises(DataError, match="a worker process died 3 times"):
        list(engine.run(_always_dies, tasks))
    assert not multiprocessing.active_children()


def test_engines_by_name() -> None:
    assert isinstance(make_engine("local", 2), LocalEngine)
    with pytest.raises(ConfigError, match="--ray-address has no effect"):
        make_engine("local", ray_address="auto")
    with pytest.raises(ConfigError, match="choose local or ray"):
        make_engine("spark")
    with pytest.raises(ConfigError, match="at least one"):
        LocalEngine(0)


@pytest.mark.slow
def test_kill_minus_9(shards: Path, tmp_path: Path) -> None:
    """The command itself, killed with its workers as soon as it has measured something."""
    words = ["data", "filter", str(shards), "-o", str(tmp_path / "out"), "--config", "relaxed"]
    words += ["--per-shard", "4", "--workers", "2"]
    command = [sys.executable, "-m", "vlv", *words]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob(".work/measured-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / "out" / ".0123456789ab.vlv-tmp").write_bytes(b"half")
    assert vlv(words) == 0
    assert not list((tmp_path / "out").glob(".*"))
    kept = {row["id"] for row in index_of(tmp_path / "out")}
    lost = dropped_of(tmp_path / "out")
    assert len(index_of(tmp_path / "out")) + len(lost) == 30 - 5 + 5
    assert {f"{number:06d}" for number in range(25)} == kept


def test_shard_task_without_its_index_is_written_anew(shards: Path, tmp_path: Path) -> None:
    run(make_job(shards, tmp_path / "whole"))
    done: list[ShardTask] = []

    def interrupted(task: ShardTask) -> int:
        if done:
            done[0].index.unlink()  # as if the kill had come between shard and index
            raise Killed
        done.append(task)
        return write_output(task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "write_shard", interrupted)
        with pytest.raises(Killed):
            run(make_job(shards, tmp_path / "out"))
    run(make_job(shards, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
