"""Attention over several sequences in one row without padding, each attending to itself and to a prefix that it may share.

Shapes: S sequences of up to L queries and K keys, N positions in all, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "vlv_packed_sdpa"
"""Name under which transformers knows `packed_attention`."""

SHARING = ("cpu",)
"""Devices on which a prefix of several texts attends to itself once. The texts then need a mask, and SDPA repeats keys and
values of grouped queries for it; a GPU's causal kernels need neither."""

_UNDERSTOOD = {"full_attention", "sliding_attention"}


class Part(NamedTuple):
    """Sequences that are attended to together, padded to one length; the queries are the last places of each."""

    queries: Tensor
    """For each place of the padded queries, which token of the row stands there, (S, L)."""
    keys: Tensor
    """Likewise of the keys, (S, K); K is at least L."""


@dataclass(frozen=True)
class Packed:
    """Where the sequences of one row begin and end."""

    positions: Tensor
    """Position of each token in its sequence, (1, N)."""
    parts: tuple[Part, ...]
    """Whole sequences; or prefixes that several texts share, and these texts."""
    collect: Tensor
    """For each token of the row, its place among the queries of all parts, (N,)."""

    @classmethod
    def of(cls, num_prefix: int, lengths: Sequence[Sequence[int]], device: torch.device) -> Packed:
        """The row of prefixes, each followed by its texts, which attend to it and to themselves.

        A prefix stands in the row once. It and a text are one sequence; but where it has several texts and `SHARING` names
        the device, it attends to itself once, and the keys of each text begin with it. Where a padded sequence has no
        token, its last one is repeated; it is never looked at.

        Args:
            num_prefix: Positions of each prefix, 1 or more.
            lengths: Those of the texts of each prefix.
            device: Where it is needed.
        """
        longest = max(map(max, lengths))
        is_shared = device.type in SHARING and max(map(len, lengths)) > 1
        positions: list[Tensor] = []
        prefixes: list[Tensor] = []
        texts: list[Tensor] = []  # each behind its prefix
        start = 0
        for several in lengths:
            prefixes.append(torch.arange(start, start := start + num_prefix))
            positions.append(torch.arange(num_prefix))
            for length in several:
                text = torch.arange(start, start := start + length)
                places = torch.cat([prefixes[-1], text])
                positions.append(torch.arange(num_prefix, num_prefix + length))
                texts.append(torch.cat([places, places[-1:].expand(longest - length)]))
        keys = torch.stack(texts)
        parts = [Part(keys, keys)]
        if is_shared:
            alone = torch.stack(prefixes)
            parts = [Part(alone, alone)]
            if longest:
                parts.append(Part(keys[:, num_prefix:], keys))
        row = torch.cat(positions)
        collect = row.new_zeros(len(row))
        standing = torch.cat([part.queries.flatten() for part in parts])
        # Of padding only the first place counts, which is a token's own: written last.
        collect[standing.flip(0)] = torch.arange(len(standing)).flip(0)

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        moved = tuple(Part(move(part.queries), move(part.keys)) for part in parts)
        return cls(move(row)[None], moved, move(collect))


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
    kwargs.pop("is_causal", None)
    found = []
    for part in packing.parts:
        inputs = (_apart(query, part.queries), _apart(key, part.keys), _apart(value, part.keys))
        if query.device.type == "cpu":  # whose backward pass in bfloat16 is five times as slow
            inputs = (inputs[0].float(), inputs[1].float(), inputs[2].float())
        mask = _mask(part, kwargs.get("sliding_window"))
        with torch.autocast(query.device.type, enabled=False):
            out, _ = sdpa_attention_forward(module, *inputs, mask, is_causal=mask is None, **kwargs)
        found.append(out.flatten(0, 1).to(query.dtype))  # (S L, H, d)
    return torch.cat(found).index_select(0, packing.collect)[None], None  # (1, N, H, d)


def _apart(x: Tensor, places: Tensor) -> Tensor:
    """A row (1, H, N, d) as padded sequences (S, H, L, d)."""
    spread = x[0].index_select(1, places.flatten())  # (H, S L, d)
    return spread.view(len(spread), *places.shape, -1).transpose(0, 1)


def _mask(part: Part, window: int | None) -> Tensor | None:
    """Causal mask (1, 1, L, K) that ends `window` tokens back; True is seen. None where SDPA needs none."""
    length, num_keys = part.queries.shape[1], part.keys.shape[1]
    windowed = window is not None and window < num_keys
    if length == num_keys and not windowed:
        return None
    place = torch.arange(num_keys, device=part.keys.device)
    back = place[num_keys - length :, None] - place
    seen = back >= 0
    if window is not None:
        seen &= back < window
    return seen[None, None]


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
