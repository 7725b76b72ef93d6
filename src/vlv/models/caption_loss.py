"""The cross-entropy of captions behind their prefixes, computed where captions are and nowhere else.

Sequences of different lengths share a pass: packed into one row, each attending to itself, or grouped by length; the
logits of a large vocabulary exist for a few positions at a time. Shapes: B captions, Q prefix positions, T_b tokens of
caption b with its end token (the last is predicted and never read, so caption b takes Q + T_b - 1 positions), I_b tokens
of the instruction that may stand before it, which is read and never predicted, E width of the language model, V vocabulary;
N positions in all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from vlv.errors import ConfigError
from vlv.models.compilation import uncompiled
from vlv.models.packing import Packed, can_pack, enable_packing

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
    chunk = chunk or _chunk_size(hidden.device, head)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden.to(dtype), head.weight, head.bias, targets, chunk
        )
    return loss


def _chunk_size(device: torch.device, head: nn.Linear) -> int:
    """Positions whose logits exist at a time."""
    logits = _CHUNK_LOGITS.get(device.type, _CHUNK_LOGITS["cuda"])
    return max(1, logits // head.out_features)


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


def near_lengths(lengths: Sequence[int], *, max_padding: float = 0.04) -> list[list[int]]:
    """Group sequences so that padding each group to its longest adds little.

    Groups are split where that saves most, until the padding is small enough.

    Returns:
        Indices of each group, the shortest sequences first; equal lengths keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    groups = [order]
    total = sum(lengths)

    def padded(group: list[int]) -> int:
        return len(group) * lengths[group[-1]]

    while 1 - total / sum(map(padded, groups)) > max_padding:
        savings = [
            (padded(group) - padded(group[:cut]) - padded(group[cut:]), number, cut)
            for number, group in enumerate(groups)
            for cut in range(1, len(group))
        ]
        _, number, cut = max(savings)
        groups[number : number + 1] = [groups[number][:cut], groups[number][cut:]]
    return groups


Batching = Literal["auto", "packed", "bucketed", "padded"]
LossMean = Literal["tokens", "texts"]

logger = logging.getLogger(__name__)


def caption_loss(
    llm: PreTrainedModel,
    prefix: Tensor,
    rows: Sequence[Sequence[int]],
    *,
    instructions: Sequence[Sequence[int]] = (),
    batching: Batching = "auto",
    head: nn.Linear | None = None,
    mean: LossMean = "tokens",
) -> Tensor:
    """Mean cross-entropy of the captions.

    Args:
        llm: Any causal language model of transformers.
        prefix: e, (B, Q, E).
        rows: The tokens of each caption, with the end token; M captions of each prefix, one after the other.
        instructions: The tokens between the prefix and each caption, which carry no loss; empty is none at all.
        batching: "packed" puts all captions into one row, "bucketed" reads captions of about the same length together,
            "padded" pads all to the longest. "auto" packs where the model can.
        head: What makes logits of the last states where that is all that happens, see `plain_head`; with None the
            logits of all captions exist at once.
        mean: Over all tokens; or over those of each caption first, so that a short one counts as much as a long one.

    Returns:
        A float32 scalar.

    Raises:
        ConfigError: Captions shall be packed, but the model's attention cannot be exchanged.
    """
    if mean == "texts":
        found = caption_log_probs(
            llm, prefix, rows, instructions=instructions, batching=batching, head=head
        )
        return -(found / _on(found.device, [len(row) for row in rows])).mean()
    total = torch.stack([
        _cross_entropy(part, head) for part in _read(llm, prefix, rows, instructions, batching, head)
    ]).sum()  # fmt: skip
    return total / sum(map(len, rows))


def caption_log_probs(
    llm: PreTrainedModel,
    prefix: Tensor,
    rows: Sequence[Sequence[int]],
    *,
    instructions: Sequence[Sequence[int]] = (),
    batching: Batching = "auto",
    head: nn.Linear | None = None,
) -> Tensor:
    """Log-probability of each caption: the sum over its tokens, with gradients.

    Args:
        llm: Any causal language model of transformers.
        prefix: e, (B, Q, E).
        rows: The tokens of each caption, with the end token where the model wrote it; M captions of each prefix, one after the
            other. Packed captions share the reading of their prefix.
        instructions: As of `caption_loss`.
        batching: As of `caption_loss`.
        head: As of `caption_loss`.

    Returns:
        (B M,), float32.
    """
    found: dict[int, Tensor] = {}
    for part in _read(llm, prefix, rows, instructions, batching, head):
        lengths = [len(rows[index]) for index in part.captions]
        sums = [x.sum() for x in torch.split(_token_log_probs(part, head), lengths)]
        found |= zip(part.captions, sums, strict=True)
    return torch.stack([found[index] for index in range(len(rows))])


class _Text(NamedTuple):
    """What stands behind a prefix."""

    instruction: Sequence[int]
    """Tokens that are only read."""
    caption: Sequence[int]
    """Tokens that are predicted."""

    @property
    def read(self) -> list[int]:
        """Tokens that are read, I_b + T_b - 1; the last of the caption is not."""
        return [*self.instruction, *self.caption[:-1]]


class _Read(NamedTuple):
    """What a language model says where the tokens of some captions are predicted, N positions in all."""

    captions: list[int]
    """Which captions, in the order of their tokens."""
    outputs: Tensor
    """Last states (N, E) where there is a plain head, or else logits (N, V)."""
    targets: Tensor
    """The tokens, (N,)."""


