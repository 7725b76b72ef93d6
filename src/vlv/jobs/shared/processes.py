"""Workers of one machine, each in a process and on a device of its own."""

from __future__ import annotations

import logging
import multiprocessing
import signal
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, NoReturn

import torch

from vlv.errors import OutputError, VLVError
from vlv.jobs.shared.worker import Worker
from vlv.jobs.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from multiprocessing.process import BaseProcess
    from types import FrameType

    from vlv.jobs.shared.operators import Load, Report
    from vlv.jobs.shared.worker import SharedWork
    from vlv.storage import Json


logger = logging.getLogger(__name__)


def pick_devices(text: str) -> list[str]:
    """Devices of an option: all GPUs for ``auto``, or those that are named, with commas between."""
    if text != "auto":
        return [name.strip() for name in text.split(",") if name.strip()]
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def run_on(
    work: SharedWork, loads: Sequence[tuple[str, Load]], report: Report
) -> tuple[Tally, Json]:
    """Work in one process for each device until every shard is done.

    A process that dies leaves its shard to the others. An interruption ends them all.

    Args:
        work: What is done.
        loads: For each worker its device, and what loads its model there; can be sent to another process.
        report: See `Worker`.

    Returns:
        What all of them did, and the counts of the whole output.

    Raises:
        OutputError: All processes died.
        VLVError: Whatever a worker says.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlv.jobs.shared.worker", "vlv.models.pipeline"])
    processes: dict[Connection, tuple[str, BaseProcess]] = {}
    try:
        for name, load in loads:
            ours, theirs = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(
                target=_work, args=(theirs, work, load, len(loads))
            )
            process.start()
            theirs.close()
            processes[ours] = name, process
        return _listen(processes, report)
    finally:
        for _, started in processes.values():
            started.terminate()
        for _, started in processes.values():
            started.join()


def _listen(
    processes: Mapping[Connection, tuple[str, BaseProcess]], report: Report
) -> tuple[Tally, Json]:
    tally, summary = Tally(), None
    open_ones = set(processes)
    while open_ones:
        for connection in wait(list(open_ones)):
            assert isinstance(connection, Connection)
            try:
                kind, content = connection.recv()
            except EOFError:
                open_ones.discard(connection)
                name, process = processes[connection]
                process.join()
                if process.exitcode:
                    logger.warning(
                        "note: the worker on %s died (exit code %d); others take its shard when its lease ends",
                        name,
                        process.exitcode,
                    )
                continue
            if kind == "report":
                report(content)
            elif kind == "error":
                raise content
            else:
                done, summary = content
                tally += done
    if summary is None:
        raise OutputError("all workers died; give the same command again, with a smaller batch")
    return tally, summary


def _work(connection: Connection, work: SharedWork, load: Load, num_workers: int) -> None:
    """Work in a process of its own, and tell the parent; without a parent the work ends."""
    signal.signal(signal.SIGTERM, _interrupt)
    torch.set_num_threads(max(1, torch.get_num_threads() // num_workers))
    try:
        worker = Worker(work, load, lambda errors: connection.send(("report", list(errors))))
        connection.send(("end", worker.run()))
    except VLVError as error:
        connection.send(("error", error))
    except (KeyboardInterrupt, BrokenPipeError):
        return


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
