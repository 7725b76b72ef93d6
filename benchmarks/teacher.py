"""How fast is `vlv data caption` against an endpoint that answers at once, and does it survive one that does not?

    python benchmarks/teacher.py --json benchmarks/results/teacher-cpu.json
    python benchmarks/teacher.py --num 0 --faults 10000 --kills 5 --json faults.json

The server (tests/endpoint/server.py) is a process of its own on loopback. Three things are measured: the client alone with
texts; the whole command with small images, files included; and each part of a request by itself. `--faults N` captions N
images through 10 % errors, 5 % hanging requests, rate limiting, malformed and truncated answers and refusals, twice with
different concurrency, and compares; `--kills K` kills the command K times at random and compares again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlv.data.records import Record
from vlv.data.shards import TarShardWriter
from vlv.data.source import find_records
from vlv.endpoint import Budget, ChatRequest, Client, Endpoint, KeyedStore, Prices, run, user
from vlv.jobs.teacher.files import TeacherOutput
from vlv.jobs.teacher.job import Asking, TeacherJob
from vlv.jobs.teacher.prompts import read_prompts
from vlv.jobs.teacher.remote import EndpointTeacher, Shrink, prepare
from vlv.training.journal import versions

SERVER = Path(__file__).parents[1] / "tests" / "endpoint" / "server.py"
FAULTS = {
    "500": 0.05,
    "503": 0.02,
    "reset": 0.02,
    "truncated": 0.01,  # 10 % errors
    "hang": 0.05,
    "429": 0.02,
    "malformed": 0.03,
    "missing": 0.01,
    "sorry": 0.02,
    "400": 0.001,
}
FAULT_TIMEOUT = 2.0  # seconds
FAULT_RATE = 300.0  # requests a second that the server with faults allows


@contextmanager
def server(
    faults: dict[str, float] | None = None, per_second: float | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A server process: its address, and a dictionary that holds its counts in the end."""
    command = [sys.executable, str(SERVER)]
    for name, share in (faults or {}).items():
        command += ["--fault", f"{name}={share}"]
    if per_second is not None:
        command += ["--per-second", str(per_second)]
    environment = {**os.environ, "PYTHONPATH": str(SERVER.parents[2])}
    counts: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), counts
        finally:
            process.send_signal(signal.SIGTERM)
            counts |= json.loads(process.stdout.read() or "{}")


def write_images(folder: Path, number: int, side: int) -> list[Record]:
    """So many small JPEG images in tar shards."""
    generator = np.random.default_rng(0)
    with TarShardWriter(folder) as writer:
        for index in range(number):
            small = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            buffer = BytesIO()
            Image.fromarray(small).resize((side, side)).save(buffer, "JPEG")
            writer.write(f"{index:06d}", {"jpg": buffer.getvalue()})
    return find_records([str(folder)])


def caption(
    records: Sequence[Record], url: str, output: Path, concurrency: int, **options: Any
) -> dict[str, Any]:
    """Caption as the command does; returns counts and times."""
    endpoint = Endpoint(url, "benchmark", concurrency=concurrency, **options)
    teacher = EndpointTeacher(endpoint, Shrink(), Budget(), Prices())
    prompts, asking = read_prompts(["short"]), Asking(max_tokens=100)
    files = TeacherOutput(output, ("parquet", "jsonl"))
    job = TeacherJob(records, prompts, asking, teacher, files)
    start = time.perf_counter()
    tally = job.run()
    seconds = time.perf_counter() - start
    return {
        "images": len(records),
        "concurrency": concurrency,
        "captioned": tally.done,
        "named": tally.failed,
        "seconds": round(seconds, 2),
        "images_per_second": round(len(records) / seconds, 1),
    }


def client_alone(url: str, number: int) -> dict[str, Any]:
    """Texts without images, and no store."""
    client = Client(Endpoint(url, "benchmark", concurrency=32))
    requests = ((n, ChatRequest([user(f"What is {n}?")], max_tokens=100)) for n in range(number))
    start = time.perf_counter()
    spent = run(client, requests, lambda tag, answer: None)
    seconds = time.perf_counter() - start
    return {
        "requests": spent.requests,
        "seconds": round(seconds, 2),
        "requests_per_second": round(number / seconds, 1),
    }


