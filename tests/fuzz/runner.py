"""Runs cases in a process that may crash, hang, grow or write where it must not, and is watched for all of that."""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.mutation import mutate
from tests.fuzz.targets import SHARES, TARGETS, run
from tests.memory import peak_growth

HANG_SECONDS = 10.0
MAX_GROWTH = 300 * 2**20
"""Bytes that the process may grow by during a case."""

ROUND = [name for name in TARGETS for _ in range(SHARES.get(name, 1))]
_STATE = struct.Struct("qd")  # the case that runs, and when it began
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGING = ("os.remove", "os.rename", "os.mkdir", "os.symlink", "os.link", "os.truncate")
_FOREIGN = ("subprocess.Popen", "os.system", "os.exec", "socket.connect", "pickle.find_class")


@dataclass
class Outcome:
    """What came of a number of cases.

    Attributes:
        cases: How many ran.
        refused: How many of them were refused as a whole.
        findings: What went wrong, a line for each.
        peak: Most bytes that the process grew by during one case.
    """

    cases: int = 0
    refused: int = 0
    findings: list[str] = field(default_factory=list)
    peak: int = 0
    kinds: Counter[str] = field(default_factory=Counter)


def fuzz(cases: int, seed: int, folder: Path, names: Sequence[str] = tuple(ROUND)) -> Outcome:
    """Run cases one after the other; a process that dies or hangs is replaced, and goes on with the next case.

    Args:
        cases: How many.
        seed: Of the draws; case and seed together give the bytes.
        folder: For the files of the cases; those of findings stay there.
        names: Targets, in turn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcome, log = Outcome(), folder / "log.jsonl"
    log.unlink(missing_ok=True)
    state = mmap.mmap(-1, _STATE.size)
    seeds = {name: TARGETS[name].seeds() for name in dict.fromkeys(names)}
    first, tried = 0, -1
    while first < cases:
        state[:] = _STATE.pack(first, time.monotonic())
        child = os.fork()
        if not child:
            _work(range(first, cases), seed, folder, names, state, seeds)
        last, hung = _watch(child, state)
        if hung and last != tried:  # perhaps the whole machine stood still
            first = tried = last
            continue
        if hung is not None:
            kind = "hang" if hung else "crash"
            outcome.findings.append(f"case {last}: {kind}; see {folder / f'{kind}-{last}'}")
            outcome.kinds[kind] += 1
            shutil.copy(folder / "now", folder / f"{kind}-{last}")
        first = last + 1
    for line in log.read_text("utf-8").splitlines() if log.exists() else ():
        _add(outcome, json.loads(line))
    return outcome


def _add(outcome: Outcome, entry: dict[str, object]) -> None:
    outcome.cases += 1
    outcome.refused += entry["refused"] is True
    outcome.peak = max(outcome.peak, int(str(entry["peak"])))
    if entry["finding"]:
        outcome.findings.append(str(entry["finding"]))
        outcome.kinds[str(entry["kind"])] += 1


def _watch(child: int, state: mmap.mmap) -> tuple[int, bool | None]:
    """Wait for a process to end, or end it; its last case, and whether it hung, or else crashed; None is neither."""
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        number, began = _STATE.unpack(state[:])
        if found:
            return int(number), None if status == 0 else False
        if time.monotonic() - began > HANG_SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return int(number), True
        time.sleep(0.02)


def _work(
    numbers: range,
    seed: int,
    folder: Path,
    names: Sequence[str],
    state: mmap.mmap,
    seeds: Mapping[str, Sequence[bytes]],
) -> None:
    """The process that runs cases; it never returns."""
    code = 1
    try:
        os.dup2(
            os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2
        )  # libtiff talks
        sys.dont_write_bytecode = True
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        guard = _Guard(folder)
        sys.addaudithook(guard)
        with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
            for number in numbers:
                state[:] = _STATE.pack(number, time.monotonic())
                name = names[number % len(names)]
                case = mutate(random.Random(f"{seed} {number}"), seeds[name])
                (folder / "now").write_bytes(case)
                entry = _entry(name, case, number, folder, guard)
                log.write(json.dumps(entry) + "\n")
                log.flush()
        code = 0
    except BaseException:  # noqa: BLE001 -- shown, for the process ends here
        traceback.print_exc()
    finally:
        os._exit(code)


def _entry(name: str, case: bytes, number: int, folder: Path, guard: _Guard) -> dict[str, object]:
    """Run one case, and say what came of it."""
    kind, text, refused = "", "", False
    own = folder / "case"
    _empty(own)
    with guard.watching(), peak_growth() as growth:
        try:
            refused = run(name, case, own)
        except BaseException as error:  # noqa: BLE001 -- whatever it is, it is a finding
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = "traceback"
            text = f"{type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})"
    if not kind and guard.seen:
        kind, text = "outside", ", ".join(guard.seen[:3])
    elif not kind and growth[0] > MAX_GROWTH:
        kind, text = "memory", f"grew by {growth[0] / 2**20:.0f} MiB"
    finding = f"case {number}, {name}: {kind}: {text}" if kind else ""
    if finding:
        (folder / f"{kind}-{number}").write_bytes(case)
    return {"refused": refused, "finding": finding, "kind": kind, "peak": growth[0]}


def _empty(folder: Path) -> None:
    """Make a folder, or remove what the case before left there: to remove it too would take longer than most cases."""
    folder.mkdir(exist_ok=True)
    for left in folder.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


class _Guard:
    """An audit hook that notes what is written outside of a folder, and what is run or connected to."""

    def __init__(self, folder: Path) -> None:
        self.seen: list[str] = []
        self._active = False
        self._allowed = (str(folder), "/proc/self/", "/dev/null")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While a case runs."""
        self.seen, self._active = [], True
        yield
        self._active = False

    def __call__(self, event: str, args: tuple[object, ...]) -> None:
        if not self._active:
            return
        if event in _FOREIGN:
            self.seen.append(f"{event} {args[:2]}")
        elif (
            event == "open" and isinstance(args[2], int) and args[2] & _WRITING
        ) or event in _CHANGING:
            self._look(event, args[0])

    def _look(self, event: str, place: object) -> None:
        if isinstance(place, bytes):
            place = os.fsdecode(place)
        if isinstance(place, str | os.PathLike) and not str(place).startswith(self._allowed):
            self.seen.append(f"{event} {place}")
