from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests import tiny
from vlv.errors import ConfigError, ModelFolderError
from vlv.models import caption_loss
from vlv.models.caption_loss import chunked_cross_entropy
from vlv.models.captioner import CaptionDecoder, CaptionDecoderConfig
from vlv.models.decoding import Caption

TEXTS = ["A large red cube stands on the floor.", "Two spheres", "A pencil sketch of a cone!"]


@pytest.fixture
def c(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(3, tiny.NUM_QUERIES, tiny.TEXT_WIDTH, generator=generator)


@pytest.fixture(scope="module")
def trained() -> tuple[CaptionDecoder, torch.Tensor]:
    """A caption decoder that knows three captions by heart, and their contexts."""
    decoder = tiny.make_caption_decoder()
    c = torch.randn(3, 8, tiny.TEXT_WIDTH, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(decoder.trainable("mlp+llm"), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = decoder.loss(c, TEXTS)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    return decoder.eval(), c


# --- the loss -------------------------------------------------------------------------------------


def test_the_loss_equals_that_of_transformers_with_labels(
    tiny_caption_decoder: CaptionDecoder, c: torch.Tensor
) -> None:
    """Labels -100 on prefix and padding, in the language model's own loss."""
    decoder, end = tiny_caption_decoder, 0
    rows = [[*decoder.tokenizer(t).input_ids, end] for t in TEXTS]
    length = max(map(len, rows))
    ids = torch.tensor([row + [end] * (length - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (length - len(row)) for row in rows])
    embedded = decoder.llm.get_input_embeddings()(ids)
    expected = decoder.llm(
        inputs_embeds=torch.cat([decoder.mlp(c), embedded], 1),
        labels=torch.cat([torch.full((3, tiny.NUM_QUERIES), -100), labels], 1),
    ).loss
    assert decoder.loss(c, TEXTS).item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_end_token_is_supervised_though_it_is_the_pad_token(
    tiny_caption_decoder: CaptionDecoder, c: torch.Tensor
) -> None:
    decoder = tiny_caption_decoder
    assert decoder.tokenizer.pad_token_id == decoder.tokenizer.eos_token_id
    tokens = decoder.tokenize(TEXTS)
    for row, length, text in zip(tokens.ids, tokens.lengths, TEXTS, strict=True):
        assert row[: length - 1].tolist() == decoder.tokenizer(text).input_ids
        assert row[length - 1] == decoder.tokenizer.eos_token_id
    assert tokens.ids.shape[1] == tokens.lengths.max()
    # The empty caption is the end token alone: its loss is that token's at the end of the prefix.
    logits = decoder.llm(inputs_embeds=decoder.prefix(c[:1])).logits[:, -1]
    expected = F.cross_entropy(logits, torch.tensor([decoder.tokenizer.eos_token_id]))
    assert decoder.loss(c[:1], [""]).item() == pytest.approx(expected.item(), abs=1e-5)


def test_padding_changes_nothing(tiny_caption_decoder: CaptionDecoder, c: torch.Tensor) -> None:
    losses = [tiny_caption_decoder.loss(c[i : i + 1], [TEXTS[i]]) for i in range(3)]
    lengths = tiny_caption_decoder.tokenize(TEXTS).lengths
    expected = (torch.stack(losses) * lengths).sum() / lengths.sum()
    assert tiny_caption_decoder.loss(c, TEXTS).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_logits_are_computed_at_caption_positions_only(
    tiny_caption_decoder: CaptionDecoder,
    c: torch.Tensor,
    batching: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = []

    def seen(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(tuple(hidden.shape))
        return chunked_cross_entropy(hidden, *rest)

    monkeypatch.setattr(caption_loss, "chunked_cross_entropy", seen)
    tiny_caption_decoder.loss(c, TEXTS, batching=batching)
    tokens = int(tiny_caption_decoder.tokenize(TEXTS).lengths.sum())
    assert shapes == [(tokens, tiny_caption_decoder.llm.config.hidden_size)]


def test_long_captions_are_cut_without_an_end_token(tiny_caption_decoder: CaptionDecoder) -> None:
    tokens = tiny_caption_decoder.tokenize(TEXTS, max_tokens=5)
    assert tokens.ids.shape == (3, 5)
    assert tokens.num_truncated == 2
    assert tokens.ids[0, -1] != tiny_caption_decoder.tokenizer.eos_token_id
    assert tiny_caption_decoder.tokenize(TEXTS, max_tokens=99).num_truncated == 0


def test_every_prefix_row_gets_a_gradient(
    tiny_caption_decoder: CaptionDecoder, c: torch.Tensor
) -> None:
    c.requires_grad_(True)
    tiny_caption_decoder.loss(c, TEXTS).backward()
    assert c.grad is not None
    assert (c.grad.abs().sum(-1) > 0).all()


def test_the_trained_parts_are_chosen(tiny_caption_decoder: CaptionDecoder) -> None:
    decoder = tiny_caption_decoder
    assert decoder.trainable("none") == []
    assert decoder.trainable("mlp") == list(decoder.mlp.parameters())
    assert len(decoder.trainable("mlp+llm")) == len(list(decoder.parameters()))


def test_the_number_of_captions_must_fit(
    tiny_caption_decoder: CaptionDecoder, c: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="3 contexts need as many captions, got 1"):
        tiny_caption_decoder.loss(c, ["x"])


# --- writing captions -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 3])
def test_learned_captions_come_back_and_end_by_themselves(
    trained: tuple[CaptionDecoder, torch.Tensor], num_beams: int
) -> None:
    decoder, c = trained
    captions = decoder.generate(c, max_new_tokens=40, num_beams=num_beams)
    assert [caption.text for caption in captions] == TEXTS
    assert all(caption.finished for caption in captions)
    lengths = [len(decoder.tokenizer(text).input_ids) for text in TEXTS]
    assert [caption.num_tokens for caption in captions] == lengths


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_batch_equals_single_captions(
    trained: tuple[CaptionDecoder, torch.Tensor], num_beams: int
) -> None:
    decoder, c = trained
    settings: dict[str, Any] = {"max_new_tokens": 12, "num_beams": num_beams}
    mixed = torch.cat([c, c.flip(0) * 0.5])  # the last three are unlike anything learned
    singles = [decoder.generate(row[None], **settings)[0] for row in mixed]
    assert decoder.generate(mixed, **settings) == singles


@pytest.mark.parametrize(("positions", "longest"), [(20, 20 - tiny.NUM_QUERIES + 1), (4096, 300)])
def test_the_longest_caption_follows_the_model(
    tiny_caption_decoder: CaptionDecoder, c: torch.Tensor, positions: int, longest: int
) -> None:
    decoder = tiny_caption_decoder
    decoder.config.llm_config.max_position_embeddings = positions
    decoder.tokenizer.eos_token = "!!"  # a token that never comes
    assert decoder.longest_caption(tiny.NUM_QUERIES) == longest
    if positions == 20:
        (caption,) = decoder.generate(c[:1])
        assert (caption.num_tokens, caption.finished) == (longest, False)


def test_a_caption_that_was_stopped_is_not_finished(
    trained: tuple[CaptionDecoder, torch.Tensor],
) -> None:
    decoder, c = trained
    (caption,) = decoder.generate(c[:1], max_new_tokens=3)
    assert caption == Caption(caption.text, num_tokens=3, finished=False)
    assert TEXTS[0].startswith(caption.text)


def test_samples_follow_the_seed_and_leave_the_global_generator_alone(
    tiny_caption_decoder: CaptionDecoder, c: torch.Tensor
) -> None:
    state = torch.get_rng_state()
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0}
    one, same, other = (
        tiny_caption_decoder.generate(c, **settings, seed=seed) for seed in (1, 1, 2)
    )
    assert one == same != other
    assert torch.equal(state, torch.get_rng_state())
    narrow = tiny_caption_decoder.generate(c, max_new_tokens=8, do_sample=True, top_p=1e-6)
    assert narrow == tiny_caption_decoder.generate(c, max_new_tokens=8)


def test_repetition_is_penalised(tiny_caption_decoder: CaptionDecoder, c: torch.Tensor) -> None:
    plain = tiny_caption_decoder.generate(c, max_new_tokens=20)
    penalised = tiny_caption_decoder.generate(c, max_new_tokens=20, repetition_penalty=5.0)
    assert plain != penalised


def test_settings_without_effect_are_refused(
    tiny_caption_decoder: CaptionDecoder, c: torch.Tensor
) -> None:
    with pytest.raises(ConfigError, match="no effect without do_sample"):
        tiny_caption_decoder.generate(c, temperature=0.5)


def test_generation_keeps_the_mode(tiny_caption_decoder: CaptionDecoder, c: torch.Tensor) -> None:
    tiny_caption_decoder.train()
    tiny_caption_decoder.generate(c, max_new_tokens=1)
    assert tiny_caption_decoder.training
    assert tiny_caption_decoder.llm.training


# --- loading and saving ---------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(
    tiny_caption_decoder: CaptionDecoder, c: torch.Tensor, tmp_path: Path
) -> None:
    tiny_caption_decoder.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer"} <= names
    loaded, info = CaptionDecoder.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in tiny_caption_decoder.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert loaded.llm.lm_head.weight is loaded.llm.model.embed_tokens.weight
    tokens = loaded.tokenize([*TEXTS, "  42 Ünïcode\n"])
    assert torch.equal(tokens.ids, tiny_caption_decoder.tokenize([*TEXTS, "  42 Ünïcode\n"]).ids)
    assert loaded.generate(c, max_new_tokens=6) == tiny_caption_decoder.generate(
        c, max_new_tokens=6
    )


def test_it_lies_in_a_subfolder_too(tiny_caption_decoder: CaptionDecoder, tmp_path: Path) -> None:
    tiny_caption_decoder.save_pretrained(tmp_path / "part")
    loaded = CaptionDecoder.from_pretrained(tmp_path, subfolder="part", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert (
        loaded.tokenize(["a cube"]).ids.tolist()
        == tiny_caption_decoder.tokenize(["a cube"]).ids.tolist()
    )


def test_a_foreign_tokenizer_keeps_its_ids(tmp_path: Path) -> None:
    """Beside a Qwen2 config.json AutoTokenizer would replace this one's pre-tokenizer silently."""
    words = {"[END]": 0, "[UNK]": 1, "red": 2, "cube": 3, "a": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="[END]", unk_token="[UNK]"
    )
    decoder = CaptionDecoder.from_llm(tiny.make_llm(), tokenizer, text_width=32, seed=0)
    decoder.save_pretrained(tmp_path)
    loaded = CaptionDecoder.from_pretrained(tmp_path)
    assert loaded.tokenize(["a red cube"]).ids.tolist() == [[4, 2, 3, 0]]


def test_another_family_of_language_models_works(c: torch.Tensor, tmp_path: Path) -> None:
    llm = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=24, n_layer=1, n_head=2))
    decoder = CaptionDecoder.from_llm(llm, tiny.make_llm_tokenizer(), text_width=32, seed=0).eval()
    assert decoder.prefix(c).shape == (3, 8, 24)
    decoder.save_pretrained(tmp_path)
    loaded = CaptionDecoder.from_pretrained(tmp_path)
    assert torch.allclose(loaded.loss(c, TEXTS), decoder.loss(c, TEXTS), atol=1e-5)
    assert len(loaded.generate(c, max_new_tokens=3)) == 3


def test_the_projector_is_drawn_from_the_seed() -> None:
    state = torch.get_rng_state()
    one, same, other = (tiny.make_caption_decoder(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.mlp[0].weight, same.mlp[0].weight)
    assert not torch.equal(one.mlp[0].weight, other.mlp[0].weight)
    assert torch.equal(one.llm.lm_head.weight, other.llm.lm_head.weight)
    assert torch.equal(state, torch.get_rng_state())


def test_a_tokenizer_is_needed_with_an_end_token(c: torch.Tensor) -> None:
    tokenizer = tiny.make_llm_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end token"):
        CaptionDecoder.from_llm(tiny.make_llm(), tokenizer, text_width=32, seed=0)
    bare = CaptionDecoder(CaptionDecoderConfig(llm_config=tiny.make_llm().config, text_width=32))
    with pytest.raises(ModelFolderError, match="no tokenizer"):
        bare.loss(c, TEXTS)
