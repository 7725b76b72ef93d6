"""Any causal language model of transformers can be the caption decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests import tiny
from vlv.errors import ConfigError
from vlv.models import writers
from vlv.models.captioner import CaptionDecoder
from vlv.models.decoding import Generation

TEXTS = ["A large red cube stands on the floor.", "Two spheres"]
COMMON: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
DECODER: dict[str, Any] = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
OPT: dict[str, Any] = {
    **COMMON,
    "hidden_size": 32,
    "word_embed_proj_dim": 16,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "do_layer_norm_before": False,
    "dropout": 0.0,
}
GPT2: dict[str, Any] = {
    **COMMON,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, DECODER),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, DECODER),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, DECODER),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {**DECODER, "sliding_window": 8}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**DECODER, "sliding_window": 8}),
    "phi3": (Phi3ForCausalLM, Phi3Config, DECODER),
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "opt": (OPTForCausalLM, OPTConfig, OPT),
}
LEARNT_POSITIONS = ["gpt2", "opt"]


def make_llm(family: str) -> PreTrainedModel:
    model, config, settings = FAMILIES[family]
    vocab = len(tiny.make_llm_tokenizer())
    return tiny._seeded(lambda: model(config(vocab_size=vocab, **settings)), 4)


def make(family: str) -> CaptionDecoder:
    tokenizer = tiny.make_llm_tokenizer()
    tokenizer.pad_token = None
    return CaptionDecoder.from_llm(make_llm(family), tokenizer, text_width=tiny.TEXT_WIDTH, seed=0)


@pytest.fixture
def c(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(2, tiny.NUM_QUERIES, tiny.TEXT_WIDTH, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_two_captions_by_heart_and_writes_them(
    family: str, c: torch.Tensor, tmp_path: Path
) -> None:
    decoder = make(family)
    optimizer = torch.optim.AdamW(decoder.trainable("mlp+llm"), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(decoder.loss(c, TEXTS))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.2 < losses[0]
    decoder.eval()
    written = decoder.generate(c, max_new_tokens=40)
    assert [caption.text for caption in written] == TEXTS
    assert all(caption.finished for caption in written)
    assert decoder.generate(c[1:], max_new_tokens=40)[0] == written[1]
    decoder.save_pretrained(tmp_path)
    assert CaptionDecoder.from_pretrained(tmp_path).generate(c, max_new_tokens=40) == written


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_cross_entropy_of_the_whole_sequence(family: str, c: torch.Tensor) -> None:
    """Against the logits of single, unpadded sequences."""
    decoder = make(family)
    nats, count = 0.0, 0
    for row, text in zip(c, TEXTS, strict=True):
        ids = torch.tensor([*decoder.tokenizer(text).input_ids, 0])
        embedded = decoder.llm.get_input_embeddings()(ids)[None]
        logits = decoder.llm(
            inputs_embeds=torch.cat([decoder.prefix(row[None]), embedded], 1)
        ).logits
        log_p = logits[0, tiny.NUM_QUERIES - 1 : -1].log_softmax(-1)
        nats -= log_p.gather(1, ids[:, None]).sum().item()
        count += len(ids)
    assert decoder.loss(c, TEXTS).item() == pytest.approx(nats / count, abs=1e-4)


@pytest.mark.parametrize("family", LEARNT_POSITIONS)
def test_more_tokens_than_positions_are_refused_in_words(family: str, c: torch.Tensor) -> None:
    decoder = make(family)
    limit = 64 - tiny.NUM_QUERIES + 1
    assert len(decoder.generate(c, max_new_tokens=limit)) == 2
    with pytest.raises(ConfigError, match=rf"64 positions.* set max_new_tokens to at most {limit}"):
        decoder.generate(c, max_new_tokens=limit + 1)
    long = ["cube " * 80] * 2
    assert decoder.loss(c, long, max_tokens=limit).isfinite()
    with pytest.raises(ConfigError, match=f"set max_caption_tokens to at most {limit}"):
        decoder.loss(c, long)


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_of_one_reading_are_those_of_many(
    family: str, c: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, seeds = make(family), [5, 6, 7, 8, 9, 10]
    how = Generation(do_sample=True, temperature=2.0, seed=seeds, max_new_tokens=12)
    expected = decoder.write(c.repeat_interleave(3, 0), how)
    lengths: list[int] = []
    read = writers.read_once

    def watched(llm: PreTrainedModel, prefix: torch.Tensor, copies: int) -> Any:
        lengths.append(len(prefix))
        return read(llm, prefix, copies)

    monkeypatch.setattr(writers, "read_once", watched)
    assert decoder.write(c, how, copies=3) == expected
    assert lengths == ([] if family in ("gemma2", "gemma3") else [2])  # sliding windows forget
    greedy = Generation(max_new_tokens=12)
    assert decoder.write(c, greedy, copies=2)[::2] == decoder.write(c, greedy)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_instruction_is_read_and_not_predicted(family: str, c: torch.Tensor) -> None:
    """Against the logits of single, unpadded sequences."""
    decoder, instructions = make(family), ["What is it?", None]
    nats, count = 0.0, 0
    for row, text, asked in zip(c, TEXTS, instructions, strict=True):
        before = [] if asked is None else decoder.tokenizer(f"{asked}\n").input_ids
        ids = torch.tensor([*before, *decoder.tokenizer(text).input_ids, 0])
        embedded = decoder.llm.get_input_embeddings()(ids)[None]
        inputs = torch.cat([decoder.prefix(row[None]), embedded], 1)
        log_p = decoder.llm(inputs_embeds=inputs).logits[0, tiny.NUM_QUERIES - 1 : -1]
        own = log_p.log_softmax(-1).gather(1, ids[:, None])[len(before) :]
        nats, count = nats - own.sum().item(), count + len(own)
    ways: list[Any] = ["auto", "bucketed", "padded"]
    for batching in ways:
        loss = decoder.loss(c, TEXTS, instructions=instructions, batching=batching)
        assert loss.item() == pytest.approx(nats / count, abs=1e-4), batching


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_to_an_instruction_depends_on_no_other(
    family: str, c: torch.Tensor
) -> None:
    decoder = make(family)
    decoder.config.answers_questions = True
    prompts = ["How many?", None, "Short.", "How many?"]
    rows = torch.cat([c, c])
    written = decoder.generate(rows, prompt=prompts, max_new_tokens=10)
    singles = [
        decoder.generate(row[None], prompt=prompt, max_new_tokens=10)[0]
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    assert written == singles
    assert written[0] != written[1], "the instruction is read"
    assert written[1] == decoder.generate(c[1:], max_new_tokens=10)[0]
