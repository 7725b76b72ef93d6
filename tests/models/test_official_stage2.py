"""Stage 2 computes what the authors' code computed, from their checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.models.official_files import COMPONENTS, STAGE2, close, tensors, values
from vlv.errors import ConfigError
from vlv.models.captioner import CaptionDecoder
from vlv.models.decoding import tidy_caption
from vlv.models.official import load_stage2
from vlv.models.official_parts import florence_names
from vlv.models.pipeline import VLVPipeline

S = tensors("stage2_reference")
V = values("stage2_reference")
LENGTH = 300
"""To which the authors pad every caption."""


@pytest.fixture(scope="module")
def pipe() -> VLVPipeline:
    return load_stage2(STAGE2, COMPONENTS)


@pytest.fixture(scope="module")
def decoder(pipe: VLVPipeline) -> CaptionDecoder:
    decoder: CaptionDecoder = pipe.caption_decoder
    return decoder


@pytest.fixture(scope="module")
def c(pipe: VLVPipeline) -> torch.Tensor:
    return pipe.context(pipe.embed(S["images_uint8"])).sequence


def authors_labels(decoder: CaptionDecoder, captions: list[str]) -> tuple[torch.Tensor, ...]:
    """Ids and labels as theirs: padded to a length, every pad masked, no end token."""
    tokenizer = decoder.tokenizer
    rows = [row[:LENGTH] for row in tokenizer(captions, add_special_tokens=False).input_ids]
    pad = tokenizer.pad_token_id
    ids = torch.tensor([row + [pad] * (LENGTH - len(row)) for row in rows])
    prefix = torch.full((len(rows), S["prefix_embeds"].shape[1]), -100)
    return ids, torch.cat([prefix, ids.masked_fill(ids == pad, -100)], dim=1)


def authors_nll(
    decoder: CaptionDecoder, prefix: torch.Tensor, captions: list[str]
) -> tuple[torch.Tensor, ...]:
    """Logits, labels, and the loss of each position shifted by one."""
    ids, labels = authors_labels(decoder, captions)
    mask = torch.cat(
        [torch.ones_like(prefix[..., 0]).long(), (labels[:, -LENGTH:] != -100).long()], 1
    )
    embedded = torch.cat([prefix, decoder.llm.get_input_embeddings()(ids)], dim=1)
    logits = decoder.llm(inputs_embeds=embedded, attention_mask=mask).logits
    nll = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
    return logits, labels, nll, mask


def test_the_prefix(decoder: CaptionDecoder, c: torch.Tensor) -> None:
    assert close(decoder.prefix(c), S["prefix_embeds"])
    assert bool((S["prefix_attention_mask"] == 1).all())


@pytest.mark.parametrize("long", ["", "_long"])
@torch.no_grad()
def test_the_language_model(decoder: CaptionDecoder, c: torch.Tensor, long: str) -> None:
    captions = V[f"captions{long}"]
    logits, labels, nll, mask = authors_nll(decoder, decoder.prefix(c), captions)
    assert torch.equal(labels, S[f"lm_labels{long}"])
    assert torch.equal(mask, S[f"lm_attention_mask{long}"])
    assert close(nll, S[f"lm_token_nll{long}"])
    assert close(nll[labels[:, 1:] != -100].mean(), S[f"lm_loss{long}"], 1e-5)
    if not long:
        start = S["prefix_embeds"].shape[1] - 1
        expected = S["lm_logits_from_last_prefix"]
        assert close(logits[:, start : start + expected.shape[1]], expected)


def test_our_loss_is_theirs_with_the_end_token(decoder: CaptionDecoder, c: torch.Tensor) -> None:
    """On the tokens that both supervise the losses agree."""
    tokens = decoder.tokenize(V["captions"])
    for row, length, labels in zip(tokens.ids, tokens.lengths, S["lm_labels"], strict=True):
        assert row[: length - 1].tolist() == labels[labels != -100].tolist()
        assert row[length - 1] == decoder.tokenizer.eos_token_id


@pytest.fixture
def gradients(pipe: VLVPipeline) -> Iterator[dict[str, torch.Tensor]]:
    """Gradients of the caption loss by the authors' names."""
    decoder, encoder = pipe.caption_decoder, pipe.encoder
    decoder.trainable("mlp+llm")
    encoder.trainable("language")
    for module in (encoder.eval(), decoder.eval()):
        module.zero_grad()
    context = pipe.decoder.context(encoder(S["images_uint8"])).sequence
    _, labels, nll, _ = authors_nll(decoder, decoder.prefix(context), V["captions"])
    nll[labels[:, 1:] != -100].mean().backward()
    named = {
        **{f"caption.{k}": p for k, p in decoder.named_parameters()},
        **{k: p for k, p in encoder.named_parameters() if k.startswith("backbone.")},
    }
    yield {their_name(name): p.grad for name, p in named.items() if p.grad is not None}
    decoder.trainable("none")
    encoder.trainable("none")


