"""Included and excluded words: what is never written, however it may be spelt, and what is."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.instructed import PLAIN
from tests.models.test_instructions import images
from vlv.errors import ConfigError
from vlv.models.pipeline import VLVPipeline
from vlv.models.word_writing import ExcludedWords, TokenTexts
from vlv.models.words import missing_words


def fast_tokenizer(model: Any, decoder: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", unk_token="<u>")


def piece_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    """As those of SentencePiece, with further tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(tiny.CAPTIONS, trainers.BpeTrainer(show_progress=False))
    found = json.loads(tokenizer.to_str())["model"]
    vocab = {token: id for id, token in enumerate(["<u>", "<e>", *more, *found["vocab"]])}
    merges = [tuple(pair) for pair in found["merges"]]
    return fast_tokenizer(
        models.BPE(vocab, merges, unk_token="<u>", byte_fallback=bool(more)),
        decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        ),
    )


TOKENIZERS = {
    "bytes": tiny.make_llm_tokenizer,
    "pieces": lambda: piece_tokenizer(*(f"<0x{byte:02X}>" for byte in range(256))),
}
EXCLUDED = ("red", "large red", "café", "猫")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_spelling_of_a_word_gets_through(kind: str) -> None:
    """A writer that wants nothing but the words, in any pieces and capitals."""
    tokenizer = TOKENIZERS[kind]()
    texts = TokenTexts(tokenizer)
    keep_out = ExcludedWords(EXCLUDED, texts)
    rng = random.Random(0)
    others = ["a", "coloured", "large", "infrared", "re", "ca", ",", "."]
    num_forbidden, written = 0, []
    for _ in range(12):
        ids: list[int] = []
        wish = b""
        while len(ids) < 60:
            word = rng.choice([*EXCLUDED, *others])
            wish = wish or f" {rng.choice((word, word.upper(), word.title()))}".encode()
            fits = [id for id in range(len(tokenizer)) if (raw := texts.raw([id])) and wish.startswith(raw)]  # fmt: skip
            before = torch.tensor([ids], dtype=torch.long)
            allowed = keep_out(before, torch.zeros(1, len(tokenizer)))[0].isfinite()
            num_forbidden += sum(not allowed[id] for id in fits)
            fits = [id for id in fits if allowed[id]]
            if not fits:
                wish = b" " if wish != b" " else b"."
                continue
            ids.append(rng.choice(fits))
            wish = wish[len(texts.raw(ids[-1:])) :]
        text = tokenizer.decode(ids)
        assert not missing_words(EXCLUDED, text, there=True), text
        written.append(text.lower())
    assert num_forbidden > 50
    assert {"coloured", "infrared", "large"} <= set(" ".join(written).split()), "other words"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_other_words_are_left_alone(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    texts = TokenTexts(tokenizer)
    for text in ("coloured cubes", "A tiréd infrared light is bored.", "a Large. Red"):
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        words = ("red", "cube", "large red", "the")
        keep_out = ExcludedWords(words, texts)
        for end in range(len(ids) - ("Red" in text)):
            allowed = keep_out(ids[None, :end], torch.zeros(1, len(tokenizer)))
            already = missing_words(words, tokenizer.decode(ids[: end + 1]), there=True)
            assert bool(allowed[0, ids[end]].isfinite()) != bool(already), (text, end)


def test_words_are_found_whole_and_in_any_case() -> None:
    assert missing_words(["red", "Cube", "large  red", "C++"], "A large\nRED cube in c++.") == ()
    assert missing_words(["red", "cube"], "Coloured cubes.") == ("red", "cube")
    assert missing_words(["猫"], "一只猫在睡觉。") == ()


def test_a_tokenizer_without_bytes_is_refused() -> None:
    tokenizer = piece_tokenizer()
    with pytest.raises(ConfigError, match="byte by byte"):
        TokenTexts(tokenizer)


# --- captions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        pytest.param({"do_sample": True, "temperature": 2.0, "top_p": 0.5}, marks=pytest.mark.slow),
        pytest.param({"do_sample": True, "num_beams": 2}, marks=pytest.mark.slow),
        pytest.param({"prompt": "Give tags:"}, marks=pytest.mark.slow),
    ],
)
def test_an_excluded_word_stays_out(instructed_pipeline: VLVPipeline, how: dict[str, Any]) -> None:
    pipe, given = instructed_pipeline, images(5)
    assert "red" in pipe.caption(given[0], **{k: v for k, v in how.items() if k == "prompt"})
    written = pipe.caption(given, exclude="Red", max_new_tokens=20, batch_size=5, **how)
    assert not any(missing_words(["red"], text, there=True) for text in written)
    if not (how.get("do_sample") and "num_beams" in how):
        again = pipe.caption(given, exclude=["Red"], max_new_tokens=20, batch_size=2, **how)
        assert again == written


def test_a_caption_does_not_end_in_the_beginning_of_an_excluded_word(
    instructed_pipeline: VLVPipeline,
) -> None:
    pipe = instructed_pipeline
    decoder = pipe.caption_decoder
    assert decoder is not None
    pieces = decoder.tokenizer.tokenize(" red")
    assert len(pieces) > 1, "a word of several tokens"
    written = pipe.caption(images(3), exclude="red", max_new_tokens=6)
    begun = decoder.tokenizer.convert_tokens_to_string(pieces[:1])
    assert not any(text.startswith(f"A large{begun}") for text in written), "as it would be"


@pytest.mark.slow
def test_an_included_word_is_written_and_a_present_one_changes_nothing(
    instructed_pipeline: VLVPipeline, tiny_pipeline: VLVPipeline
) -> None:
    given, words = images(3), ["sphere"]
    assert instructed_pipeline.caption(given, include=["cube", "RED"]) == [PLAIN] * 3
    pipe = tiny_pipeline
    for how in ({}, {"num_beams": 2}, {"do_sample": True, "seed": [1, 2, 3]}):
        found = pipe.describe(given, include=words, max_new_tokens=24, **how)
        assert not any(missing_words(words, one.text) or one.missing for one in found)
        assert all(one.include_bias > 0 for one in found)
    single = [pipe.describe(image, include=words, max_new_tokens=24)[0] for image in given]
    assert single == pipe.describe(given, include=words, max_new_tokens=24)


def test_what_cannot_be_included_is_told(instructed_pipeline: VLVPipeline) -> None:
    word = "incomprehensibility"
    (found,) = instructed_pipeline.describe(images(1), include=["cube", word], max_new_tokens=9)
    assert found == replace(instructed_pipeline.describe(images(1))[0], missing=(word,))


def test_candidates_are_without_excluded_words_too(instructed_pipeline: VLVPipeline) -> None:
    (found,) = instructed_pipeline.describe(
        images(1), exclude="red", verify=3, max_new_tokens=12, known=[None]
    )
    assert found.check is not None
    assert not missing_words(["red"], found.text, there=True)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            {"include": "red", "exclude": ["RED"]},
            "'red' is to be included and 'RED' to be excluded",
        ),
        ({"include": ["a red cube"], "exclude": ["red"]}, "leave one out"),
        ({"exclude": " "}, "not only spaces"),
        ({"exclude": 5}, "give a word, or a list of words"),
        ({"include": [None]}, "give a word, or a list of words"),
        ({"include": "x" * 101}, "1 to 100 characters"),
        ({"exclude": [str(number) for number in range(51)]}, "at most 50"),
    ],
)
def test_words_that_make_no_sense(
    tiny_pipeline: VLVPipeline, wanted: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_pipeline.caption(images(1), **wanted)
