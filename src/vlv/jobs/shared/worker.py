"""A worker: claims shards of an output that others may work on as well, until all are done."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from vlv.data.foreign import parse_object
from vlv.data.locations import copied
from vlv.data.source import fingerprint, records_of
from vlv.data.tars import TarShard
from vlv.errors import OutputError
from vlv.jobs.shared.folders import open_folder
from vlv.jobs.shared.leases import BEATS, Leases
from vlv.jobs.tally import Tally
from vlv.storage import Json, check_settings, plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vlv.data.source import Source
    from vlv.jobs.shared.leases import Lease
    from vlv.jobs.shared.operators import Load, Operator, Report
    from vlv.models.pipeline import VLVPipeline

NOTE, SUMMARY, MARK = "job.json", "summary.json", "_stats.json"
_READERS = 16  # threads that read marks
_MEND = "name another folder"
_LONGEST_NAP = 5.0  # seconds between looks at what others do


@dataclass(frozen=True)
class SharedWork:
    """What the workers of one output have in common; plain enough to be sent to any process.

    Attributes:
        output: Folder, or URL of one.
        source: The images.
        operator: What is done to them.
        dtype: That the model computes with.
        per_shard: Images of a shard, where the inputs have no shards of their own.
        lease: Seconds without a sign of life after which a worker counts as dead.
    """

    output: str
    source: Source
    operator: Operator
    dtype: str = "float32"
    per_shard: int = 1000
    lease: float = 120.0


@dataclass(frozen=True)
class Progress:
    """How far an output is.

    Attributes:
        shards: How many there are.
        done: How many are done.
        claimed: How many others are being worked on, or were left by dead workers.
    """

    shards: int
    done: int
    claimed: int


class Worker:
    """One of the workers of an output. Building it reads and checks, and writes nothing.

    The output has ``job.json``, for each shard its files and, as the mark that they are whole, ``_stats.json``, and at
    the end ``summary.json``. All of them are the same whoever made them.

    Args:
        work: What is done.
        load: Loads the model; called when there is something to do.
        report: Told what becomes of each image.

    Raises:
        DataError: The inputs are missing, or of a type that vlv does not read.
        OutputError: The folder holds something else, or the result of other settings or inputs.
    """

    def __init__(self, work: SharedWork, load: Load, report: Report = lambda errors: None) -> None:
        self._work, self._report, self._raw_load = work, report, load
        self._parts = list(dict.fromkeys(work.source.parts(work.per_shard)))
        self._note = plain(
            {
                "command": work.operator.command,
                "settings": work.operator.about,
                "dtype": work.dtype,
                "per_shard": work.per_shard,
                "shards": len(self._parts),
                "inputs": fingerprint(self._parts, image_sizes=False),
            }
        )
        self._folder = open_folder(work.output)
        self._leases = Leases(self._folder, work.lease)
        self._load = cache(self._loaded)
        self._tally = Tally()
        self._place = 0
        self._check()

    def _check(self) -> None:
        data = self._folder.read(NOTE)
        if data is None:
            if others := self._folder.names():
                raise OutputError(
                    f"{self._work.output} holds other files, such as {min(others)}; name a new or an empty folder"
                )
            return
        known = parse_object(data.decode("utf-8", "replace"), f"{self._work.output}/{NOTE}")
        inputs = known.get("inputs")
        same_inputs = {**self._note, "inputs": inputs}
        check_settings(self._work.output, known, same_inputs, mend=_MEND, free=("shards",))
        if inputs != self._note["inputs"]:
            raise OutputError(
                f"{self._work.output} was begun with other inputs, under other paths, or they have changed since; {_MEND}"
            )

    def _loaded(self) -> VLVPipeline:
        pipe = self._raw_load()
        self._tally.restart()
        return pipe

    def progress(self) -> Progress:
        """How far the output is, all workers together."""
        done = len(self._parts) - len(self.missing())
        return Progress(len(self._parts), done, len(self._leases.standing()))

    def begin(self) -> None:
        """Write down what is done here, unless another worker has.

        Raises:
            OutputError: What the other has written down is something else.
        """
        self._folder.create(NOTE, _json(self._note))
        self._check()

    def run(self) -> tuple[Tally, Json]:
        """Work until every shard is done, by this worker or by others.

        Returns:
            What this worker did, and the counts of the whole output.
        """
        self.begin()
        while todo := self._todo():
            if not self._pass(todo):
                self._sleep()
        self._leases.clear()  # what killed workers left behind
        return self._tally, self._read(SUMMARY)

    def complete(self, number: int) -> Tally:
        """Make one shard, or wait until another worker has; what this one did, which is nothing where it was done."""
        before, self._tally = self._tally, Tally()
        while not self._folder.exists(_stem(number) + MARK):
            if not self._take(number, self._leases.standing()):
                self._sleep()
        made, self._tally = self._tally, before
        return made

    def missing(self) -> list[int]:
        """Numbers of the shards that are not done."""
        return self._missing(self._folder.names())

    def _sleep(self) -> None:
        time.sleep(min(self._work.lease / BEATS, _LONGEST_NAP))

    def _todo(self) -> list[int]:
        """Numbers of the shards that are not done; after the last of them one more, the summary."""
        names = set(self._folder.names())
        missing = self._missing(names)
        return missing or ([] if SUMMARY in names else [len(self._parts)])

    def _missing(self, names: Iterable[str]) -> list[int]:
        done = {name for name in names if name.endswith(MARK)}
        return [n for n in range(len(self._parts)) if _stem(n) + MARK not in done]

    def _pass(self, todo: list[int]) -> bool:
        """Work on what is free, then on what dead workers have left; whether there was something.

        Where another worker was faster, this one goes on at a random place, so that they seldom meet again.
        """
        standing = self._leases.standing()
        free = [number for number in todo if number not in standing]
        start = bisect_left(free, self._place)
        for number in free[start:] + free[:start]:
            if not self._take(number, standing):
                self._place = secrets.randbelow(len(self._parts))
                return True
            self._place = number + 1
        worked = bool(free)
        for number in todo:
            worked |= number in standing and self._take(number, standing)
        return worked

    def _take(self, number: int, standing: Mapping[int, int]) -> bool:
        lease = self._leases.claim(number, standing)
        if lease is None:
            return False
        with lease:
            if number == len(self._parts):
                self._finish()
            elif self._folder.exists(_stem(number) + MARK):  # done since the folder was listed
                return False
            else:
                self._make(number, lease)
        return True

    def _make(self, number: int, lease: Lease) -> None:
        part, stem, operator = self._parts[number], _stem(number), self._work.operator
        errors: list[str] = []

        def report(found: Iterable[str | None]) -> None:
            found = list(found)
            errors.extend(error for error in found if error is not None)
            self._report(found)

        whole = part.source if isinstance(part, TarShard) else ""
        with TemporaryDirectory(prefix="vlv-") as folder, copied(whole):
            records = records_of(part, operator.detail)
            tally = operator.run(records, Path(folder) / stem, self._load, report)
            paths = [Path(folder) / f"{stem}{suffix}" for suffix in operator.suffixes]
            paths = [path for path in paths if path.exists()]
            stats = {
                "source": str(part),
                "images": tally.done + tally.failed,
                "failed": tally.failed,
                "truncated": tally.truncated,
                "errors": errors,
                "files": {path.name: _hash(path) for path in paths},
            }
            if not lease.renew():
                return
            for path in paths:
                self._folder.put(path.name, path)
            self._mark(folder, stem + MARK, stats)
        self._tally += tally

    def _mark(self, folder: str, name: str, content: Json) -> None:
        """Write a file that others take for a sign, whole or not at all."""
        path = Path(folder) / name
        path.write_bytes(_json(content))
        self._folder.put(name, path)

    def _finish(self) -> None:
        names = [_stem(number) + MARK for number in range(len(self._parts))]
        with ThreadPoolExecutor(_READERS) as pool:
            stats = list(pool.map(self._read, names))
        counts = {name: sum(x[name] for x in stats) for name in ("images", "failed", "truncated")}
        with TemporaryDirectory(prefix="vlv-") as folder:
            self._mark(folder, SUMMARY, {"shards": len(stats), **counts})
        self._folder.tidy()

    def _read(self, name: str) -> Json:
        where = f"{self._work.output}/{name}"
        data = self._folder.read(name)
        if data is None:
            raise OutputError(f"{where} is gone; give the same command again")
        return parse_object(data.decode("utf-8", "replace"), where)


class ShardMaker:
    """A worker that is told which shards to make, as one on Ray is; it keeps its model.

    Args:
        work: See `Worker`.
        load: See `Worker`.
    """

    def __init__(self, work: SharedWork, load: Load) -> None:
        self._errors: list[str | None] = []
        self._worker = Worker(work, load, self._errors.extend)

    def __call__(self, number: int) -> tuple[Tally, list[str | None]]:
        """Make a shard; the counts, and the error of each image."""
        self._errors.clear()
        return self._worker.complete(number), list(self._errors)


def _stem(number: int) -> str:
    return f"{number:06d}"


def _json(value: Json) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def _hash(path: Path) -> Json:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
