"""Every long command ended at random moments, with a clock that jumps: repeated, it gives what one run gives.

By kill -9, or by SIGTERM or a single SIGINT, which it obeys within seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import write_image
from tests.cli.test_data_caption import files_of, teacher
from tests.cli.test_train import write_config
from tests.curation.files import contents, write_shard
from tests.endpoint.server import ScriptedServer, always
from tests.evaluation.support import make_inspector
from vlv.cli import INTERRUPTED, main, run
from vlv.cli.common import PREEMPTED
from vlv.training.journal import read_metrics

KILLS = int(os.environ.get("VLV_KILLS", "2"))
"""Of each command; 20 by hand: `VLV_KILLS=20 python -m pytest tests/cli/test_kills.py`."""
RESTARTS = min(KILLS, 3)  # of one output
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
UNREADY = 99  # a signal came before the command had begun
PATIENCE = 120.0  # seconds: training that draws samples obeys when they are drawn
CLOCKS = (0.0, -4e7, 4e7)  # seconds that the clock of a process is off by, about a year
NAMES = (
    "caption",
    "embed",
    "index",
    "verify",
    "filter",
    "teacher",
    "stage 1",
    "stage 2",
    "evaluation",
)

Arguments = Sequence[object]


@dataclass(frozen=True)
class Job:
    """Commands that belong together, and what they leave behind."""

    commands: Callable[[Path], Sequence[Arguments]]
    outcome: Callable[[Path], object]


@pytest.fixture
def jobs(
    tmp_path: Path, tiny_folder: Path, ingredients: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Job]]:
    monkeypatch.setattr("vlv.search.build.rows_of_part", lambda batch_size: 2 * batch_size)
    photos, shards, inspector = tmp_path / "photos", tmp_path / "shards", tmp_path / "inspector"
    for number in range(12):
        write_image(photos / f"{number:02d}.png", number)
        told = write_image(tmp_path / "told" / f"{number:02d}.png", number)
        told.with_suffix(".txt").write_text("A red cube. A cone.")
    for number in range(4):
        write_shard(shards / f"{number}.tar", range(number * 4, number * 4 + 5))
    make_inspector().save_pretrained(inspector)
    model = ("--model", tiny_folder, "--batch-size", 1)
    loop = {"steps": 6, "save_every": 1, "sample_every": None, "eval_every": None}
    one = write_config(tmp_path / "1.yaml", ingredients, "stage1", loop=loop)
    whole = {"encoder": str(tiny_folder)}
    two = write_config(tmp_path / "2.yaml", ingredients, "stage2", model=whole, loop=loop)
    judge = ("--judge", f"toy=inspector:{inspector}")
    with ScriptedServer(always("ok")) as server:
        yield {
            "caption": Job(
                lambda out: [("caption", photos, *model, "--max-new-tokens", 3, "-o", out / "x.jsonl")],
                lambda out: (out / "x.jsonl").read_bytes(),
            ),
            "embed": Job(
                lambda out: [("embed", photos, *model, "-o", out / "x.safetensors")],
                lambda out: (out / "x.safetensors").read_bytes(),
            ),
            "index": Job(
                lambda out: [("index", "build", photos, *model, "-o", out)],
                lambda out: {name: data for name, data in contents(out).items() if name != ".lock"},
            ),
            "verify": Job(
                lambda out: [("verify", tmp_path / "told", *model, "--timesteps", 1, "--claims", "none", "-o", out / "x.jsonl")],
                lambda out: (out / "x.jsonl").read_bytes(),
            ),
            "filter": Job(
                lambda out: [("data", "filter", shards, "-o", out, "--per-shard", 4, "--workers", 1)],
                contents,
            ),
            "teacher": Job(
                lambda out: [teacher(server.url, photos, out, "--shard-size", 3, "--concurrency", 2)],
                files_of,
            ),
            "stage 1": Job(lambda out: [("train", one, "--run-dir", out)], training),
            "stage 2": Job(lambda out: [("train", two, "--run-dir", out)], training),
            "evaluation": Job(
                lambda out: [
                    ("eval", "predict", "reconstruction", "--run-dir", out, "--from", "true", "--num", 4,
                     "--generator", f"model:{tiny_folder}", "--steps", 1),
                    ("eval", "judge", out, *judge),
                    ("eval", "score", out),
                ],
                evaluation,
            ),
        }  # fmt: skip


def training(folder: Path) -> object:
    losses = [(line["step"], line.get("loss")) for line in read_metrics(folder / "metrics.jsonl")]
    return losses, [data for name, data in contents(folder / "model").items() if "safetens" in name]


def evaluation(folder: Path) -> object:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    kept = {n: d for n, d in contents(folder).items() if n.startswith(("judgements", "images"))}
    return result["figures"], kept


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_random_and_repeated(name: str, jobs: dict[str, Job], tmp_path: Path) -> None:
    job, draws, kills = jobs[name], random.Random(name), 0
    for command in job.commands(tmp_path / "whole"):
        assert run([str(word) for word in command]) == 0
    expected = job.outcome(tmp_path / "whole")
    began = time.monotonic()
    assert os.waitpid(start(job.commands(tmp_path / "timed"), 0.0), 0)[1] == 0
    seconds = time.monotonic() - began
    for number in range(10 * KILLS):
        if kills >= KILLS:
            break
        output = tmp_path / f"killed-{number}"
        for _ in range(RESTARTS):
            process = start(job.commands(output), draws.choice(CLOCKS))
            time.sleep(draws.uniform(0, seconds))
            if not end(process, draws.choice(SIGNALS)):
                seconds *= 0.7  # it was done already: the run that was timed was a slow one
                break
            kills += 1
        for command in job.commands(output):
            assert run([str(word) for word in command]) == 0
        assert job.outcome(output) == expected, f"after {kills} kills"
    assert kills >= KILLS


def start(commands: Sequence[Arguments], clock: float) -> int:
    """Run commands one after the other in a process of its own, which has imported everything already."""
    # a signal waits until the child has its own way out: before, it would end this test's run
    waiting = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    process = os.fork()
    if process:
        signal.pthread_sigmask(signal.SIG_SETMASK, waiting)
        return process
    code = UNREADY
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, waiting)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        true_time, jumps = time.time, random.Random(clock)
        time.time = lambda: true_time() + clock * jumps.random()
        code = max(code_of(command) for command in commands)
    finally:
        os._exit(code)


def code_of(command: Arguments) -> int:
    """Exit code of the script `vlv`, signal handlers included."""
    sys.argv = ["vlv", *map(str, command)]
    with pytest.raises(SystemExit) as ended:
        main()
    return int(str(ended.value.code))


def end(process: int, number: signal.Signals) -> bool:
    """End a process by a signal; whether it was still at work."""
    if number == signal.SIGKILL:
        with suppress(ProcessLookupError):
            os.killpg(process, number)
    os.kill(process, number)
    deadline = time.monotonic() + PATIENCE
    while not (found := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            pytest.fail(f"{number.name} did not end the command within {PATIENCE:g} seconds")
        time.sleep(0.01)
    if os.WIFSIGNALED(found[1]):  # or before it had a handler
        return True
    code = os.WEXITSTATUS(found[1])
    assert code in (0, INTERRUPTED, PREEMPTED, UNREADY), f"exit code {code}"
    return code != 0
