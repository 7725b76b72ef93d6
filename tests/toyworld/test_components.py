from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BartTokenizer, CLIPTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from vlv.toyworld import components
from vlv.toyworld.questions import ask
from vlv.toyworld.scene import Scene
from vlv.toyworld.writing import FORMS, describe

Tokenizers = tuple[CLIPTokenizer, BartTokenizer, Qwen2Tokenizer]


@pytest.fixture(scope="session")
def texts(scenes: list[Scene]) -> list[str]:
    """Captions of all forms, questions and prompts."""
    rng = np.random.default_rng(0)
    captions = [describe(scene, form, rng) for scene in scenes[:60] for form in FORMS]
    questions = [f"\n{q.question} {q.answer}" for scene in scenes[:10] for q in ask(scene, rng)]
    return [*captions, *questions, *components.PROMPTS.values()]


BUILDERS: dict[str, Callable[[Tokenizers, int], Any]] = {
    "vae": lambda _, seed: components.make_vae(seed),
    "text_encoder": lambda t, seed: components.make_text_encoder(t[0], seed),
    "unet": lambda _, seed: components.make_unet(seed),
    "florence": lambda t, seed: components.make_florence(t[1], seed),
    "llm": lambda t, seed: components.make_llm(t[2], seed),
}


def equal(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("name", BUILDERS)
def test_a_seed_gives_the_same_weights_and_disturbs_nothing(
    name: str, tokenizers: Tokenizers
) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = BUILDERS[name](tokenizers, 0)
    torch.rand(7)
    again, other = BUILDERS[name](tokenizers, 0), BUILDERS[name](tokenizers, 1)
    assert equal(first, again)
    assert not equal(first, other)
    torch.manual_seed(3)
    BUILDERS[name](tokenizers, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_seeded_puts_the_generator_back_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        components.seeded(lambda: 1 / 0, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_sizes_fit_together(tokenizers: Tokenizers) -> None:
    text, florence, llm = tokenizers
    vae: Any = components.make_vae(0)
    unet: Any = components.make_unet(0)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    assert unet.config.sample_size == components.IMAGE_SIZE // factor
    assert unet.config.in_channels == vae.config.latent_channels
    tower = components.make_text_encoder(text, 0)
    assert unet.config.cross_attention_dim == tower.config.hidden_size == components.TEXT_WIDTH
    assert tower.config.max_position_embeddings == text.model_max_length
    captioner: Any = components.make_florence(florence, 0)
    assert captioner.config.text_config.vocab_size == len(florence)
    config = components.make_llm(llm, 0).config
    assert config.eos_token_id == config.pad_token_id == llm.eos_token_id


def test_the_scheduler_ends_without_signal() -> None:
    scheduler: Any = components.make_scheduler()
    assert scheduler.config.prediction_type == "v_prediction"
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0, abs=1e-8)


def test_the_corpus_holds_all_that_is_trained_on() -> None:
    texts = list(components.corpus(3))
    assert texts == list(components.corpus(3))
    assert sum(text.startswith(("photo", "cartoon", "sketch", "sepia")) for text in texts) == 3
    assert any("?" in text for text in texts)
    assert set(components.PROMPTS.values()) <= set(texts)


def test_the_llm_tokenizer_is_exact(llm_tokenizer: Qwen2Tokenizer, texts: list[str]) -> None:
    for text in [*texts, "Ünïcode 猫 \n\t 12"]:
        assert llm_tokenizer.decode(llm_tokenizer(text).input_ids) == text
    assert llm_tokenizer.pad_token_id == llm_tokenizer.eos_token_id
    assert not llm_tokenizer.add_bos_token


def test_the_florence_tokenizer_round_trips(
    florence_tokenizer: BartTokenizer, texts: list[str]
) -> None:
    for text in texts:
        ids = florence_tokenizer(text).input_ids
        assert ids[0] == florence_tokenizer.bos_token_id
        assert ids[-1] == florence_tokenizer.eos_token_id
        assert florence_tokenizer.decode(ids, skip_special_tokens=True) == text
    assert florence_tokenizer.convert_tokens_to_ids("<image>") != florence_tokenizer.unk_token_id


def without_spaces(text: str) -> str:
    return "".join(text.lower().split())


def test_the_text_tokenizer_round_trips_words(
    text_tokenizer: CLIPTokenizer, texts: list[str]
) -> None:
    for text in texts:
        ids = text_tokenizer(text).input_ids
        assert ids[0] == text_tokenizer.bos_token_id
        assert ids[-1] == text_tokenizer.eos_token_id
        decoded = text_tokenizer.decode(ids, skip_special_tokens=True)
        assert without_spaces(str(decoded)) == without_spaces(text)


def test_words_of_the_world_are_single_tokens(
    text_tokenizer: CLIPTokenizer, llm_tokenizer: Qwen2Tokenizer
) -> None:
    for word in ("turquoise", "cylinder", "photograph", "background"):
        assert len(text_tokenizer(word).input_ids) == 3
        assert len(llm_tokenizer(f" {word}").input_ids) == 1


def test_the_same_texts_give_the_same_tokenizer(
    monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    corpus = list(components.corpus(50))
    monkeypatch.setattr(components, "corpus", lambda: iter(corpus))
    first, again = components.make_text_tokenizer(), components.make_text_tokenizer()
    assert first.get_vocab() == again.get_vocab()
    assert first(texts[:30]).input_ids == again(texts[:30]).input_ids


def test_tokenizers_survive_saving(
    tokenizers: Tokenizers, texts: list[str], tmp_path: Path
) -> None:
    for tokenizer in tokenizers:
        folder = tmp_path / type(tokenizer).__name__
        tokenizer.save_pretrained(folder)
        loaded: PreTrainedTokenizerBase = type(tokenizer).from_pretrained(folder)
        assert loaded(texts[:30]).input_ids == tokenizer(texts[:30]).input_ids