def their_name(name: str) -> str:
    if name.startswith("backbone."):
        return f"VLV_model.{florence_names(name.removeprefix('backbone.'))[0]}"
    return name.replace("caption.llm.", "qwen2_model.").replace("caption.mlp.", "mlp.layers.")


def test_the_gradients(gradients: dict[str, torch.Tensor]) -> None:
    recorded = {key.removeprefix("grad."): S[key] for key in S if key.startswith("grad.")}
    assert len(recorded) == 3
    assert all(close(gradients[name], theirs, 1e-6) for name, theirs in recorded.items())
    norms = V["stage2_grad_norms"]
    assert set(gradients) == set(norms)
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("search", ["greedy", "beam4"])
@pytest.mark.parametrize("end", ["", "_eosdot"])
def test_captions_are_the_same_to_the_token(
    decoder: CaptionDecoder, c: torch.Tensor, search: str, end: str
) -> None:
    """The recorded ids of float32, and of the authors' prefix rounded to bfloat16."""
    recorded = V["generation"][f"{search}{end}_fp32"]
    settings: dict[str, Any] = {"max_new_tokens": recorded["kwargs"]["max_new_tokens"]}
    if search == "beam4":
        settings |= {"num_beams": 4, "early_stopping": True}
    captions = decoder.generate(c, **settings, end_token="." if end else None, tidy=False)
    pad = recorded["pad_token_id"]
    for dtype in ("fp32", "bf16"):
        rows = S[f"ids_{search}{end}_{dtype}"].tolist()
        for caption, row in zip(captions, rows, strict=True):
            assert [*caption.ids] + [pad] * (len(row) - len(caption.ids)) == row
    assert [caption.text for caption in captions] == recorded["texts"]
    assert {caption.finished for caption in captions} == {bool(end)}


@torch.no_grad()
def test_the_logits_of_each_step(decoder: CaptionDecoder, c: torch.Tensor) -> None:
    prefix = decoder.prefix(c)
    embed = decoder.llm.get_input_embeddings()
    steps = S["greedy_step_logits"]
    ids = S["ids_greedy_fp32"][:, : steps.shape[1] - 1]
    logits = decoder.llm(inputs_embeds=torch.cat([prefix, embed(ids)], dim=1)).logits
    assert close(logits[:, -steps.shape[1] :], steps)


def test_captions_that_never_end_are_tidied_unless_told_otherwise(
    pipe: VLVPipeline, c: torch.Tensor
) -> None:
    raw = V["generation"]["greedy_fp32"]["texts"]
    assert pipe.caption(S["images_uint8"], max_new_tokens=40) == [tidy_caption(x) for x in raw]
    assert pipe.caption(S["images_uint8"], max_new_tokens=40, tidy=False) == raw


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_stopping": True}, "no effect on one beam"),
        ({"end_token": "no such token"}, "'no such token' is no token"),
    ],
)
def test_settings_without_effect_are_refused(
    decoder: CaptionDecoder, c: torch.Tensor, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        decoder.generate(c, **settings)