def parts(records: Sequence[Record], folder: Path) -> dict[str, float]:
    """Milliseconds of each part of a request, on one core."""
    jpegs = [prepare(record, Shrink())[1] for record in records]
    endpoint = Endpoint("http://127.0.0.1/v1", "benchmark")
    requests = [ChatRequest([user("What is this?", jpeg)], max_tokens=100) for jpeg in jpegs]
    payloads = [request.payload(endpoint) for request in requests]
    with KeyedStore(folder / "parts.sqlite") as store:
        actions: dict[str, Callable[[int], object]] = {
            "read, open, make small, encode": lambda n: prepare(records[n], Shrink()),
            "data URL and JSON": lambda n: ChatRequest(
                [user("What is this?", jpegs[n])], max_tokens=100
            ).payload(endpoint),
            "hash of the request": lambda n: hashlib.sha256(payloads[n]).digest(),
            "write an answer": lambda n: store.put(b"%d" % n, "x" * 1500),
            "look up an answer": lambda n: store.get(b"%d" % n),
        }
        times = {}
        for name, action in actions.items():
            start = time.perf_counter()
            for n in range(len(records)):
                action(n)
            times[name] = round(1000 * (time.perf_counter() - start) / len(records), 4)
    return times


def files_of(folder: Path) -> dict[str, str]:
    """Hashes of the files that a run has written."""
    paths = (path for path in sorted(folder.iterdir()) if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def speeds(number: int, side: int, folder: Path) -> dict[str, Any]:
    """Rates against a server that answers at once."""
    records = write_images(folder / "images", number, side)
    with server() as (url, _):
        alone = client_alone(url, number)
    with server() as (url, counts):
        whole = caption(records, url, folder / "out", 32)
    assert counts["delivered"] == counts["contents"] == number
    sample = records[: min(200, number)]
    return {
        "image_side_px": side,
        "client_alone": alone,
        "whole_command": whole,
        "parts_ms": parts(sample, folder),
    }


def through_faults(number: int, folder: Path) -> dict[str, Any]:
    """Every image captioned or named, none answered twice, the same files whatever the order."""
    records = write_images(folder / "images", number, 64)
    runs = []
    for concurrency in (64, 24):
        output = folder / f"out{concurrency}"
        with server(FAULTS, per_second=FAULT_RATE) as (url, counts):
            result = caption(
                records, url, output, concurrency, timeout=FAULT_TIMEOUT, retries=20, backoff=0.05
            )
        assert result["captioned"] + result["named"] == number
        assert counts["most_delivered"] == 1, "an answer was paid for twice"
        runs.append({**result, "server": counts})
    same = files_of(folder / "out64") == files_of(folder / "out24")
    assert same, "the files depend on the order of the answers"
    return {
        "faults": FAULTS,
        "timeout_s": FAULT_TIMEOUT,
        "requests_per_second": FAULT_RATE,
        "runs": runs,
        "same_files": same,
    }


def through_kills(number: int, kills: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Killed at random and resumed: the same files, and at most the requests in flight are lost."""
    records = write_images(folder / "images", number, 64)
    concurrency = 16
    draw = random.Random(seed)
    with server() as (url, _):
        whole = caption(records, url, folder / "whole", concurrency)
    killed = 0
    with server() as (url, counts):
        options = ["--prompt", "short", "--max-tokens", "100", "--concurrency", str(concurrency)]
        options += ["--format", "parquet", "--format", "jsonl", "--on-existing", "skip"]
        command = [sys.executable, "-m", "vlv", "data", "caption", str(folder / "images")]
        command += ["-o", str(folder / "out"), "--endpoint", url, "--model", "benchmark", *options]
        rows = folder / "out" / "state" / "rows.sqlite-wal"
        for _ in range(kills):
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            size = rows.stat().st_size if rows.exists() else 0
            while process.poll() is None and (rows.stat().st_size if rows.exists() else 0) <= size:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, whole["seconds"] / kills))
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    same = files_of(folder / "out") == files_of(folder / "whole")
    lost = counts["delivered"] - number
    assert same, "the files differ from those of the run that was not killed"
    assert lost <= kills * concurrency, "more was lost than the requests in flight"
    return {"images": number, "killed": killed, "answers_lost": lost, "same_files": same}


def main() -> None:
    """Measure what is asked for, print it, and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--num", type=int, default=2000, help="images of the speed; 0 measures none"
    )
    parser.add_argument("--side", type=int, default=256, help="pixels a side")
    parser.add_argument("--faults", type=int, default=0, help="images through a server with faults")
    parser.add_argument("--kills", type=int, default=0, help="how often to kill the command")
    parser.add_argument(
        "--kill-images", type=int, default=2000, help="images of the runs that are killed"
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    result: dict[str, Any] = {"versions": versions(), "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.num:
            result["speed"] = speeds(given.num, given.side, folder / "speed")
        if given.faults:
            result["faults"] = through_faults(given.faults, folder / "faults")
        if given.kills:
            result["kills"] = through_kills(given.kill_images, given.kills, folder / "kills")
    text = json.dumps(result, indent=2)
    print(text)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
