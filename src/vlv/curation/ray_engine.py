"""Tasks on Ray Data: on this machine, or on a cluster whose machines share the folders of inputs and outputs."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from vlv.curation.engine import Result, Task
from vlv.errors import ConfigError, DataError, VLVError
from vlv.storage import Json

_RETRIES = 3  # of a task whose worker or machine is lost; Ray Data itself would try without end
_STORE_BYTES = 100_000_000  # images go from file to file, never through the object store


class RayEngine:
    """Streams tasks through Ray Data; a lost worker's task is done again elsewhere.

    Args:
        workers: Processors of this machine for Ray; None takes all. Without effect on a cluster.
        address: Of a running cluster, such as auto or ray://HOST:10001; None starts Ray on this machine.

    Raises:
        ConfigError: Ray is not installed, or `workers` is given for a cluster.
    """

    def __init__(self, workers: int | None = None, address: str | None = None) -> None:
        try:
            import ray
            import ray.data
        except ImportError:
            raise ConfigError('--engine ray needs Ray; pip install "vlv[scale]"') from None
        if address is not None and workers is not None:
            raise ConfigError("--workers has no effect with --ray-address; remove one of them")
        self.workers = workers or os.cpu_count() or 1
        self.address = address
        self._ray = ray
        self._ours = False

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """See `vlv.curation.engine.Engine`.

        Raises:
            DataError: The worker of a task died again and again.
        """
        self._start()
        yield from self._results(
            tasks,
            lambda data: data.map(_Runner(function), num_cpus=1, max_retries=_RETRIES),
        )

    def run_in_actors(
        self, make: Callable[[], Callable[[Task], Result]], tasks: Sequence[Task]
    ) -> Iterator[Result]:
        """As `run`, with workers that keep what `make` gives them, such as a model: one on each GPU, or processor.

        Raises:
            DataError: A worker died again and again.
        """
        self._start()
        have = self._ray.cluster_resources()  # type: ignore[no-untyped-call]
        kind = "GPU" if have.get("GPU") else "CPU"
        size = max(1, min(int(have.get(kind, 1)), len(tasks)))
        yield from self._results(
            tasks,
            lambda data: data.map(
                _Keeper,
                fn_constructor_args=(make,),
                concurrency=size,
                num_gpus=float(kind == "GPU"),
                num_cpus=float(kind == "CPU"),
                max_restarts=_RETRIES,  # Ray Data would start an actor again without end
                max_task_retries=_RETRIES,
            ),
        )

    def _results(self, tasks: Sequence[Task], operate: Callable[[Any], Any]) -> Iterator[Any]:
        rows = [{"task": _Box(task)} for task in tasks]
        if not rows:
            return
        data = self._ray.data.from_items(rows, override_num_blocks=len(rows))
        try:
            with (
                warnings.catch_warnings()
            ):  # the number of retries is deprecated and has no other name yet
                warnings.simplefilter("ignore", DeprecationWarning)
                results = operate(data)
            for row in results.iter_rows():
                yield _opened(row["result"])
        except self._ray.exceptions.RayError as error:
            raise DataError(f"Ray could not finish the work ({_last_line(error)})") from error

    def _start(self) -> None:
        ray = self._ray
        if not ray.is_initialized():
            quiet: Json = {"log_to_driver": False, "logging_level": "error"}
            if self.address is None:
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
                os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
                ray.init(
                    num_cpus=self.workers,
                    object_store_memory=_STORE_BYTES,
                    include_dashboard=False,
                    **quiet,
                )
            else:
                try:
                    ray.init(self.address, **quiet)
                except (ConnectionError, ValueError) as error:
                    raise ConfigError(
                        f"no Ray cluster answers at {self.address} ({_last_line(error)})"
                    ) from error
            self._ours = True
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        for name in ("ray.data", "ray._private", "ray.data._internal"):
            logging.getLogger(name).setLevel(logging.ERROR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._ours:
            self._ray.shutdown()
            self._ours = False


@dataclass(frozen=True)
class _Box:
    """Keeps Ray Data from taking a task or a result apart into columns."""

    content: Any


class _Runner:
    """Runs one task in a worker; what the task says is wrong comes back as a result."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, row: Json) -> Json:
        from vlv.curation.engine import one_thread

        one_thread()
        try:
            return {"result": _Box(self.function(row["task"].content))}
        except VLVError as error:
            return {"result": _Box(error)}


class _Keeper:
    """An actor, which makes its function once."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._run = _Runner(make())

    def __call__(self, row: Json) -> Json:
        return self._run(row)


def _opened(box: _Box) -> Any:
    if isinstance(box.content, VLVError):
        raise box.content
    return box.content


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
