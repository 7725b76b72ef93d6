"""The loss of captions is the same however they share a pass, and no matrix of logits is held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from tests import tiny
from tests.models.test_llm_families import FAMILIES, make
from vlv.errors import ConfigError
from vlv.models.caption_loss import (
    caption_loss,
    chunked_cross_entropy,
    near_lengths,
    plain_head,
)
from vlv.models.captioner import CaptionDecoder
from vlv.models.packing import ATTENTION, Packed, can_pack

CAPTIONS = list(tiny.CAPTIONS)


def context(rows: int = len(CAPTIONS)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, tiny.NUM_QUERIES, tiny.TEXT_WIDTH, generator=generator)


def loss_and_gradients(decoder: CaptionDecoder, batching: Any) -> tuple[Tensor, dict[str, Tensor]]:
    decoder.zero_grad()
    c = context().requires_grad_()
    loss = decoder.loss(c, CAPTIONS, batching=batching)
    loss.backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    assert c.grad is not None
    return loss.detach(), {**gradients, "c": c.grad}


def one_by_one(decoder: CaptionDecoder) -> Tensor:
    """The mean over all tokens, every caption alone and with all its logits."""
    c, losses = context(), []
    for row, caption in enumerate(CAPTIONS):
        ids = decoder.tokenize([caption]).ids
        embedded = decoder.llm.get_input_embeddings()(ids[:, :-1])
        inputs = torch.cat([decoder.prefix(c[row : row + 1]), embedded], dim=1)
        logits = decoder.llm(inputs_embeds=inputs).logits[0, tiny.NUM_QUERIES - 1 :]
        losses.append(F.cross_entropy(logits, ids[0], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("batching", ["packed", "bucketed", "padded"])
def test_every_batching_gives_the_same_loss_and_gradients(batching: str) -> None:
    decoder = tiny.make_caption_decoder()
    reference = tiny.make_caption_decoder()
    expected = one_by_one(reference)
    expected.backward()
    loss, gradients = loss_and_gradients(decoder, batching)
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_pack_where_they_can(family: str) -> None:
    decoder = make(family)
    texts = ["A red cube.", "Two spheres", "It's night"]
    packs = can_pack(decoder.llm)
    assert packs is (family != "gemma2")  # its capped attention is none of SDPA's
    batching: Any = "packed" if packs else "bucketed"
    padded = decoder.loss(context(3), texts, batching="padded")
    torch.testing.assert_close(
        decoder.loss(context(3), texts, batching=batching), padded, rtol=0, atol=1e-5
    )


def test_sliding_windows_stay_within_their_caption() -> None:
    """The window is shorter than the sequences, so that the mask counts."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=410,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    llm = Qwen2ForCausalLM(config).eval()
    prefix = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    rows = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15]]
    packed, padded = (
        caption_loss(llm, prefix, rows, batching=b, head=plain_head(llm))  # type: ignore[arg-type]
        for b in ("packed", "padded")
    )
    assert config.layer_types == ["full_attention", "sliding_attention"]
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)


def test_a_model_without_attention_is_refused_or_bucketed() -> None:
    config = MambaConfig(vocab_size=410, hidden_size=16, num_hidden_layers=1, state_size=4)
    llm = MambaForCausalLM(config).eval()
    prefix, rows = torch.randn(2, 3, 16), [[4, 5, 6], [7, 8]]
    assert not can_pack(llm)
    with pytest.raises(ConfigError, match="cannot read packed captions"):
        caption_loss(llm, prefix, rows, batching="packed")
    automatic, padded = (
        caption_loss(llm, prefix, rows, batching=b)  # type: ignore[arg-type]
        for b in ("auto", "padded")
    )
    torch.testing.assert_close(automatic, padded, rtol=0, atol=1e-5)


def test_generation_is_the_same_after_packed_training() -> None:
    decoder = tiny.make_caption_decoder()
    before = decoder.generate(context(2), max_new_tokens=8)
    decoder.loss(context(), CAPTIONS, batching="packed")
    assert decoder.llm.config._attn_implementation == ATTENTION
    assert decoder.generate(context(2), max_new_tokens=8) == before


# --- the head


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_chunks_equal_the_whole(chunk: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(7, 5, generator=generator, requires_grad=True)
    ids = torch.randint(0, 11, (7,), generator=generator)
    head = nn.Linear(5, 11, bias=bias)
    expected = F.cross_entropy(head(hidden), ids, reduction="sum")
    wanted = torch.autograd.grad(3 * expected, [hidden, *head.parameters()])
    loss = chunked_cross_entropy(hidden, ids, head, chunk=chunk)
    found = torch.autograd.grad(3 * loss, [hidden, *head.parameters()])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, wanted)


def test_a_frozen_head_gets_no_gradient_and_a_frozen_body_none_either() -> None:
    hidden, ids = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    head = nn.Linear(5, 6).requires_grad_(False)
    assert not chunked_cross_entropy(hidden, ids, head).requires_grad
    hidden.requires_grad_()
    chunked_cross_entropy(hidden, ids, head).backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_bf16_products_are_summed_in_float32() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(64, 16, generator=generator, requires_grad=True)
    ids = torch.randint(0, 50, (64,), generator=generator)
    head = nn.Linear(16, 50, bias=False)
    exact = F.cross_entropy(head(hidden), ids, reduction="sum")
    (wanted,) = torch.autograd.grad(exact, [head.weight])
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, ids, head, chunk=8)
    (found,) = torch.autograd.grad(loss, [head.weight])
    assert loss.dtype == found.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.05)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def test_no_matrix_of_all_logits() -> None:
    hidden, ids = torch.randn(96, 4, requires_grad=True), torch.zeros(96, dtype=torch.long)
    head = nn.Linear(4, 1000, bias=False)
    with Largest() as largest:
        chunked_cross_entropy(hidden, ids, head, chunk=5).backward()
    assert largest.numel <= 5 * 1000  # a chunk of logits, or the head's gradient


