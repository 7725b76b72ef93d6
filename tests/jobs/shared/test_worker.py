"""Workers of one output: what they write, and that it does not matter who wrote it."""

from __future__ import annotations

import json
import multiprocessing
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import pytest

from tests.cli.conftest import write_image
from tests.curation.files import contents, write_shard
from tests.jobs.shared.conftest import make_place
from vlv.data.locations import Url
from vlv.data.source import Source
from vlv.errors import DataError, OutputError
from vlv.jobs.shared.folders import open_folder
from vlv.jobs.shared.worker import SharedWork, Worker
from vlv.jobs.tally import Tally

if TYPE_CHECKING:
    from vlv.data.parts import Detail
    from vlv.data.records import Record
    from vlv.jobs.shared.operators import Load, Report
    from vlv.models.pipeline import VLVPipeline
    from vlv.storage import Json


@dataclass(frozen=True)
class Lister:
    """Writes the ids of the good images, slowly."""

    seconds: float = 0
    option: int = 1
    command: str = "list"
    suffixes: tuple[str, ...] = (".txt",)
    detail: Detail = "images"

    @property
    def about(self) -> Json:
        return {"option": self.option}

    def run(self, records: Sequence[Record], path: Path, load: Load, report: Report) -> Tally:
        load()
        tally, lines = Tally(), []
        for record in records:
            time.sleep(self.seconds)
            try:
                record.load()
            except DataError as error:
                tally.failed += 1
                report([str(error)])
            else:
                tally.done += 1
                lines.append(record.id)
                report([None])
        path.with_suffix(".txt").write_text("\n".join(lines))
        return tally


