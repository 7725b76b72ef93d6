from __future__ import annotations

import pytest
import torch

from vlv.models.context import Context


def contexts() -> list[Context]:
    sequence, pooled, t5 = torch.randn(2, 3, 4), torch.randn(2, 5), torch.randn(2, 6, 7)
    return [Context(sequence), Context(sequence, pooled), Context(sequence, pooled, t5)]


@pytest.mark.parametrize("c", contexts())
def test_rows_are_cut_repeated_and_joined(c: Context) -> None:
    assert len(c) == 2
    again = Context.cat([c[:1], c[1:]])
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), c.tensors(), strict=True))
    repeated = c.repeat_interleave(2)
    assert len(repeated) == 4
    assert all(
        torch.equal(a[1], b[0]) for a, b in zip(repeated.tensors(), c.tensors(), strict=True)
    )
    assert [x.shape[0] for x in c[:1].expand(5).tensors()] == [5] * len(c.tensors())


def test_what_is_absent_stays_absent() -> None:
    plain, with_pooled, full = contexts()
    assert [len(c.tensors()) for c in (plain, with_pooled, full)] == [1, 2, 3]
    assert plain[:1].pooled is plain.expand(2).t5 is None
