"""Attention over several sequences in one row without padding, each attending to itself and to a prefix that it may share.

Shapes: S sequences of up to L positions, N positions in all, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "vlv_packed_sdpa"
"""Name under which transformers knows `packed_attention`."""

_UNDERSTOOD = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Packed:
    """Where the sequences of one row begin and end."""

    positions: Tensor
    """Position of each token in its sequence, (1, N)."""
    spread: Tensor
    """For each place of the padded sequences, which token of the row stands there, (S L,)."""
    collect: Tensor
    """For each token of the row, its place in the padded sequences, (N,)."""
    shape: tuple[int, int]
    """(S, L)."""

    @classmethod
    def of(cls, num_prefix: int, lengths: Sequence[Sequence[int]], device: torch.device) -> Packed:
        """The row of prefixes, each followed by its texts, which attend to it and to themselves.

        A prefix stands in the row once, and in the padded sequence of each of its texts. Where a padded sequence has no
        token, its last one is repeated; it is never looked at.

        Args:
            num_prefix: Positions of each prefix, 1 or more.
            lengths: Those of the texts of each prefix.
            device: Where it is needed.
        """
        longest = num_prefix + max(map(max, lengths))
        positions: list[Tensor] = []
        spread: list[Tensor] = []
        collect: list[Tensor] = []
        start = 0
        for texts in lengths:
            prefix, start = torch.arange(start, start + num_prefix), start + num_prefix
            positions.append(torch.arange(num_prefix))
            collect.append(torch.arange(num_prefix) + longest * len(spread))
            for length in texts:
                text, start = torch.arange(start, start + length), start + length
                places = torch.cat([prefix, text])
                rest = places[-1:].expand(longest - len(places))
                positions.append(torch.arange(num_prefix, num_prefix + length))
                collect.append(positions[-1] + longest * len(spread))
                spread.append(torch.cat([places, rest]))

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        shape = (len(spread), longest)
        row = move(torch.cat(positions))[None]
        return cls(row, move(torch.cat(spread)), move(torch.cat(collect)), shape)


def can_pack(llm: PreTrainedModel) -> bool:
    """Whether a language model's attention can be exchanged for `packed_attention`.

    It must run on SDPA, find its attention by name, and mix tokens in no other way (as state-space layers do).
    """
    config = llm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    return (
        config._attn_implementation in ("sdpa", ATTENTION)
        and bool(getattr(llm, "_supports_attention_backend", False))
        and kinds <= _UNDERSTOOD
        and not getattr(config, "alibi", False)
    )


def enable_packing(llm: PreTrainedModel) -> None:
    """Exchange the attention; without `packing` among its arguments the model works as before."""
    if llm.config.get_text_config()._attn_implementation != ATTENTION:
        llm.set_attn_implementation(ATTENTION)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packed | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA of transformers; with `packing`, causal attention within each sequence of a row.

    Args:
        module: The attention layer.
        query: (1, H, N, d).
        key: (1, H', N, d), H' a divisor of H.
        value: (1, H', N, d).
        attention_mask: Not read with `packing`.
        packing: Where the sequences are; None leaves everything to SDPA.
        **kwargs: As the layer gives them.

    Returns:
        (1, N, H, d), and no attention weights.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key, value = (_apart(x, packing) for x in (query, key, value))
    kwargs.pop("is_causal", None)
    window, length = kwargs.get("sliding_window"), packing.shape[1]
    mask = None if window is None or window >= length else _window(length, window, query.device)
    causal = mask is None
    out, _ = sdpa_attention_forward(module, query, key, value, mask, is_causal=causal, **kwargs)
    return out.flatten(0, 1).index_select(0, packing.collect)[None], None  # (1, N, H, d)


def _apart(x: Tensor, packing: Packed) -> Tensor:
    """A row (1, H, N, d) as padded sequences (S, H, L, d)."""
    spread = x[0].index_select(1, packing.spread)  # (H, S L, d)
    return spread.view(len(spread), *packing.shape, -1).transpose(0, 1)


def _window(length: int, window: int, device: torch.device) -> Tensor:
    """Causal mask (1, 1, L, L) that ends `window` tokens back; True is seen."""
    place = torch.arange(length, device=device)
    back = place[:, None] - place
    return ((back >= 0) & (back < window))[None, None]


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
