"""Several processes that train together, forked from this one, which has imported all; they meet in a file, not at a port."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_FORK = multiprocessing.get_context("fork")  # a fresh interpreter would import for seconds
_FRESH = multiprocessing.get_context("forkserver")
SECONDS = 120.0


class Ranks:
    """Processes of one run, each of which calls `work(rank, *args)`.

    Args:
        num_ranks: How many.
        work: A function at the top level of a module.
        args: Handed to it.
        fresh: Fork them from a server that has only imported, so that nobody has used their memory before.
    """

    def __init__(
        self, num_ranks: int, work: Callable[..., Any], *args: Any, fresh: bool = False
    ) -> None:
        context: Any = _FRESH if fresh else _FORK
        if fresh:  # the server imports once for all of them, and does nothing else
            _FRESH.set_forkserver_preload([work.__module__])
        self.folder = tempfile.TemporaryDirectory()
        place = Path(self.folder.name)
        self.results = [place / f"result-{rank}" for rank in range(num_ranks)]
        self.processes = [
            context.Process(target=_run, args=(place, rank, num_ranks, work, args), daemon=True)
            for rank in range(num_ranks)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = SECONDS) -> list[int]:
        """The exit codes; whoever is not done in time is killed."""
        for process in self.processes:
            process.join(seconds)
        self.kill()
        return [process.exitcode or 0 for process in self.processes]

    def kill(self) -> None:
        """Kill -9 all of them."""
        for process in self.processes:
            process.kill()
            process.join()

    def returned(self) -> list[Any]:
        """What each returned; an exception that it raised is raised here."""
        codes = self.wait()
        values = [pickle.loads(f.read_bytes()) if f.exists() else None for f in self.results]
        assert codes == [0] * len(codes), (codes, values)
        return values


def run_ranks(
    num_ranks: int, work: Callable[..., Any], *args: Any, fresh: bool = False
) -> list[Any]:
    """What `work(rank, *args)` returns in each process."""
    return Ranks(num_ranks, work, *args, fresh=fresh).returned()


def _run(place: Path, rank: int, num_ranks: int, work: Callable[..., Any], args: Any) -> None:
    import torch
    from accelerate import PartialState
    from torch import distributed as dist

    from vlv.training.distributed import join_world

    torch.set_num_threads(1)
    join_world.cache_clear()  # the process that was forked may have trained alone
    PartialState._reset_state()
    if num_ranks > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank}
        numbers |= {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "OMP_NUM_THREADS": 1}
        os.environ.update({name: str(number) for name, number in numbers.items()})
        dist.init_process_group(
            "gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=num_ranks
        )
    try:
        value = work(rank, *args)
    except BaseException as error:  # noqa: BLE001
        traceback.print_exc()
        value, code = repr(error), 1
    else:
        code = 0
    (place / f"result-{rank}").write_bytes(pickle.dumps(value))
    os._exit(code)  # nobody waits for the others here: a test looks at the exit codes
