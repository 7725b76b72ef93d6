"""What makes training on a CPU faster, and nothing on a GPU. `loop.cpu_tricks` switches it; docs/performance.md measures it.

`kept_memory`: glibc gives large blocks back to the system at once. Every step then asks for them anew, and the system
fills each page with zeros before it is written. So what a step frees stays with the process.

`fast_attention`: PyTorch's backward pass of attention is slower in bfloat16 than in float32 on a CPU, so it is written out.
Shapes: B batch, h heads, k heads of keys and values, N queries, M keys, d width of a head.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of malloc.h
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
_RELEASE = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}
"""What glibc adjusts to where blocks are large; it stops adjusting once anything is set."""


@contextmanager
def kept_memory(*, enabled: bool) -> Iterator[bool]:
    """Within it the process keeps what is freed; afterwards that is given back, and so is later memory.

    The settings are glibc's. Under another C library, or where the environment sets malloc up (`MALLOC_*`,
    `GLIBC_TUNABLES`), nothing happens.

    Yields:
        Whether memory is kept.
    """
    library = _glibc() if enabled and not _is_set_up() else None
    if library is None:
        yield False
        return
    for option, value in _KEEP.items():
        library.mallopt(option, value)
    try:
        yield True
    finally:
        for option, value in _RELEASE.items():
            library.mallopt(option, value)
        library.malloc_trim(0)


def _is_set_up() -> bool:
    """Whether the user has taken the matter in hand."""
    return any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no such handle
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None


# --- attention

_LARGEST = 1024
"""Up to this geometric mean of N and M the weights of attention are kept for the backward pass."""

_attention = F.scaled_dot_product_attention


@contextmanager
def fast_attention(*, enabled: bool) -> Iterator[None]:
    """Replace PyTorch's attention by `cpu_attention` within the context, which encloses the backward pass: it may recompute."""
    if not enabled:
        yield
        return
    functions: Any = F
    functions.scaled_dot_product_attention = cpu_attention
    try:
        yield
    finally:
        functions.scaled_dot_product_attention = _attention


def cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's `scaled_dot_product_attention`; the result has the dtype of the query, or that of autocast, as on a GPU.

    For bfloat16 it is written out: products in bfloat16, as all others of the step, and softmax in float32 within. All
    else, and what is too long to keep its weights, is computed in float32 by PyTorch.

    Args:
        query: (B, h, N, d).
        key: (B, k, M, d), k = h unless `enable_gqa`.
        value: (B, k, M, d).
        attn_mask: Boolean (true is seen) or added to the scores; broadcast to (B, h, N, M).
        dropout_p: Share of weights that are dropped.
        is_causal: Query i sees the keys up to i.
        scale: Of the scores; d ** -0.5 by default.
        enable_gqa: Keys and values may have fewer heads, k a divisor of h.

    Returns:
        (B, h, N, d).
    """
    if torch.is_autocast_enabled("cpu"):  # rotary positions, for one, leave queries in float32
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    both = attn_mask is not None and is_causal  # PyTorch's error
    if _is_plain(query, key, value, attn_mask) and not (dropout_p or both):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if enable_gqa:
            key, value = (
                x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value)
            )
        added, nothing = _masks(query, key, attn_mask, is_causal)
        return _written_out(query, key, value, added, nothing, scale)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    whole = query.float(), key.float(), value.float()
    with torch.autocast("cpu", enabled=False):
        out = _attention(
            *whole, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return out.to(query.dtype)


def _is_plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether it is written out: in bfloat16, with weights that are not too many to keep."""
    return (
        all(x.dtype == torch.bfloat16 for x in (query, key, value))
        and query.shape[-2] * key.shape[-2] <= _LARGEST**2
        and (mask is None or not mask.requires_grad)
    )


def _masks(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores, and which queries see nothing, (..., N, 1); these get zeros, as PyTorch's do."""
    if mask is None:
        if not is_causal:
            return None, None
        square = query.new_full((query.shape[-2], key.shape[-2]), float("-inf"))
        return square.triu_(1)[None, None], None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    mask = mask.to(query.dtype)[(None,) * (4 - mask.ndim)]
    nothing = (mask == float("-inf")).all(-1, keepdim=True)
    return mask.masked_fill(nothing, 0.0), nothing


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    added: Tensor | None,
    nothing: Tensor | None,
    scale: float,
) -> Tensor:
    """softmax(query key^T scale + added) value; zeros for a query that sees nothing."""
    is_narrow = query.shape[-1] < key.shape[-2]  # the smaller one of the two is scaled
    scores = (query * scale) @ key.mT if is_narrow else (query @ key.mT) * scale  # (B, h, N, M)
    if added is not None:
        scores += added
    weights = scores.softmax(-1)
    return (weights if nothing is None else weights.masked_fill(nothing, 0.0)) @ value
