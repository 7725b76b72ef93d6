"""How much faster do workers caption that share two cores, and do kills change a byte of what they write?

    OMP_NUM_THREADS=1 python benchmarks/workers.py --num 10000 --json benchmarks/results/workers-cpu.json

Rendered scenes in tars are captioned by the real commands, from the start of the processes to their end: by one process that is held on
one core, by one that may use all, by one worker a core, by as many as `--workers`, and by these while one of them, picked at random, is
killed again and again and started anew. All must write the same bytes. It fails where they do not.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from contest import Contest, Row, write

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = "vlv-tiny"
LEASE = 5
"""Seconds after which the shard of a killed worker is taken by another."""


def main() -> None:
    """Print the contest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--num", type=int, default=10_000, help="scenes")
    parser.add_argument("--per-shard", type=int, default=250, help="scenes of a tar")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every", type=float, default=9, help="most seconds between two kills")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        contest = compared(Path(name), options)
    print(contest)
    if options.json:
        write(options.json, MODEL, [contest])


def compared(folder: Path, options: argparse.Namespace) -> Contest:
    """All ways to the same bytes, in turn."""
    render = ["toyworld", "render", folder / "scenes", "--num", options.num]
    vlv(*render, "--per-shard", options.per_shard).wait()
    cores = sorted(os.sched_getaffinity(0))
    rng = random.Random(options.seed)
    ways: dict[str, Callable[[Path], None]] = {
        "one process on one core": lambda out: together(out, 1, set(cores[:1])),
        "one process": lambda out: together(out, 1),
        f"{len(cores)} workers": lambda out: together(out, len(cores)),
        f"{options.workers} workers": lambda out: together(out, options.workers),
        f"{options.workers} workers, {options.kills} kills": lambda out: killed(out, options, rng),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    digests = set()
    for round_, (name, way) in itertools.product(range(options.rounds), ways.items()):
        print(f"{name}, round {round_ + 1} of {options.rounds}", file=sys.stderr)
        out = folder / "out"
        start = time.perf_counter()
        way(out)
        seconds[name].append(time.perf_counter() - start)
        digests.add(digest(out))
        shutil.rmtree(out)
    if len(digests) != 1:
        raise SystemExit("the workers wrote different bytes")
    first = next(iter(seconds.values()))
    rows = [
        Row(name, mine, [a / b for a, b in zip(first, mine, strict=True)])
        for name, mine in seconds.items()
    ]
    return Contest("captions by many workers", f"{options.num} scenes", rows)


def vlv(*words: object, cores: set[int] | None = None) -> subprocess.Popen[bytes]:
    """A command of ours, held on some cores."""
    command = [sys.executable, "-m", "vlv", *map(str, words)]
    hold = None if cores is None else lambda: os.sched_setaffinity(0, cores)
    return subprocess.Popen(command, preexec_fn=hold, stderr=subprocess.DEVNULL)


def work(out: Path, cores: set[int] | None = None) -> subprocess.Popen[bytes]:
    """A worker at the output."""
    shared = ["--lease", LEASE, "--batch-size", 32, "--output", f"{out}/"]
    return vlv("caption", out.parent / "scenes", "--model", MODEL, *shared, cores=cores)


def together(out: Path, count: int, cores: set[int] | None = None) -> None:
    """Workers that nothing disturbs."""
    for process in [work(out, cores) for _ in range(count)]:
        if process.wait():
            raise SystemExit(f"a worker ended with exit code {process.returncode}")


def killed(out: Path, options: argparse.Namespace, rng: random.Random) -> None:
    """Workers of which one at a time is killed (SIGKILL) and started anew, until all is done."""
    workers = [work(out) for _ in range(options.workers)]
    done = 0
    while True:
        time.sleep(rng.uniform(0.5, 1) * options.every)
        running = [number for number, worker in enumerate(workers) if worker.poll() is None]
        if not running:
            break
        if done < options.kills:
            number = rng.choice(running)
            workers[number].kill()
            workers[number].wait()
            workers[number] = work(out)
            done += 1
    if done < options.kills:
        raise SystemExit(f"only {done} of {options.kills} kills came in time; take more scenes")


def digest(out: Path) -> str:
    """Of the names and bytes of all results."""
    files = sorted(
        path for path in out.rglob("*") if path.is_file() and ".leases" not in path.parts
    )
    found = hashlib.sha256()
    for path in files:
        found.update(f"{path.relative_to(out)} {path.stat().st_size}\n".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()