def test_a_head_that_does_more_is_found_out() -> None:
    torch.manual_seed(0)
    llm = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)).eval()
    assert plain_head(llm) is llm.lm_head
    scaled = type(llm).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = scaled(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    llm.forward = forward.__get__(llm)
    assert plain_head(llm) is None


@pytest.mark.parametrize("batching", ["packed", "bucketed", "padded"])
@pytest.mark.parametrize("plain", [True, False])
def test_log_probs_are_the_loss_of_each_caption(
    batching: Any, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = tiny.make_caption_decoder()
    if not plain:
        monkeypatch.setattr(decoder, "find_head", lambda: None)
    rows = decoder.token_rows(CAPTIONS)
    decoder.zero_grad()
    found = decoder.log_probs_of_tokens(context(), [[row] for row in rows], batching=batching)
    each = [decoder.loss(context()[i : i + 1], [text]) for i, text in enumerate(CAPTIONS)]
    expected = -torch.stack(each) * torch.tensor([len(row) for row in rows])
    torch.testing.assert_close(found[:, 0], expected)
    (-found.sum() / sum(map(len, rows))).backward()
    of_sums = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    _, of_loss = loss_and_gradients(decoder, "padded")
    assert of_sums.keys() == of_loss.keys() - {"c"}
    for name, gradient in of_sums.items():
        torch.testing.assert_close(gradient, of_loss[name], atol=1e-6, rtol=1e-4)


def test_several_captions_of_a_context_share_its_row() -> None:
    decoder = tiny.make_caption_decoder()
    rows = decoder.token_rows(CAPTIONS)
    decoder.find_head()
    seen: list[int] = []
    layer = decoder.llm.base_model.layers[0].mlp
    handle = layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    results = {}
    for batching in ("packed", "padded"):
        decoder.zero_grad()
        c = context(2).requires_grad_()
        found = decoder.log_probs_of_tokens(c, [rows[:3], rows[3:6]], batching=batching)
        assert found.shape == (2, 3)
        (found * torch.arange(1, 7).view(2, 3) / 100).sum().backward()
        gradients = [p.grad for p in decoder.parameters() if p.grad is not None]
        results[batching] = [found.detach(), c.grad, *gradients]
    handle.remove()
    torch.testing.assert_close(results["packed"], results["padded"], atol=1e-5, rtol=1e-4)
    num_prefix = context().shape[1]
    assert seen[0] == 2 * num_prefix + sum(len(row) - 1 for row in rows[:6])
    alone = decoder.log_probs_of_tokens(context(2)[1:], [[rows[4]]])
    torch.testing.assert_close(results["packed"][0][1, 1], alone[0, 0])


# --- lengths


def realistic_lengths(count: int = 64, seed: int = 0) -> list[int]:
    """Caption tokens as in the paper's figure 8: about 170 to 280, 227 on average, a few cut at 300."""
    draws = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return [int(x) for x in (227 + 35 * draws).clamp(60, 300)]


@pytest.mark.parametrize("count", [8, 64])
def test_padding_is_small_at_realistic_lengths(count: int) -> None:
    lengths = [77 + n - 1 for n in realistic_lengths(count)]
    groups = near_lengths(lengths)
    assert sorted(i for group in groups for i in group) == list(range(count))
    positions = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    assert 1 - sum(lengths) / positions < 0.05
    assert len(groups) <= count / 2
    packed = Packed.of(77, [[length - 77] for length in lengths], torch.device("cpu"))
    assert packed.positions.shape == (1, sum(lengths))  # none at all


def test_packed_places() -> None:
    packed = Packed.of(1, [[1], [2]], torch.device("cpu"))
    assert packed.positions.tolist() == [[0, 1, 0, 1, 2]]
    assert packed.spread.tolist() == [0, 1, 1, 2, 3, 4]
    assert packed.collect.tolist() == [0, 1, 3, 4, 5]
    assert packed.shape == (2, 3)


def test_texts_of_a_prefix_share_it() -> None:
    packed = Packed.of(2, [[1, 0], [2, 1]], torch.device("cpu"))
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 2]]
    assert packed.spread.view(packed.shape).tolist() == [
        [0, 1, 2, 2],
        [0, 1, 1, 1],
        [3, 4, 5, 6],
        [3, 4, 7, 7],
    ]
    assert packed.collect.tolist() == [0, 1, 2, 8, 9, 10, 11, 14]


def test_packed_attention_in_bf16_is_near_that_in_float32() -> None:
    decoder = tiny.make_caption_decoder()
    rows = decoder.token_rows(CAPTIONS)[:4]
    c = context(2)
    exact = decoder.loss_of_tokens(c, rows, batching="packed")
    with torch.autocast("cpu", torch.bfloat16):
        found = decoder.loss_of_tokens(c, rows, batching="packed")
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=2e-2, atol=0)


def test_groups_are_few_and_in_order() -> None:
    assert near_lengths([5, 5, 5]) == [[0, 1, 2]]
    assert near_lengths([100, 10, 99, 11], max_padding=0.05) == [[1, 3], [2, 0]]
    assert near_lengths([100, 10], max_padding=0.9) == [[1, 0]]