def _read(
    llm: PreTrainedModel,
    prefix: Tensor,
    rows: Sequence[Sequence[int]],
    instructions: Sequence[Sequence[int]],
    batching: Batching,
    head: nn.Linear | None,
) -> Iterator[_Read]:
    """Read captions behind prefixes and instructions, M for each prefix, in as many passes as `batching` takes.

    Raises:
        ConfigError: Captions shall be packed, but the model's attention cannot be exchanged.
    """
    if batching == "packed" and not can_pack(llm):
        raise ConfigError(
            f"{type(llm).__name__} cannot read packed captions, for its attention cannot be exchanged; "
            "set stage2.batching to auto or bucketed"
        )
    before = instructions or [()] * len(rows)
    texts = [_Text(i, row) for i, row in zip(before, rows, strict=True)]
    if batching == "packed" or (batching == "auto" and can_pack(llm)):
        yield _Read(list(range(len(rows))), *_packed(llm, prefix, texts, head))
        return
    prefix = prefix.repeat_interleave(len(rows) // len(prefix), 0)
    for group in _groups([prefix.shape[1] + len(text.read) for text in texts], batching):
        yield _Read(group, *_padded(llm, prefix[group], [texts[i] for i in group], head))


def _cross_entropy(part: _Read, head: nn.Linear | None) -> Tensor:
    """Sum over all tokens."""
    if head is None:
        return F.cross_entropy(part.outputs.float(), part.targets, reduction="sum")
    return chunked_cross_entropy(part.outputs, part.targets, head)


def _token_log_probs(part: _Read, head: nn.Linear | None) -> Tensor:
    """Log-probability of each token, (N,); the logits of a chunk are computed again in the backward pass."""
    if head is None:
        return _log_probs_of(part.outputs, part.targets)
    size = _chunk_size(part.outputs.device, head)
    chunks = zip(torch.split(part.outputs, size), torch.split(part.targets, size), strict=True)

    def of_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        return _log_probs_of(head(hidden), targets)

    found = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat(found)


def _log_probs_of(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def padding_share(
    llm: PreTrainedModel, num_prefix: int, rows: Sequence[Sequence[int]], batching: Batching
) -> float:
    """Share of the positions that `caption_loss` reads for nothing, behind the ends of captions.

    Args:
        llm: The language model.
        num_prefix: Q.
        rows: The tokens behind each prefix, those of an instruction included.
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
    llm: PreTrainedModel, prefix: Tensor, texts: Sequence[_Text], head: nn.Linear | None
) -> tuple[Tensor, Tensor]:
    """Outputs and targets (see `_Read`), all captions in one row without padding, each prefix once."""
    enable_packing(llm)
    num_prefix, device, copies = prefix.shape[1], prefix.device, len(texts) // len(prefix)
    read = [len(text.read) for text in texts]
    ids = _on(device, list(chain.from_iterable(text.read for text in texts)))
    embedded = llm.get_input_embeddings()(ids).split(read)
    firsts = range(0, len(texts), copies)
    parts = [[e, *embedded[i : i + copies]] for e, i in zip(prefix, firsts, strict=True)]
    inputs = torch.cat(list(chain.from_iterable(parts)))[None]
    packing = Packed.of(num_prefix, [read[i : i + copies] for i in firsts], device)
    wanted: list[int] = []
    start = 0
    for index, (text, count) in enumerate(zip(texts, read, strict=True)):
        if index % copies == 0:
            start += num_prefix
            end_of_prefix = start - 1
        positions = [end_of_prefix, *range(start, start + count)]
        wanted += positions[len(text.instruction) :]  # the first of them predicts the first token
        start += count
    arguments = {
        "inputs_embeds": inputs,  # (1, N, E)
        "position_ids": packing.positions,
        "attention_mask": inputs.new_ones(1, 1, 1, 1),  # stands for one; `packing` says it all
        "use_cache": False,
        "packing": packing,
    }
    targets = _on(device, list(chain.from_iterable(text.caption for text in texts)))
    if head is None:
        return llm(**arguments, logits_to_keep=_on(device, wanted)).logits[0], targets
    states = llm.base_model(**arguments).last_hidden_state[0]
    return states.index_select(0, _on(device, wanted)), targets


def _padded(
    llm: PreTrainedModel, prefix: Tensor, texts: Sequence[_Text], head: nn.Linear | None
) -> tuple[Tensor, Tensor]:
    """Outputs and targets (see `_Read`), each text padded to the longest.

    Padding is on the right, so no supervised token can see it and no attention mask is needed.
    """
    device, reads = prefix.device, [text.read for text in texts]
    longest = 1 + max(map(len, reads))  # T
    padding = [[text.caption[0]] * (longest - 1 - len(text.read)) for text in texts]
    ids = _on(device, [[*read, *rest] for read, rest in zip(reads, padding, strict=True)])
    embedded = llm.get_input_embeddings()(ids.long())  # (B, T - 1, E)
    arguments = {"inputs_embeds": torch.cat([prefix, embedded], dim=1), "use_cache": False}
    places = [range(len(text.instruction), len(text.read) + 1) for text in texts]
    wanted = _on(device, [b * longest + t for b, place in enumerate(places) for t in place])
    targets = _on(device, list(chain.from_iterable(text.caption for text in texts)))
    # The last T positions predict the T tokens; the first of them is the end of the prefix.
    if head is None:
        outputs = llm(**arguments, logits_to_keep=longest).logits.flatten(0, 1)  # (B T, V)
    else:
        states = llm.base_model(**arguments).last_hidden_state
        outputs = states[:, -longest:].flatten(0, 1)  # (B T, E)
    return outputs.index_select(0, wanted), targets


def _on(device: torch.device, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
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
        llm: Without real weights the check is skipped.
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
        with uncompiled(llm):
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
