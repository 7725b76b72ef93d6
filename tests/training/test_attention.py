"""Attention of a training step in bf16 on a CPU: that of float32, to the rounding of bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlv.training import attention
from vlv.training.attention import cpu_attention

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
    monkeypatch.setattr(attention, "_LARGEST", 19)
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
