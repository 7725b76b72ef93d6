"""Outputs that many workers share: the options, and a worker or several of this machine."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlv.cli import common
from vlv.cli.options import changed, option_group

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vlv.data.source import Source
    from vlv.jobs.shared.operators import Load, Operator
    from vlv.jobs.shared.worker import SharedWork
    from vlv.jobs.tally import Tally
    from vlv.models.folder import Task
    from vlv.models.pipeline import VLVPipeline
    from vlv.models.placement import Placement
    from vlv.storage import Json


@option_group("Many workers (--output FOLDER)")
class WorkerOptions:
    """How the work on a folder is shared."""

    per_shard: Annotated[
        int, typer.Option(min=1, help="Images of a shard; each tar is one as it is.")
    ] = 1000
    lease: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Seconds without a sign of life after which a worker counts as dead, and others take its shard.",
        ),
    ] = 120.0
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="auto|NAME,NAME",
            help="One worker on each of these devices; auto takes all GPUs.",
        ),
    ] = None
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="local|auto|ADDRESS",
            help=r"Work on Ray Data (vlv\[scale]): local starts Ray on this machine, auto or ray://HOST:10001 is a cluster.",
        ),
    ] = None


def is_shared(output: str | Path | None, options: WorkerOptions) -> bool:
    """Whether an output is a folder that workers share: a URL, a folder, or a name that ends in ``/`` or has no suffix.

    Raises:
        ConfigError: It is a file, and an option for many workers was given.
    """
    from vlv.errors import ConfigError
    from vlv.jobs.shared.folders import is_remote

    text = "" if output is None else str(output)
    if text not in {"", "-"} and (
        is_remote(text) or text.endswith("/") or Path(text).is_dir() or not Path(text).suffix
    ):
        return True
    if given := changed(options):
        raise ConfigError(f"{given[0]} has no effect without a folder to share: --output FOLDER")
    return False


def refuse(**options: bool) -> None:
    """Refuse options that say nothing about a shared folder; by name, and whether each was given.

    Raises:
        ConfigError: One was given.
    """
    from vlv.errors import ConfigError

    for name, given in options.items():
        if given:
            raise ConfigError(
                f"--{name.replace('_', '-')} does not go with a folder that workers share; name a file with --output"
            )


def work_on(
    output: str,
    source: Source,
    operator: Operator,
    options: WorkerOptions,
    model: common.ModelOptions,
    tasks: Sequence[Task],
    placement: Placement,
    *,
    attach: Callable[[VLVPipeline], VLVPipeline] | None = None,
    dry_run: bool = False,
) -> int:
    """Work on a shared folder until it is done; the exit code is 2 where images of anybody failed.

    `attach` lets an engine of this process write for the model, which is loaded here then.
    """
    from vlv.errors import ConfigError
    from vlv.jobs.shared.worker import SharedWork

    dtype = common.dtype_name(placement)
    work = SharedWork(output, source, operator, dtype, options.per_shard, options.lease)
    if dry_run:
        return _list(work)
    placement = replace(placement, dtype=dtype)  # the same wherever it is loaded
    if options.ray_address is not None:
        if attach is not None:
            raise ConfigError("--engine serves one worker; leave --ray-address out")
        return _run_on_ray(work, partial(_load, model, tuple(tasks), placement), options)
    loads = [
        (device, partial(_load, model, tuple(tasks), replace(placement, device=device)))
        for device in _devices(options, model)
    ]
    if attach is None:
        return _run(work, loads)
    if len(loads) > 1:
        raise ConfigError(
            "--engine serves one worker; leave --devices out, and start more commands"
        )
    ((device, load),) = loads
    return _run(work, [(device, lambda: attach(load()))])


def _devices(options: WorkerOptions, model: common.ModelOptions) -> list[str]:
    from vlv.errors import ConfigError
    from vlv.jobs.shared.processes import pick_devices
    from vlv.models.placement import pick_device

    if options.devices is None:
        return [model.device]
    if model.device != "auto":
        raise ConfigError("--device has no effect with --devices; remove one of them")
    devices = pick_devices(options.devices)
    if not devices:
        raise ConfigError("--devices names no device; name some, such as cuda:0,cuda:1")
    for device in devices:
        pick_device(device)
    return devices


def _load(model: common.ModelOptions, tasks: Sequence[Task], placement: Placement) -> VLVPipeline:
    """Load the model, perhaps in a process that does nothing else."""
    common.quieten()
    return model.load(tasks, placement)


def _run(work: SharedWork, loads: Sequence[tuple[str, Load]]) -> int:
    from vlv.jobs.shared.processes import run_on
    from vlv.jobs.shared.worker import Worker

    with common.Progress(resumable=False) as progress:
        if len(loads) == 1:
            tally, summary = Worker(work, loads[0][1], progress.report).run()
        else:
            tally, summary = run_on(work, loads, progress.report)
    return _close(work, tally, summary)


def _run_on_ray(work: SharedWork, load: Load, options: WorkerOptions) -> int:
    from vlv.curation.ray_engine import RayEngine
    from vlv.errors import ConfigError
    from vlv.jobs.shared.worker import ShardMaker, Worker
    from vlv.jobs.tally import Tally

    if options.devices is not None:
        raise ConfigError("--devices has no effect with --ray-address; remove one of them")
    address = None if options.ray_address == "local" else options.ray_address
    worker, tally = Worker(work, _no_model), Tally()
    worker.begin()
    with RayEngine(address=address) as engine, common.Progress(resumable=False) as progress:
        make = partial(ShardMaker, work, load)
        for made, errors in engine.run_in_actors(make, worker.missing()):
            tally += made
            progress.report(errors)
    _, summary = worker.run()
    return _close(work, tally, summary)


def _close(work: SharedWork, tally: Tally, summary: Json) -> int:
    common.close(tally, work.output)
    common.say(
        f"all {summary['shards']} shards are done: {summary['images']} images, {summary['failed']} failed"
    )
    return 2 if summary["failed"] else 0


def _list(work: SharedWork) -> int:
    from vlv.jobs.shared.worker import Worker

    found = Worker(work, _no_model).progress()
    common.say(
        f"dry run: {found.shards} shards, {found.done} done, {found.claimed} being worked on, or left by dead workers"
    )
    return 0


def _no_model() -> VLVPipeline:
    raise AssertionError("nothing is left to do here")
