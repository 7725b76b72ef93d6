"""How much of the speed of `vlv caption` is left behind `vlv serve`, and what a flood does to it?

    OMP_NUM_THREADS=1 python benchmarks/serving.py --json benchmarks/results/serving-cpu.json

The same rendered scenes are captioned in turn as a folder by `vlv caption`'s own job and through the server, by as many clients as
two batches have images. Then comes a flood: more clients than the queue holds. Every request must get one
answer: a caption, 429 where the queue is full, or 504 at the deadline. The clients are a process of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import statistics
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from contest import Contest, Row, compete, note, write
from PIL import Image

from vlv.data.source import find_records
from vlv.jobs.caption import CaptionJob, CaptionOutput
from vlv.jobs.caption_settings import CaptionSettings
from vlv.jobs.inputs import BatchSize
from vlv.models.pipeline import VLVPipeline
from vlv.serve.server import Server
from vlv.serve.service import Service
from vlv.serve.settings import Keys, ServeSettings
from vlv.serve.sockets import listen
from vlv.toyworld.render import render
from vlv.toyworld.scene import sample_scene

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MODEL = "vlv-tiny"


def main() -> None:
    """Print both contests."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--num",
        type=int,
        default=1000,
        help="scenes of a round: the last batch of a round is seldom full",
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--queue-size", type=int, default=64)
    parser.add_argument("--flood", type=int, default=400, help="clients of the flood")
    parser.add_argument("--requests", type=int, default=10_000, help="requests of the flood")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    pipe = VLVPipeline.from_pretrained(MODEL)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(pipe, options) as url,
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
    ):
        files = scenes(Path(folder), options.num, pipe.image_size)
        bodies = [body(file) for file in files]
        clients = 2 * options.batch_size
        contest = compete(
            "captions of a folder",
            f"{options.num} scenes, batches of {options.batch_size}",
            {
                "vlv caption": lambda: caption_folder(pipe, Path(folder), options.batch_size),
                f"vlv serve, {clients} clients": lambda: elsewhere(pool, url, bodies, clients),
            },
            repeats=options.repeats,
        )
        flood = flooded(pool, url, bodies, options)
    contests = [contest, flood]
    print(*contests, sep="\n")
    if options.json:
        write(options.json, MODEL, contests)


def scenes(folder: Path, num: int, size: int) -> list[Path]:
    """Rendered scenes as PNG files."""
    files = []
    for index in range(num):
        files.append(folder / f"{index:05d}.png")
        Image.fromarray(render(sample_scene(0, index, "val"), size).image).save(files[-1])
    return files


def body(file: Path) -> dict[str, Any]:
    """A request for the caption of a file."""
    url = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}]
    return {"model": MODEL, "messages": [{"role": "user", "content": content}]}


def caption_folder(pipe: VLVPipeline, folder: Path, batch_size: int) -> None:
    """As `vlv caption FOLDER --output FILE` does."""
    with tempfile.TemporaryDirectory() as output:
        records, file = find_records([str(folder)]), Path(output) / "captions.jsonl"
        job = CaptionJob(records, CaptionSettings(MODEL), CaptionOutput(file))
        tally = job.run(lambda: pipe, batch_size=BatchSize.parse(str(batch_size)))
    assert not tally.failed


@contextmanager
def serving(pipe: VLVPipeline, options: argparse.Namespace) -> Iterator[str]:
    """A server in a thread of this process."""
    settings = ServeSettings(MODEL, batch_size=options.batch_size, queue_size=options.queue_size)
    server = Server(Service(pipe, settings), Keys(), listen("127.0.0.1", 0))
    thread = threading.Thread(target=server.serve_until_signal)
    thread.start()
    try:
        yield server.url
    finally:
        server.drain()
        thread.join()


async def ask(
    url: str, bodies: Sequence[dict[str, Any]], clients: int
) -> list[tuple[int, float, str]]:
    """Status, seconds and caption of each request, made by clients that wait for their answers."""
    waiting, found = (
        list(enumerate(bodies)),
        list[tuple[int, float, str]]([(0, 0.0, "")] * len(bodies)),
    )

    async def client(session: httpx.AsyncClient) -> None:
        while waiting:
            index, content = waiting.pop()
            began = time.perf_counter()
            answer = await session.post(f"{url}/v1/chat/completions", json=content)
            seconds, text = time.perf_counter() - began, ""
            if answer.status_code == 200:
                text = answer.json()["choices"][0]["message"]["content"]
            found[index] = answer.status_code, seconds, text

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=120, limits=limits) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return found


def elsewhere(
    pool: ProcessPoolExecutor, url: str, bodies: Sequence[dict[str, Any]], clients: int
) -> list[tuple[int, float, str]]:
    """What `ask` finds in another process, which takes no time of the server's."""
    return pool.submit(_ask, url, bodies, clients).result()


def _ask(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> list[tuple[int, float, str]]:
    return asyncio.run(ask(url, bodies, clients))


def flooded(
    pool: ProcessPoolExecutor,
    url: str,
    bodies: Sequence[dict[str, Any]],
    options: argparse.Namespace,
) -> Contest:
    """A calm and a flood: the seconds of answers, how many were refused, and memory."""
    rows = []
    wanted: dict[int, str] = {}
    for name, clients in (
        ("as many clients as a batch", options.batch_size),
        ("flood", options.flood),
    ):
        before = resident(url)
        sent = [bodies[i % len(bodies)] for i in range(options.requests)]
        found = elsewhere(pool, url, sent, clients)
        statuses = Counter(status for status, _, _ in found)
        assert set(statuses) <= {200, 429, 504}, statuses
        for index, (status, _, text) in enumerate(found):
            if status == 200:  # one answer for each request, and the right one
                assert wanted.setdefault(index % len(bodies), text) == text
        seconds = sorted(taken for status, taken, _ in found if status == 200)
        row = Row(name, [statistics.median(seconds)], [1.0])
        figures = {
            "p99 s": seconds[int(0.99 * (len(seconds) - 1))],
            "answered": statuses[200],
            "refused": statuses[429],
            "late": statuses[504],
            "MiB more": (resident(url) - before) / 2**20,
        }
        rows.append((row, figures))
    contest = Contest(
        "seconds of an answer", f"{options.requests} requests", [row for row, _ in rows]
    )
    known = {row.name: figures for row, figures in rows}
    return note(contest, lambda row: known[row.name])


def resident(url: str) -> float:
    """Bytes of memory of the server, as its metrics say."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(float(x.split()[1]) for x in lines if x.startswith("process_resident_memory_bytes"))


if __name__ == "__main__":
    main()
