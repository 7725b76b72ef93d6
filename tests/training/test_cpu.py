"""On a CPU: freed memory stays with the process while it trains, and attention in bf16 is written out."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from statistics import quantiles
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.training.ranks import run_ranks
from tests.training.support import Denoiser, train
from vlv.training import cpu
from vlv.training.cpu import cpu_attention, kept_memory
from vlv.training.objective import Losses

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")


def pages_filled() -> float:
    """Pages that the system hands out for a block of 64 MB: the lower quartile of twenty blocks, taken and freed one by one.

    Not their sum: whatever else the process allocates may lie down in the place of a block, and the next one moves; on a
    busy machine half of them did. Where memory comes from the system each time, every block is new.
    """
    counts = []
    for _ in range(23):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return quantiles(counts[3:])[0]  # the first ones find their place


FRESH = 2**26 // 2**21
"""What `pages_filled` is at least, with pages of 2 MB, where memory comes from the system each time."""


def resident() -> int:
    """Bytes of the process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def in_and_out(rank: int) -> tuple[float, bool, float, int]:
    """Pages of a block before, whether memory is kept, pages of a block within, and bytes that are given back."""
    del rank
    before = pages_filled()
    with kept_memory(enabled=True) as is_kept:
        within = pages_filled()
        torch.ones(2**26)  # 256 MB
        kept = resident()
    return before, is_kept, within, kept - resident()


@pytest.mark.slow
@on_linux
def test_freed_memory_is_found_again_within_and_given_back_afterwards() -> None:
    """In a process of its own: one that has done much may have found large places before."""
    [(before, is_kept, within, given_back)] = run_ranks(1, in_and_out, fresh=True)
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


@pytest.mark.slow
@on_linux
def test_the_training_loop_keeps_memory(tmp_path: Path) -> None:
    [(before, within)] = run_ranks(1, trained, tmp_path, fresh=True)
    assert before >= FRESH
    assert within < FRESH / 4


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_the_users_own_setting_stands(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with kept_memory(enabled=True) as is_kept:
        assert not is_kept


def test_the_setting_switches_it_off() -> None:
    with kept_memory(enabled=False) as is_kept:
        assert not is_kept


# --- attention

CASES: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "all": ((20, 20), {}),
    "cross": ((20, 7), {"scale": 0.3}),
    "causal": ((20, 20), {"is_causal": True}),
    "boolean mask": ((20, 20), {"attn_mask": torch.ones(1, 1, 20, 20).tril(2).bool()}),
    "added mask": ((20, 7), {"attn_mask": torch.linspace(-2, 2, 3 * 140).view(3, 1, 20, 7)}),
}


def make_inputs(sizes: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Queries, keys and values, laid out as models lay them out, and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = sizes
    lengths = (queries, keys, keys, queries)
    inputs = [torch.randn(3, n, 2, 8, generator=generator).to(dtype) for n in lengths]
    return [x.transpose(1, 2).requires_grad_() for x in inputs]


def gradients(function: Any, inputs: list[Tensor], **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The result, and the gradients of queries, keys and values."""
    out: Tensor = function(*inputs[:3], **options)
    grads = torch.autograd.grad(out, inputs[:3], inputs[3].detach().to(out.dtype))
    return out.detach(), list(grads)


@pytest.mark.parametrize("case", CASES)
def test_result_and_gradient(case: str) -> None:
    sizes, options = CASES[case]
    inputs = make_inputs(sizes)
    whole = [x.detach().float().requires_grad_() for x in inputs]
    expected, exact = gradients(F.scaled_dot_product_attention, whole, **options)
    with torch.autocast("cpu", torch.bfloat16):
        out, found = gradients(cpu_attention, inputs, **options)
    for mine, true in zip([out, *found], [expected, *exact], strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - true).norm() < 0.01 * true.norm()
    again = gradients(cpu_attention, inputs, **options)[1]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("is_causal", [False, True])
def test_fewer_heads_of_keys_and_values(is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = (4, 2, 2, 4)
    inputs = [torch.randn(3, h, 20, 8, generator=generator).bfloat16() for h in sizes]
    inputs = [x.requires_grad_() for x in inputs]
    whole = [x.detach().float().requires_grad_() for x in inputs]
    options = {"is_causal": is_causal, "enable_gqa": True}
    expected, exact = gradients(F.scaled_dot_product_attention, whole, **options)
    out, found = gradients(cpu_attention, inputs, **options)
    for mine, true in zip([out, *found], [expected, *exact], strict=True):
        assert mine.shape == true.shape
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - true).norm() < 0.01 * true.norm()
    assert not torch.equal(out, expected.bfloat16()), "products are in bfloat16"


def test_autocast_takes_float32_along() -> None:
    inputs = make_inputs((20, 20))
    mixed = [inputs[0].detach().float().requires_grad_(), *inputs[1:]]
    expected, exact = gradients(cpu_attention, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out, found = gradients(cpu_attention, mixed)
    assert torch.equal(out, expected)
    assert found[0].dtype == torch.float32
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("added", [False, True])
def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient(added: bool) -> None:
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[4] = False
    given = torch.zeros(20, 20).masked_fill(~mask, float("-inf")) if added else mask
    out, found = gradients(cpu_attention, make_inputs((20, 20)), attn_mask=given)
    assert all(x.isfinite().all() and x.any() for x in (out, *found))
    assert (out[:, :, 4] == 0).all()
    assert (found[0][:, :, 4] == 0).all()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
def test_float32_is_left_as_it_is(options: dict[str, Any]) -> None:
    inputs = make_inputs((20, 20), torch.float32)
    expected, exact = gradients(F.scaled_dot_product_attention, inputs, **options)
    out, found = gradients(cpu_attention, inputs, **options)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def test_what_is_too_long_is_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs((20, 20))
    whole = [x.float() for x in inputs]
    expected = F.scaled_dot_product_attention(*whole[:3]).bfloat16()
    assert not torch.equal(cpu_attention(*inputs[:3]), expected)
    monkeypatch.setattr(cpu, "_LARGEST", 19)
    assert torch.equal(cpu_attention(*inputs[:3]), expected)


@pytest.mark.parametrize("case", CASES)
def test_without_a_gradient_the_result_is_the_same(case: str) -> None:
    sizes, options = CASES[case]
    inputs = make_inputs(sizes)
    expected = cpu_attention(*inputs[:3], **options)
    with torch.no_grad():
        assert torch.equal(cpu_attention(*inputs[:3], **options), expected)


def test_few_long_tokens() -> None:
    """As in attention over channels, where a head is wider than there are tokens."""
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(2, 3, 4, 50, generator=generator).bfloat16() for _ in range(3)]
    expected = F.scaled_dot_product_attention(*(x.float() for x in inputs), scale=0.1)
    out = cpu_attention(*inputs, scale=0.1)
    assert (out.float() - expected).norm() < 0.01 * expected.norm()
