"""Styles, prompts and questions: what a model was taught, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.instructed import PLAIN, STYLES, TEXTS
from vlv.errors import ConfigError
from vlv.models.captioner import CaptionDecoder
from vlv.models.decoding import Generation
from vlv.models.pipeline import VLVPipeline


def images(count: int = 2) -> list[np.ndarray]:
    return [
        np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        for number in range(count)
    ]


def test_styles_and_prompts(instructed_pipeline: VLVPipeline) -> None:
    pipe = instructed_pipeline
    assert pipe.caption(images()) == [PLAIN] * 2
    assert pipe.caption(images(), style="short") == ["A cube."] * 2
    assert pipe.caption(images()[0], style="tags") == "large, red"
    assert pipe.caption(images(), prompt="Short:") == ["A cube."] * 2
    mixed = pipe.caption(images(3), prompt=["Give tags:", None, "Short:"], batch_size=2)
    assert mixed == ["large, red", PLAIN, "A cube."]


def test_a_length_is_part_of_the_instruction(instructed_pipeline: VLVPipeline) -> None:
    pipe = instructed_pipeline
    assert pipe.caption(images(), words=2) == ["Large cube."] * 2
    assert pipe.caption(images()[0], style="short", words=3) == "A red cube."
    assert pipe.caption(images(), prompt=[None, "Short:"], words=3)[1] == "A red cube."


def test_what_is_known_stands_before_the_instruction(instructed_pipeline: VLVPipeline) -> None:
    pipe = instructed_pipeline
    assert pipe.caption(images()[0], known=" 5 m  wide.") == "A cube, 5 m wide."
    told = pipe.caption(images(3), known=[None, "5 m wide", None], batch_size=2)
    assert told == [PLAIN, "A cube, 5 m wide.", PLAIN]
    decoder = pipe.caption_decoder
    assert decoder is not None
    how = Generation(style="short", words=3, known="Rex")
    assert decoder.instructions(how, 1) == ["Known: Rex. Short: 3 words."]


def test_samples_of_an_instruction_are_those_of_single_images(
    instructed_pipeline: VLVPipeline,
) -> None:
    decoder = instructed_pipeline.caption_decoder
    assert decoder is not None
    c = torch.randn(3, tiny.NUM_QUERIES, tiny.TEXT_WIDTH)
    prompts = ["Short:", None, "is it a cube?"]
    how = Generation(do_sample=True, temperature=3.0, seed=[1, 2, 3, 4, 5, 6], prompt=prompts)
    written = decoder.write(c, how, copies=2)
    for row, prompt in enumerate(prompts):
        own = Generation(
            do_sample=True, temperature=3.0, seed=[2 * row + 1, 2 * row + 2], prompt=prompt
        )
        assert written[2 * row : 2 * row + 2] == decoder.write(c[row : row + 1], own, copies=2)


def test_what_a_model_was_taught_is_saved_with_it(
    instructed_pipeline: VLVPipeline, tmp_path: Path
) -> None:
    decoder = instructed_pipeline.caption_decoder
    assert decoder is not None
    decoder.save_pretrained(tmp_path)
    again = CaptionDecoder.from_pretrained(tmp_path)
    assert (again.styles, again.config.answers_questions) == (STYLES, True)
    assert again.config.obeys_lengths
    assert again.config.uses_known
    assert tiny.make_caption_decoder().styles == {}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"style": "shrot"}, "knows no style 'shrot'; did you mean short?"),
        ({"style": "x"}, "choose from short, tags"),
        ({"style": "short", "prompt": "Short:"}, "leave one out"),
        ({"style": " "}, "give a text"),
        ({"prompt": ""}, "give a text"),
        ({"prompt": 5}, "give a text"),
        ({"known": ""}, "give a text"),
        ({"known": ["x"]}, "2 images need as many texts of what is known, got 1"),
        ({"known": "x", "verify": 2}, "plain captions are verified"),
        ({"words": 0}, "words is 0; choose between 1 and 1000"),
        ({"words": 10_000}, "words is 10000; choose between"),
        ({"words": "ten"}, "give a whole number"),
        ({"words": 3, "verify": 2}, "plain captions are verified"),
        ({"prompt": ["Short:"]}, "2 images need as many prompts, got 1"),
        ({"style": "short", "verify": 2}, "plain captions are verified"),
    ],
)
def test_what_makes_no_sense_is_refused(
    instructed_pipeline: VLVPipeline, wanted: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        instructed_pipeline.caption(images(), **wanted)


def test_a_plain_model_says_so(tiny_pipeline: VLVPipeline) -> None:
    with pytest.raises(ConfigError, match="knows no styles"):
        tiny_pipeline.caption(images(), style="short")
    with pytest.raises(ConfigError, match="takes no instructions"):
        tiny_pipeline.caption(images(), prompt="Short:")
    with pytest.raises(ConfigError, match="was not taught to write so many words"):
        tiny_pipeline.caption(images(), words=5)
    with pytest.raises(ConfigError, match="was not taught to use what is known"):
        tiny_pipeline.caption(images(), known="Rex")
    with pytest.raises(ConfigError, match="was not taught to answer questions"):
        tiny_pipeline.ask(images(), "is it a cube?")


def test_positions_of_an_instruction_count() -> None:
    decoder = tiny.make_caption_decoder()
    decoder.config.answers_questions = True
    decoder.config.llm_config.max_position_embeddings = 40
    decoder.tokenizer.eos_token = "!!"  # a token that never comes
    asked = "is it?"
    read = tiny.NUM_QUERIES + len(decoder.tokenizer(f"{asked}\n").input_ids)
    c = torch.randn(1, tiny.NUM_QUERIES, tiny.TEXT_WIDTH)
    (written,) = decoder.generate(c, prompt=asked)
    assert written.num_tokens == 40 - read + 1


# --- questions ------------------------------------------------------------------------------------


def test_answers_and_the_probability_of_yes(instructed_pipeline: VLVPipeline) -> None:
    asked = ["is it a cube?", "is it night?", "how many objects are there?"]
    answers = instructed_pipeline.ask(images(1)[0], asked)
    assert isinstance(answers, list)
    assert [answer.text for answer in answers] == [TEXTS[question] for question in asked]
    yes, no, two = (answer.yes for answer in answers)
    assert yes is not None
    assert no is not None
    assert yes > 0.9 > 0.1 > no
    assert two is None
    assert all(answer.finished for answer in answers)


def test_questions_and_images_are_paired(instructed_pipeline: VLVPipeline) -> None:
    pipe = instructed_pipeline
    single = pipe.ask(images(1)[0], "is it a cube?")
    assert single.text == "yes"
    everywhere = pipe.ask(images(3), "is it a cube?", batch_size=2)
    assert isinstance(everywhere, list)
    assert [answer.text for answer in everywhere] == ["yes"] * 3
    paired = pipe.ask(z=pipe.embed(images()), questions=["is it night?", "is it a cube?"])
    assert isinstance(paired, list)
    assert [answer.text for answer in paired] == ["No.", "yes"]
    cut = pipe.ask(images(1)[0], "how many objects are there?", max_new_tokens=1)
    assert not cut.finished
    with pytest.raises(ConfigError, match="2 questions are about one image or as many, got 3"):
        pipe.ask(images(3), ["is it night?"] * 2)
    with pytest.raises(ConfigError, match="no question was given"):
        pipe.ask(images())
