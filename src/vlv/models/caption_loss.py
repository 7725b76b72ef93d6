"""The cross-entropy of captions behind their prefixes, computed where captions are and nowhere else.

Shapes: B captions, Q prefix positions, T_b tokens of caption b with its end token, E width of the language model.
The last token of a caption is predicted and never read, so caption b takes Q + T_b - 1 positions.
"""

from __future__ import annotations

import logging
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlv.errors import ConfigError
from vlv.models.compilation import untranslated
from vlv.models.cross_entropy import chunked_cross_entropy
from vlv.models.packing import Packed, can_pack, enable_packing, near_lengths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

Batching = Literal["auto", "packed", "bucketed", "padded"]

logger = logging.getLogger(__name__)


def caption_loss(
    llm: PreTrainedModel,
    prefix: Tensor,
    rows: Sequence[Sequence[int]],
    *,
    batching: Batching = "auto",
    head: nn.Linear | None = None,
) -> Tensor:
    """Mean cross-entropy over all tokens of the captions.

    Args:
        llm: Any causal language model of transformers.
        prefix: e, (B, Q, E).
        rows: The tokens of each caption, with the end token.
        batching: "packed" puts all captions into one row, "bucketed" reads captions of about the same length together,
            "padded" pads all to the longest. "auto" packs where the model can.
        head: What makes logits of the last states where that is all that happens, see `plain_head`; with None the
            logits of all captions exist at once.

    Returns:
        A float32 scalar.

    Raises:
        ConfigError: Captions shall be packed, but the model's attention cannot be exchanged.
    """
    if batching == "packed" and not can_pack(llm):
        raise ConfigError(
            f"{type(llm).__name__} cannot read packed captions, for its attention cannot be exchanged; "
            "set stage2.batching to auto or bucketed"
        )
    if batching == "packed" or (batching == "auto" and can_pack(llm)):
        total = _packed(llm, prefix, rows, head)
    else:
        groups = _groups([prefix.shape[1] + len(row) - 1 for row in rows], batching)
        losses = [_padded(llm, prefix[group], [rows[i] for i in group], head) for group in groups]
        total = torch.stack(losses).sum()
    return total / sum(map(len, rows))


def padding_share(
    llm: PreTrainedModel, num_prefix: int, rows: Sequence[Sequence[int]], batching: Batching
) -> float:
    """Share of the positions that `caption_loss` reads for nothing, behind the ends of captions.

    Args:
        llm: The language model.
        num_prefix: Q.
        rows: The tokens of each caption.
        batching: As of `caption_loss`.
    """
    if batching == "packed" or (batching == "auto" and can_pack(llm)):
        return 0.0
    lengths = [num_prefix + len(row) - 1 for row in rows]
    read = sum(len(group) * max(lengths[i] for i in group) for group in _groups(lengths, batching))
    return 1 - sum(lengths) / read


def _groups(lengths: Sequence[int], batching: Batching) -> list[list[int]]:
    """Which captions share a pass, where they are not packed."""
    return [list(range(len(lengths)))] if batching == "padded" else near_lengths(lengths)


def _packed(
    llm: PreTrainedModel, prefix: Tensor, rows: Sequence[Sequence[int]], head: nn.Linear | None
) -> Tensor:
    """Sum of the losses, all captions in one row without padding."""
    enable_packing(llm)
    num_prefix, device = prefix.shape[1], prefix.device
    read = [len(row) - 1 for row in rows]
    ids = _on(device, list(chain.from_iterable(row[:-1] for row in rows)))
    texts = llm.get_input_embeddings()(ids).split(read)
    inputs = torch.cat([part for pair in zip(prefix, texts, strict=True) for part in pair])[None]
    packing = Packed.of([num_prefix + count for count in read], device)
    wanted: list[int] = []
    start = num_prefix - 1  # the end of the prefix predicts the first token
    for row in rows:
        wanted += range(start, start + len(row))
        start += num_prefix + len(row) - 1
    arguments = {
        "inputs_embeds": inputs,  # (1, N, E)
        "position_ids": packing.positions,
        "attention_mask": inputs.new_ones(1, 1, 1, 1),  # stands for one; `packing` says it all
        "use_cache": False,
        "packing": packing,
    }
    targets = _on(device, list(chain.from_iterable(rows)))
    if head is None:
        logits = llm(**arguments, logits_to_keep=_on(device, wanted)).logits[0]  # (sum T, V)
        return F.cross_entropy(logits.float(), targets, reduction="sum")
    states = llm.base_model(**arguments).last_hidden_state[0]  # (N, E)
    return chunked_cross_entropy(states.index_select(0, _on(device, wanted)), targets, head)


def _padded(
    llm: PreTrainedModel, prefix: Tensor, rows: Sequence[Sequence[int]], head: nn.Linear | None
) -> Tensor:
    """Sum of the losses, each caption padded to the longest.

    Padding is on the right, so no supervised token can see it and no attention mask is needed.
    """
    device, longest = prefix.device, max(map(len, rows))
    ids = _on(device, [[*row[:-1], *[row[0]] * (longest - len(row))] for row in rows])
    embedded = llm.get_input_embeddings()(ids.long())  # (B, T - 1, E)
    arguments = {"inputs_embeds": torch.cat([prefix, embedded], dim=1), "use_cache": False}
    wanted = _on(device, [b * longest + t for b, row in enumerate(rows) for t in range(len(row))])
    targets = _on(device, list(chain.from_iterable(rows)))
    # The last T positions predict the T tokens; the first of them is the end of the prefix.
    if head is None:
        logits = llm(**arguments, logits_to_keep=longest).logits.flatten(0, 1)  # (B T, V)
        return F.cross_entropy(logits[wanted].float(), targets, reduction="sum")
    states = llm.base_model(**arguments).last_hidden_state[:, -longest:].flatten(0, 1)  # (B T, E)
    return chunked_cross_entropy(states.index_select(0, wanted), targets, head)


def _on(device: torch.device, values: Any) -> Tensor:
    """Integers on a device, without waiting for it."""
    tensor = torch.tensor(values, dtype=torch.long)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@torch.no_grad()
def plain_head(llm: PreTrainedModel) -> nn.Linear | None:
    """The layer that makes logits of the last states, where it is linear and nothing follows it.

    Some models scale or cap their logits, and say so nowhere in common; so it is tried out on four tokens.

    Args:
        llm: With real weights; others are taken at their word.
    """
    head = llm.get_output_embeddings()
    body = llm.base_model
    if type(head) is not nn.Linear or body is llm:
        return None
    if not has_numbers(llm):
        return head
    inputs = llm.get_input_embeddings()(torch.arange(4, device=head.weight.device))[None]
    modes = {module: module.training for module in llm.modules()}
    llm.eval()
    try:
        with untranslated(llm):
            expected = llm(inputs_embeds=inputs, use_cache=False).logits
            found = head(body(inputs_embeds=inputs, use_cache=False).last_hidden_state)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
        return head
    logger.info(
        "%s does more to its logits than a linear layer: the logits of a batch are held whole",
        type(llm).__name__,
    )
    return None


def has_numbers(module: nn.Module) -> bool:
    """Whether a module holds real weights, neither meta or fake ones nor shards."""
    weight = next(module.parameters())
    return not weight.is_meta and type(weight.data) is Tensor
