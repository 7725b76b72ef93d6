"""Greedy search with a recorded step writes what transformers writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM

from tests import tiny
from vlv.models import writers
from vlv.models.decoding import can_record, greedy_search, is_steady, tidy_caption

if TYPE_CHECKING:
    from vlv.models.captioner import CaptionDecoder

NEVER = 1000
"""No token has this id."""
GPU = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
)


def make_prefix(device: str = "cpu") -> torch.Tensor:
    draws = torch.randn(3, tiny.NUM_QUERIES, tiny.LLM_WIDTH)
    return draws.to(device)


def by_transformers(llm: Any, prefix: torch.Tensor, length: int, end: int) -> torch.Tensor:
    settings = GenerationConfig(max_new_tokens=length, eos_token_id=end, pad_token_id=1)
    mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
    ids: torch.Tensor = llm.generate(
        inputs_embeds=prefix, attention_mask=mask, generation_config=settings
    )
    return torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=1)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("length", [1, 2, 3, 40])
def test_the_tokens_are_those_of_transformers(device: str, length: int) -> None:
    llm, prefix = tiny.make_llm().eval().to(device), make_prefix(device)
    expected = by_transformers(llm, prefix, length, NEVER)
    assert torch.equal(
        greedy_search(llm, prefix, max_new_tokens=length, end=NEVER, pad=1), expected
    )
    single = greedy_search(llm, prefix[1:2], max_new_tokens=length, end=NEVER, pad=1)
    assert torch.equal(single, expected[1:2])


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_captions_end_each_at_its_own_place(device: str) -> None:
    llm, prefix = tiny.make_llm().eval().to(device), make_prefix(device)
    whole = greedy_search(llm, prefix, max_new_tokens=40, end=NEVER, pad=1)
    end = int(whole[0, 5])
    expected = by_transformers(llm, prefix, 40, end)
    assert (expected[0] == 1).sum() >= 34, "the first caption is short"
    assert torch.equal(greedy_search(llm, prefix, max_new_tokens=40, end=end, pad=1), expected)


def test_nothing_is_read_once_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, prefix = tiny.make_llm().eval(), make_prefix()[:1]
    end = int(greedy_search(llm, prefix, max_new_tokens=1, end=NEVER, pad=1))
    calls = []
    forward = llm.forward
    monkeypatch.setattr(llm, "forward", lambda **inputs: calls.append(1) or forward(**inputs))
    ids = greedy_search(llm, prefix, max_new_tokens=200, end=end, pad=1)
    assert ids[0, :3].tolist() == [end, 1, 1]
    assert len(calls) == 1


def test_only_steps_that_are_all_alike_are_recorded() -> None:
    llm = tiny.make_llm()
    assert is_steady(llm)
    assert not can_record(llm)  # on a CPU there is nothing to record
    learnt_positions = OPTForCausalLM(
        OPTConfig(
            vocab_size=9,
            hidden_size=8,
            ffn_dim=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=8,
        )
    )
    assert not is_steady(learnt_positions)
    llm.config.layer_types = ["full_attention", "sliding_attention"]
    assert not is_steady(llm)
    llm.config.layer_types = ["full_attention"] * 2
    llm.model.layers[0].compile()
    assert not is_steady(llm)


def test_the_caption_decoder_takes_it_for_plain_greedy_search_alone(
    tiny_caption_decoder: CaptionDecoder, c: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, lengths = tiny_caption_decoder, []
    plain = decoder.generate(c, max_new_tokens=12)

    def search(*inputs: Any, max_new_tokens: int, **options: Any) -> torch.Tensor:
        lengths.append(max_new_tokens)
        return greedy_search(*inputs, max_new_tokens=max_new_tokens, **options)

    monkeypatch.setattr(writers, "can_record", lambda _: True)
    monkeypatch.setattr(writers, "greedy_search", search)
    assert decoder.generate(c, max_new_tokens=12) == plain
    assert lengths == [12]
    decoder.generate(c, max_new_tokens=2, num_beams=2)
    decoder.generate(c, max_new_tokens=2, do_sample=True)
    decoder.generate(c, max_new_tokens=2, repetition_penalty=2.0)
    decoder.records_steps = False
    decoder.generate(c, max_new_tokens=2)
    assert lengths == [12]


@pytest.fixture
def c() -> torch.Tensor:
    """Contexts of three images."""
    return torch.randn(3, tiny.NUM_QUERIES, tiny.TEXT_WIDTH)


# --- tidying --------------------------------------------------------------------------------------

RECORDED = json.loads(
    (Path(__file__).parents[1] / "official" / "preprocess_reference.json").read_text()
)["process_caption"]


@pytest.mark.parametrize(("text", "expected"), RECORDED)
def test_captions_are_tidied_as_the_authors_do(text: str, expected: str) -> None:
    assert tidy_caption(text) == expected
