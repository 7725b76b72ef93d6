"""An engine of our own: started, awaited, started again, ended with us."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import vlv.engine
from tests.engine.fake_vllm import tokens
from vlv.engine import EngineSettings, engine_writes
from vlv.engine.process import last_line
from vlv.engine.requests import encoded
from vlv.errors import ConfigError, EndpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlv.models.captioner import CaptionDecoder

_PYTHON = """#!/bin/sh
shift
VLV_FAKE_ENGINE={home} PYTHONPATH={home}/site exec {python} -P -S "$@"
"""


class Fake:
    """An environment with a vLLM that is none.

    Attributes:
        python: Its interpreter.
        home: Where it notes what it does.
    """

    def __init__(self, home: Path) -> None:
        self.home, self.python = home, home / "python"
        package = home / "site" / "vllm" / "entrypoints" / "cli"
        package.mkdir(parents=True)
        (package / "main.py").write_text(Path(__file__).with_name("fake_vllm.py").read_text())
        self.python.write_text(_PYTHON.format(home=home, python=sys.executable))
        self.python.chmod(0o755)

    @property
    def starts(self) -> list[list[int]]:
        """The processes of each start."""
        text = (self.home / "starts").read_text()
        return [[int(pid) for pid in line.split("-")] for line in text.split()]

    def arguments(self) -> list[str]:
        found: list[str] = json.loads((self.home / "arguments").read_text())
        return found

    def settings(self, **options: Any) -> EngineSettings:
        return EngineSettings(python=str(self.python), **options)


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path / "fake")


def eventually(holds: Callable[[], bool]) -> bool:
    limit = time.monotonic() + 60
    while not holds():
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


def is_gone(pid: int) -> bool:
    """Whether a process has ended, perhaps not yet looked after."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def expected(decoder: CaptionDecoder, c: torch.Tensor) -> list[tuple[int, ...]]:
    """The tokens that the fake writes of contexts."""
    with torch.no_grad():
        return [tuple(tokens(encoded(row), 99, 0)[:3]) for row in decoder.prefix(c)]


def test_it_lasts_as_long_as_it_is_wanted(
    decoder: CaptionDecoder, fake: Fake, c: torch.Tensor, cache: Path
) -> None:
    with engine_writes(decoder, fake.settings(arguments=("--swap-space=1",))):
        assert [x.ids for x in decoder.generate(c, max_new_tokens=9)] == expected(decoder, c)
        (processes,) = fake.starts
        said = Path(f"/proc/{processes[0]}/cmdline").read_bytes()
    assert all(eventually(lambda pid=pid: is_gone(pid)) for pid in processes)
    arguments = fake.arguments()
    assert arguments[0] == "serve"
    assert "--enable-prompt-embeds" in arguments
    assert arguments[arguments.index("--host") + 1] == "127.0.0.1"
    assert arguments[arguments.index("--dtype") + 1] == "float32"
    assert "--swap-space=1" in arguments
    environment = json.loads((fake.home / "environment").read_text())
    assert len(environment["VLLM_API_KEY"]) >= 32
    assert environment["VLLM_API_KEY"].encode() not in said  # everybody on the machine may read it
    (log,) = (cache / "vlv" / "engine" / "logs").iterdir()
    assert environment["VLLM_API_KEY"] not in log.read_text()


def test_one_that_dies_is_started_again_and_nothing_is_lost(
    decoder: CaptionDecoder, fake: Fake, c: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake.home / "dies").write_text("2 99")
    with engine_writes(decoder, fake.settings(concurrency=1)):
        assert [x.ids for x in decoder.generate(c, max_new_tokens=9)] == expected(decoder, c)
    assert len(fake.starts) == 2
    assert (
        "started again for 3 captions; its last line: 'RuntimeError: out of luck'"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_one_that_dies_again_ends_the_work_and_the_next_work_goes_on(
    decoder: CaptionDecoder, fake: Fake, c: torch.Tensor
) -> None:
    (fake.home / "dies").write_text("1 1 99")
    with engine_writes(decoder, fake.settings(concurrency=1)):
        with pytest.raises(
            EndpointError,
            match=r"ended again; its last line: 'RuntimeError: out of luck'; the whole log is /",
        ):
            decoder.generate(c, max_new_tokens=9)
        assert [x.ids for x in decoder.generate(c, max_new_tokens=9)] == expected(decoder, c)
    assert len(fake.starts) == 3
    assert all(eventually(lambda pid=pid: is_gone(pid)) for pids in fake.starts for pid in pids)


@pytest.mark.slow
def test_one_that_does_not_start_is_one_sentence(decoder: CaptionDecoder, fake: Fake) -> None:
    (fake.home / "fails").touch()
    with (
        pytest.raises(
            EndpointError,
            match=r"ended while it started; its last line: 'ValueError: no such model'; .*\.log$",
        ),
        engine_writes(decoder, fake.settings()),
    ):
        pass
    (fake.home / "fails").unlink()
    (fake.home / "hangs").touch()
    with (
        pytest.raises(EndpointError, match=r"was not ready in 2 s; its last line: '(loading)?'"),
        engine_writes(decoder, fake.settings(wait=2.0)),
    ):
        pass
    assert all(eventually(lambda pid=pid: is_gone(pid)) for pids in fake.starts for pid in pids)
    with (
        pytest.raises(ConfigError, match="--engine-python /no/python cannot be run"),
        engine_writes(decoder, EngineSettings(python="/no/python")),
    ):
        pass
    assert decoder.writer is None


@pytest.mark.slow
def test_one_whose_owner_is_killed_ends_too(fake: Fake) -> None:
    """With all that it has started, and although nobody tells it."""
    start = Path(vlv.engine.__file__).with_name("start.py")
    command = [str(fake.python), "-I", str(start)]
    owner = (
        "import os, subprocess, sys, time; "
        "subprocess.Popen([*sys.argv[1:4], str(os.getpid()), *sys.argv[4:]], stdin=subprocess.PIPE, start_new_session=True); "
        "time.sleep(600)"
    )
    serve = ["serve", "--served-model-name", "m", "--host", "127.0.0.1", "--port", "0"]
    (fake.home / "hangs").touch()
    with subprocess.Popen([sys.executable, "-S", "-c", owner, *command, *serve]) as process:
        try:
            assert eventually((fake.home / "environment").exists)
            (pids,) = fake.starts
            assert not any(map(is_gone, pids))
        finally:
            process.send_signal(signal.SIGKILL)
        assert all(eventually(lambda pid=pid: is_gone(pid)) for pid in pids)


def test_the_last_line_of_a_log_is_the_one_that_tells(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_line(log) == ""
    log.write_text("")
    assert last_line(log) == ""
    log.write_text("(EngineCore pid=1) INFO 11-30 05:00:00 [a.py:1] ready\n\n")
    assert last_line(log) == "ready"
    log.write_text(
        "x\n" * 50_000 + "ValueError: too large\nRuntimeError: failed. See root cause above.\n"
    )
    assert last_line(log) == "ValueError: too large"


@pytest.fixture(autouse=True)
def nothing_is_left(fake: Fake) -> Any:
    """Whatever a test has done, it leaves no process."""
    yield
    if (fake.home / "starts").exists():
        for pid in (pid for pids in fake.starts for pid in pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