def no_model() -> VLVPipeline:
    return None  # type: ignore[return-value]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Seven images and one that is none, in two folders, and two tars of three, the second cut off."""
    folder = tmp_path / "images"
    for number in range(7):
        write_image(folder / "ab"[number % 2] / f"{number}.png", number)
    (folder / "b" / "9.png").write_bytes(b"no image")
    for number in range(2):
        write_shard(folder / f"{number}.tar", range(number * 3, number * 3 + 3))
    whole = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(whole[: len(whole) * 2 // 3])
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if not name.startswith(".")}


def work_on(output: str, images: Path, **more: object) -> SharedWork:
    return SharedWork(output, Source([images]), Lister(), per_shard=3, lease=2, **more)  # type: ignore[arg-type]


def test_what_a_worker_writes(place: str, images: Path) -> None:
    seen: list[str | None] = []
    tally, summary = Worker(work_on(place, images), no_model, seen.extend).run()
    folder = open_folder(place)
    stems = [f"{number:06d}" for number in range(5)]
    names = [f"{stem}{end}" for stem in stems for end in (".txt", "_stats.json")]
    assert sorted(folder.names()) == sorted([*names, "job.json", "summary.json"])
    assert folder.names(".leases") == []
    texts = [(folder.read(f"{stem}.txt") or b"").decode().split("\n") for stem in stems]
    assert texts[0] == ["000000", "000001", "000002"], "a tar is a shard"
    assert texts[2:] == [
        [f"{name}.png" for name in names]
        for names in (("a/0", "a/2", "a/4"), ("a/6", "b/1", "b/3"), ("b/5",))
    ]
    marks = [json.loads(folder.read(f"{stem}_stats.json") or b"") for stem in stems]
    errors = [error for mark in marks for error in mark["errors"]]
    assert [error for error in seen if error is not None] == errors
    assert sum("9.png" in error for error in errors) == 1
    assert sum("1.tar" in error for error in errors) == 1, "what is lost of a tar is told"
    total = {name: sum(mark[name] for mark in marks) for name in ("images", "failed", "truncated")}
    assert summary == {"shards": 5, **total}
    assert (tally.done + tally.failed, tally.failed) == (summary["images"], summary["failed"])
    assert Worker(work_on(place, images), no_model).run()[1] == summary, "nothing is left to do"


def test_many_workers_write_what_one_writes(place: str, images: Path, tmp_path: Path) -> None:
    Worker(work_on(str(tmp_path / "alone"), images), no_model).run()
    alone = {
        name: x for name, x in contents(tmp_path / "alone").items() if not name.startswith(".")
    }
    slow = replace(work_on(place, images), operator=Lister(0.01))
    workers = [Worker(slow, no_model) for _ in range(4)]
    tallies = []
    threads = [threading.Thread(target=lambda w=w: tallies.append(w.run()[0])) for w in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = open_folder(place)
    assert {name: folder.read(name) for name in folder.names()} == alone
    if not place.startswith("plain"):
        images_done = json.loads(alone["summary.json"])["images"]
        assert sum(tally.done + tally.failed for tally in tallies) == images_done, "nothing twice"


def test_other_settings_inputs_and_files_are_refused(tmp_path: Path, images: Path) -> None:
    work = work_on(str(tmp_path / "out"), images)
    Worker(work, no_model).run()
    with pytest.raises(OutputError, match=r"settings.option was 1, now 2"):
        Worker(replace(work, operator=Lister(option=2)), no_model)
    with pytest.raises(OutputError, match="per_shard was 3, now 4"):
        Worker(replace(work, per_shard=4), no_model)
    write_image(images / "a" / "more.png")
    with pytest.raises(OutputError, match="begun with other inputs"):
        Worker(work, no_model)
    with pytest.raises(OutputError, match=r"holds other files, such as 0.tar"):
        Worker(replace(work, output=str(images)), no_model)
    (tmp_path / "out" / "job.json").write_text("[")
    with pytest.raises(DataError, match=r"job.json"):
        Worker(work, no_model)


def test_what_fails_gives_its_shard_back(tmp_path: Path, images: Path) -> None:
    def interrupted(errors: object) -> None:
        raise KeyboardInterrupt

    work = work_on(str(tmp_path / "out"), images)
    with pytest.raises(KeyboardInterrupt):
        Worker(work, no_model, interrupted).run()
    assert list((tmp_path / "out" / ".leases").iterdir()) == []
    assert Worker(work, no_model).run()[1]["shards"] == 5


def test_a_worker_that_lost_its_shard_leaves_it_alone(tmp_path: Path, images: Path) -> None:
    work = work_on(str(tmp_path / "out"), images)
    once = iter([True])

    def steal(errors: object) -> None:
        if next(once, False):
            (claim,) = (tmp_path / "out" / ".leases").iterdir()
            claim.with_suffix(".2").write_text("another")

    alone = Worker(replace(work, lease=0.4), no_model, steal)
    tally, summary = alone.run()
    assert summary["images"] == tally.done + tally.failed, "what was lost was not counted"


def test_a_remote_tar_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory:/{tmp_path}/x.tar"
    fsspec.filesystem("memory").pipe_file(
        url, write_shard(tmp_path / "x.tar", range(5)).read_bytes()
    )
    opened, original = [], Url.open
    monkeypatch.setattr(Url, "open", lambda self: [opened.append(self), original(self)][1])
    work = SharedWork(str(tmp_path / "out"), Source([url]), Lister())
    tally, _ = Worker(work, no_model).run()
    assert (tally.done, opened) == (5, [Url(url)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "plain store"])
def test_killed_at_random(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(100):
        write_image(tmp_path / "images" / f"{number}.png", number)
    place = make_place(kind, tmp_path / "place", monkeypatch)
    work = SharedWork(place, Source([tmp_path / "images"]), Lister(0.05), per_shard=1, lease=0.5)
    alone = replace(work, output=str(tmp_path / "alone"), operator=Lister())
    Worker(alone, no_model).run()
    context, draws, kills = multiprocessing.get_context("fork"), random.Random(kind), 0
    processes = [context.Process(target=_work, args=(work,)) for _ in range(4)]
    for process in processes:
        process.start()
    while kills < 20 and (alive := [n for n, x in enumerate(processes) if x.is_alive()]):
        time.sleep(draws.uniform(0, 0.1))
        number = draws.choice(alive)
        processes[number].kill()
        processes[number].join()
        kills += processes[number].exitcode != 0
        processes[number] = context.Process(target=_work, args=(work,))
        processes[number].start()
    for process in processes:
        process.join(60)
    assert kills > 10
    assert [process.exitcode for process in processes] == [0] * 4
    folder = open_folder(place)
    assert {name: folder.read(name) for name in folder.names()} == files_of(tmp_path / "alone")
    assert folder.names(".leases") == []


def _work(work: SharedWork) -> None:
    Worker(work, no_model).run()
