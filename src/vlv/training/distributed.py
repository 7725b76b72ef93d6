"""The processes that train together: who they are, how they agree, and how they share a module.

Launched by `torchrun` or `accelerate launch`, each process has one device; a process that was started alone is a world of
one, for which everything here does nothing. Agreements travel from host to host (gloo), so that no process waits for
its GPU; gradients travel from device to device (nccl, or gloo on CPUs).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import Tensor
from torch import distributed as dist

from vlv.errors import OtherProcessError

_PATIENCE = timedelta(hours=2)
"""How long the others wait while the first process evaluates, draws samples and saves."""
_LOST = re.compile(r"peer|gloo|nccl|socket|remote", re.IGNORECASE)
_BUCKET_BYTES = 2**28

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes of a run; ranks count from 0."""

    rank: int
    num_ranks: int
    device: torch.device
    """The device of this process."""
    hosts: dist.ProcessGroup | None = None
    """The group for agreements; None where there is one process."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs, samples, checkpoints and models."""
        return self.rank == 0

    @property
    def is_shared(self) -> bool:
        """Whether there are others."""
        return self.num_ranks > 1

    def exchange(self, values: Sequence[float]) -> list[list[float]]:
        """The numbers of every process, in the order of their ranks; each gives equally many.

        Raises:
            OtherProcessError: Another process ended.
        """
        if not self.is_shared:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64)
        everyone = [torch.empty_like(own) for _ in range(self.num_ranks)]
        with lost_process_in_words():
            dist.all_gather(everyone, own, group=self.hosts)
        return [numbers.tolist() for numbers in everyone]

    def gather(self, value: Result) -> list[Result]:
        """The values of every process, in the order of their ranks.

        Raises:
            OtherProcessError: Another process ended.
        """
        if not self.is_shared:
            return [value]
        everyone = [value] * self.num_ranks
        with lost_process_in_words():
            dist.all_gather_object(everyone, value, group=self.hosts)
        return everyone

    @contextmanager
    def together(self) -> Iterator[None]:
        """All processes leave the context, or none does: an error in one of them ends the others too.

        Raises:
            OtherProcessError: There was an error in another process; that one raises it.
        """
        failed = True
        try:
            yield
            failed = False
        finally:
            if failed:
                _tell_of_failure(self)
        if any(flags[0] for flags in self.exchange([0.0])):
            raise OtherProcessError("another process of this run failed; it says why", told=True)

    def on_main(self, work: Callable[[], Result]) -> Result:
        """What the first process gets by doing some work; the others wait for it.

        Raises:
            OtherProcessError: It failed.
        """
        results: list[Result] = []
        with self.together():
            if self.is_main:
                results.append(work())
        return self.gather(results)[0][0]

    def main_first(self, work: Callable[[], Result]) -> Result:
        """What each process gets by doing some work; the first does it before the others, for whom it fills caches."""
        results: list[Result] = []
        for turn in (self.is_main, not self.is_main):
            with self.together():
                if turn:
                    results.append(work())
        return results[0]

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over the processes; all of them hold equal shapes."""
        if self.is_shared:
            dist.all_reduce(tensor)
            tensor /= self.num_ranks
        return tensor

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the processes, many in one message."""
        for chunk in _chunks(tensors):
            flat = self.mean(torch.cat([tensor.flatten() for tensor in chunk]))
            for tensor, mean in zip(
                chunk, torch.split(flat, [t.numel() for t in chunk]), strict=True
            ):
                tensor.copy_(mean.view_as(tensor))


def _tell_of_failure(world: World) -> None:
    """Let the others leave `together`, if they are still there."""
    if not world.is_shared:
        return
    try:
        world.exchange([1.0])
    except OtherProcessError:
        return


@contextmanager
def lost_process_in_words() -> Iterator[None]:
    """Tell a lost connection in words."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        raise OtherProcessError(
            "another process of this run ended without a word; look for what killed it, then run the same command "
            f"again ({str(error).splitlines()[0]})",
            told=False,
        ) from error


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of about `_BUCKET_BYTES`."""
    chunk: list[Tensor] = []
    size = 0
    for tensor in tensors:
        chunk.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size >= _BUCKET_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@cache
def join_world() -> World:
    """This process among those that were launched together; the first call waits for the others."""
    launched = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not launched:
        return World(0, 1, PartialState().device)
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    if state.num_processes == 1:
        return World(0, 1, state.device)
    if state.process_index:
        logging.getLogger("vlv").setLevel(logging.ERROR)  # the first process warns for all
    hosts = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return World(state.process_index, state.num_processes, state.device, hosts)
