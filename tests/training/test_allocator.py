"""Memory that is freed stays with the process for as long as it trains."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from tests.training.ranks import run_ranks
from tests.training.support import Denoiser, train
from vlv.training.allocator import kept_memory
from vlv.training.loop import Losses

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")

CPU = torch.device("cpu")


def pages_filled() -> float:
    """Pages that the system hands out for a block of 64 MB: the median of ten blocks, taken and freed one by one.

    Not their sum: whatever else the process allocates may lie down in the place of a block, and the next one moves.
    """
    counts = []
    for _ in range(13):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return median(counts[3:])  # the first ones find their place


FRESH = 2**26 // 2**21
"""What `pages_filled` is at least, with pages of 2 MB, where memory comes from the system each time."""


def resident() -> int:
    """Bytes of the process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def in_and_out(rank: int) -> tuple[float, bool, float, int]:
    """Pages of a block before, whether memory is kept, pages of a block within, and bytes that are given back."""
    del rank
    before = pages_filled()
    with kept_memory(CPU) as is_kept:
        within = pages_filled()
        torch.ones(2**26)  # 256 MB
        kept = resident()
    return before, is_kept, within, kept - resident()


def test_freed_memory_is_found_again_within_and_given_back_afterwards() -> None:
    """In a process of its own: one that has done much may have found large places before."""
    [(before, is_kept, within, given_back)] = run_ranks(1, in_and_out)
    assert is_kept
    assert before >= FRESH
    assert within < FRESH / 4
    assert given_back > 200e6


class Counting(Denoiser):
    """Counts pages in its last step."""

    found: float = FRESH

    def loss(self, batch: Any, generator: torch.Generator) -> Losses:
        self.found = pages_filled()
        return super().loss(batch, generator)


def trained(rank: int, run_dir: Path) -> tuple[float, float]:
    """Pages of a block before training, and in its last step."""
    del rank
    before, objective = pages_filled(), Counting()
    train(run_dir, objective)
    return before, objective.found


def test_the_training_loop_keeps_memory(tmp_path: Path) -> None:
    [(before, within)] = run_ranks(1, trained, tmp_path)
    assert before >= FRESH
    assert within < FRESH / 4


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_the_users_own_setting_stands(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with kept_memory(CPU) as is_kept:
        assert not is_kept


def test_a_gpu_has_its_own_allocator() -> None:
    with kept_memory(torch.device("cuda")) as is_kept:
        assert not is_kept
