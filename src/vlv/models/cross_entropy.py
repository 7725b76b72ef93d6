"""Cross-entropy over a large vocabulary without its matrix of logits.

The head is applied to a few positions at a time, and their gradient is taken at once, so that of the (N, V) logits only
one chunk exists at any moment. Nothing is computed twice. Shapes: N positions, E width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import nn

_CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}  # 64 MB are best measured; 0.5 GB keep a GPU busy


def chunked_cross_entropy(
    hidden: Tensor, targets: Tensor, head: nn.Linear, *, chunk: int | None = None
) -> Tensor:
    """Sum of the cross-entropy of every position.

    The logits are computed in the autocast dtype, where there is one, and everything after them in float32.

    Args:
        hidden: What the head reads, (N, E).
        targets: Ids, (N,).
        head: From width to vocabulary; its weight may be that of the token embeddings.
        chunk: Positions at a time; None takes as many as suit the device.

    Returns:
        A float32 scalar, with gradients to `hidden` and the head as exact as the whole matrix would give.
    """
    device = hidden.device.type
    if chunk is None:
        logits = _CHUNK_LOGITS.get(device, _CHUNK_LOGITS["cuda"])
        chunk = max(1, logits // head.out_features)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        loss = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden.to(dtype), head.weight, head.bias, targets, chunk
        )
    return cast("Tensor", loss)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient of a chunk is taken while its logits are there: softmax - one-hot.

    The head computes in the dtype of `hidden`; its gradients are float32 sums over the chunks. A vocabulary is wide, so
    every pass over its matrix counts: none is filled with zeros or copied without need.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int
    ) -> Tensor:
        for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden) if for_hidden else None
        d_weight: Tensor | None = None
        d_bias: Tensor | None = None
        for start in range(0, len(hidden), chunk):
            h, ids = hidden[start : start + chunk], targets[start : start + chunk, None]
            logits = F.linear(h, weight, bias)  # (chunk, V)
            scores = logits.log_softmax(-1, dtype=torch.float32)
            total -= scores.gather(1, ids).sum()
            if not (for_hidden or for_weight or for_bias):
                continue
            gradient = scores.exp_()
            gradient.scatter_add_(1, ids, gradient.new_full(ids.shape, -1.0))
            if for_bias:
                d_bias = gradient.sum(0) if d_bias is None else d_bias.add_(gradient.sum(0))
            gradient = gradient.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[start : start + chunk])
            if for_weight:
                d_weight = _product(gradient, h, d_weight)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = outputs
        of_weight, of_bias = ctx.dtypes
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * scale.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * scale).to(of_weight),
            None if d_bias is None else (d_bias * scale).to(of_bias),
            None,
            None,
        )


def _product(gradient: Tensor, hidden: Tensor, total: Tensor | None) -> Tensor:
    """gradient^T hidden (V, E) in float32, added to a total where there is one already."""
    if total is None:
        return (gradient.T @ hidden).float()
    if hidden.dtype == torch.float32:
        return torch.addmm(total, gradient.T, hidden, out=total)  # FLOPs of addmm_ are not counted
    return total.add_(gradient.T @ hidden)
