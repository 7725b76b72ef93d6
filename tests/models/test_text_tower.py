from __future__ import annotations

import pytest
import torch

from tests import tiny
from vlv.models.text_tower import contextualize, token_embeddings, tokenize


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_embeddings_give_what_token_ids_give(attention: str) -> None:
    tower = tiny.make_text_encoder(attention=attention)
    ids, _ = tokenize(tiny.make_clip_tokenizer(), tower, list(tiny.CAPTIONS))
    expected = tower(ids).last_hidden_state
    c = contextualize(tower, token_embeddings(tower, ids))
    assert expected.std() > 0.1
    assert torch.allclose(c, expected, atol=1e-6, rtol=0)


def test_embeddings_shorter_than_the_tower_give_what_token_ids_give() -> None:
    tower = tiny.make_text_encoder()
    ids = torch.arange(10)[None] + 5
    assert torch.allclose(
        contextualize(tower, token_embeddings(tower, ids)), tower(ids).last_hidden_state, atol=1e-6
    )


def test_bfloat16_weights_and_autocast_run() -> None:
    tower = tiny.make_text_encoder()
    z = torch.randn(2, 8, tiny.TEXT_WIDTH)
    reference = contextualize(tower, z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(contextualize(tower, z).float(), reference, atol=0.2)
    half = contextualize(tower.bfloat16(), z.bfloat16())
    assert torch.allclose(half.float(), reference, atol=0.2)


def test_the_tower_is_causal() -> None:
    tower = tiny.make_text_encoder()
    z = torch.randn(1, 6, tiny.TEXT_WIDTH)
    changed = z.clone()
    changed[:, 4] += 1.0
    difference = (contextualize(tower, z) - contextualize(tower, changed)).abs().amax((0, 2))
    assert (difference[:4] == 0).all()
    assert (difference[4:] > 0).all()


def test_gradient_flows_through_a_frozen_tower() -> None:
    tower = tiny.make_text_encoder().requires_grad_(False)
    z = torch.randn(2, 6, tiny.TEXT_WIDTH, requires_grad=True)
    contextualize(tower, z).square().sum().backward()
    assert z.grad is not None
    assert (z.grad.abs().sum(-1) > 0).all()
    assert all(p.grad is None for p in tower.parameters())


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 6, 31), "(B, Q, 32)"), ((6, 32), "(B, Q, 32)"), ((1, 17, 32), "16 positions, got 17")],
)
def test_embeddings_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        contextualize(tiny.make_text_encoder(), torch.zeros(shape))


def test_texts_are_padded_cut_and_counted() -> None:
    tokenizer, tower = tiny.make_clip_tokenizer(), tiny.make_text_encoder()
    ids, truncated = tokenize(tokenizer, tower, ["a cube", "a cube " * 20])
    assert ids.shape == (2, tiny.TEXT_POSITIONS)
    assert truncated.tolist() == [False, True]
    assert ids[0, 0] == tokenizer.bos_token_id
    assert ids[1, -1] == tokenizer.eos_token_id
    assert (ids[0, -3:] == tokenizer.pad_token_id).all()


def test_null_context_is_the_padded_empty_text() -> None:
    decoder = tiny.make_decoder()
    tokenizer, tower = decoder.tokenizer, decoder.text_encoder
    ids = tokenizer("", padding="max_length", max_length=16, return_tensors="pt").input_ids
    null = decoder.null_context(3).sequence
    assert null.shape == (3, tiny.TEXT_POSITIONS, tiny.TEXT_WIDTH)
    assert torch.allclose(null, tower(ids).last_hidden_state.expand(3, -1, -1), atol=1e-6)
