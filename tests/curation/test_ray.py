"""The same operators on Ray Data: the same bytes, a lost worker's task done again, nothing left running."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.curation.files import contents, run, write_folder, write_shard
from tests.jobs.shared.test_worker import Lister, files_of, no_model
from vlv.curation.engine import make_engine
from vlv.curation.job import ShardJob
from vlv.curation.settings import load_filter
from vlv.curation.shards import ShardLimits
from vlv.data.source import Source
from vlv.errors import ConfigError, DataError
from vlv.jobs.shared.worker import ShardMaker, SharedWork, Worker

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with make_engine("ray", workers=2) as engine:
        yield engine
    ours = [process.name() for process in psutil.Process().children(recursive=True)]
    assert not [name for name in ours if "ray" in name or "gcs" in name], ours


def make_job(tmp_path: Path, output: str) -> ShardJob:
    for number in range(4):
        shard = tmp_path / "in" / f"{number}.tar"
        if not shard.exists():
            write_shard(shard, range(number * 4, number * 4 + 6))
    rules = load_filter("relaxed")
    return ShardJob([str(tmp_path / "in")], tmp_path / output, config=rules, limits=ShardLimits(5))


def _dies_once(marker: Path) -> dict[str, int]:
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"length": len(marker.name)}


def _always_dies(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def _refuses(number: int) -> int:
    if number == 1:
        raise DataError("the second is damaged")
    return number


def test_ray(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(make_job(tmp_path, "local"))
    summary = make_job(tmp_path, "ray").run(engine)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert (summary.images, summary.dropped) == (24, {"exact_duplicate": 6})
    assert list(engine.run(_dies_once, [tmp_path / "a"])) == [{"length": 1}]
    with pytest.raises(DataError, match="the second is damaged"):
        list(engine.run(_refuses, [0, 1, 2]))
    monkeypatch.setattr("vlv.curation.ray_engine._RETRIES", 0)
    with pytest.raises(DataError, match="Ray could not finish the work"):
        list(engine.run(_always_dies, [1]))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--workers has no effect with --ray-address"):
        make_engine("ray", workers=2, ray_address="auto")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "vlv\[scale\]"'):
        make_engine("ray")


def test_shards_that_workers_share(engine: Any, tmp_path: Path) -> None:
    write_folder(tmp_path / "in", range(9))
    (tmp_path / "in" / "bad.png").write_bytes(b"none")
    work = SharedWork(str(tmp_path / "ray"), Source([tmp_path / "in"]), Lister(), per_shard=2)
    Worker(replace(work, output=str(tmp_path / "alone")), no_model).run()
    driver = Worker(work, no_model)
    driver.begin()
    made = list(engine.run_in_actors(partial(ShardMaker, work, no_model), driver.missing()))
    assert sum(tally.done for tally, _ in made) == 9
    assert sum(error is not None for _, errors in made for error in errors) == 1
    assert driver.run()[1]["failed"] == 1
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "alone")
    assert list(engine.run_in_actors(_Dying, [tmp_path / "b"])) == [{"length": 1}]


class _Dying:
    def __call__(self, marker: Path) -> dict[str, int]:
        return _dies_once(marker)
