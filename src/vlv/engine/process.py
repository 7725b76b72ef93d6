"""An engine of our own: vLLM as a child process on loopback, behind a key that nobody else knows."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlv.errors import ConfigError, EndpointError, OutputError

if TYPE_CHECKING:
    import torch

HOST = "127.0.0.1"
_START = Path(__file__).with_name("start.py")
_LOGS_KEPT = 20
_STOP_SECONDS = 15.0
_TAIL = 65_536
"""Bytes at the end of a log among which its last line is looked for."""
_OWN_ENVIRONMENT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_STAMP = re.compile(r"^(\([\w ]+pid=\d+\)\s*)?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\]\s*)?")
_ELSEWHERE = "root cause above"


class EngineProcess:
    """vLLM for one language model; it ends with this process, however that ends.

    Args:
        python: Interpreter of an environment that has vLLM.
        arguments: Of ``vllm``, without host and port.
        logs: Folder of the logs.
        device: Where this process computes; the engine takes the same GPU.
        takes_weights: Whether it can be given other weights while it runs.

    Attributes:
        log: What the engine says.
        key: What it wants to hear.
    """

    def __init__(
        self,
        python: str,
        arguments: Sequence[str],
        logs: Path,
        device: torch.device,
        *,
        takes_weights: bool = False,
    ) -> None:
        self._python, self._arguments, self._device = python, list(arguments), device
        self._takes_weights = takes_weights
        self._logs, self.log = logs, logs / "engine.log"
        self.key = secrets.token_urlsafe(32)
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address, new at each start."""
        return f"http://{HOST}:{self._port}/v1"

    def start(self) -> None:
        """Start it; it is not ready yet.

        Raises:
            ConfigError: There is no such interpreter.
            OutputError: The log cannot be written.
        """
        self._port = _free_port()
        where = ["--host", HOST, "--port", str(self._port)]
        command = [self._python, "-I", str(_START), str(os.getpid())]
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
            _forget_old(self._logs)
            stamp = time.strftime("%Y%m%d-%H%M%S")
            self.log = self._logs / f"{stamp}-{os.getpid()}-{self._port}.log"
            log = self.log.open("wb")
        except OSError as error:
            raise OutputError(f"{self._logs} cannot be written ({error.strerror})") from error
        with log:
            try:
                self._process = subprocess.Popen(
                    [*command, *self._arguments, *where],
                    stdin=subprocess.PIPE,  # its end tells that we have ended
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment(),
                    start_new_session=True,
                )
            except OSError as error:
                raise ConfigError(
                    f"--engine-python {self._python} cannot be run ({error.strerror}); name the interpreter of an "
                    "environment with vLLM"
                ) from error

    def _environment(self) -> dict[str, str]:
        given = {k: v for k, v in os.environ.items() if k not in _OWN_ENVIRONMENT}
        device = self._device
        if device.type == "cuda" and device.index:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            names = visible.split(",") if visible else [str(n) for n in range(device.index + 1)]
            given["CUDA_VISIBLE_DEVICES"] = names[device.index]
        defaults = {"VLLM_CPU_KVCACHE_SPACE": "2"}
        fixed = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # by one: the last token of a caption is never read
            "VLLM_API_KEY": self.key,  # an argument could be seen by everybody on this machine
        }
        if self._takes_weights:
            fixed["VLLM_SERVER_DEV_MODE"] = "1"
        return defaults | given | fixed

    @property
    def has_ended(self) -> bool:
        """Whether it is not there any more."""
        return self._process is None or self._process.poll() is not None

    def says(self) -> str:
        """What the end of its log says, on one line."""
        return repr(last_line(self.log))

    def why(self) -> str:
        """The same, and where to read on."""
        return f"{self.says()}; the whole log is {self.log}"

    def stop(self) -> None:
        """End it and all that it has started."""
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._process = None


def last_line(log: Path) -> str:
    """What the end of a log says: its last line, or the error that this one refers to, without the time."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line for raw in text.splitlines() if (line := _STAMP.sub("", raw).strip())]
    if not lines:
        return ""
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    errors = [line for line in errors if _ELSEWHERE not in line]
    if _ELSEWHERE in lines[-1] and errors:
        return errors[-1][:300]
    return lines[-1][:300]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def _forget_old(logs: Path) -> None:
    for old in sorted(logs.glob("*.log"))[:-_LOGS_KEPT]:
        old.unlink(missing_ok=True)


def not_ready(process: EngineProcess, seconds: float) -> EndpointError:
    """The error of an engine that ended, or was not ready in time."""
    what = "ended while it started" if process.has_ended else f"was not ready in {seconds:g} s"
    return EndpointError(f"the engine {what}; its last line: {process.why()}")
