from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import BartTokenizer, CLIPTokenizer

from tests.toyworld.world import make_scene
from vlv.models.diffusion import DiffusionDecoder, TextContext
from vlv.toyworld import components
from vlv.toyworld.language import compare, parse
from vlv.toyworld.objectives import (
    FOREGROUND_WEIGHT,
    LATENT_WEIGHT,
    FlorenceObjective,
    TeacherObjective,
    _with_more,
    caption_logits,
    draw_captions,
    foreground_weights,
    latent_weights,
    pixels_of,
    scenes_of,
)
from vlv.toyworld.pretrain import _PREPARE, Part
from vlv.toyworld.questions import ask
from vlv.toyworld.render import render
from vlv.toyworld.scene import sample_scene
from vlv.toyworld.writing import FORMS, describe
from vlv.training.objective import Batch, Objective

Build = Callable[[CLIPTokenizer, BartTokenizer], Objective]


@pytest.fixture(autouse=True)
def short_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers that are made here know few texts, which is enough."""
    texts = list(components.corpus(50))
    monkeypatch.setattr(components, "corpus", lambda: iter(texts))


@pytest.fixture(scope="module")
def full_batch(batch: Batch) -> Batch:
    """The batch with made-up latents, as the teacher gets it."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(len(batch["ids"]), 4, 16, 16, generator=generator)
    return {**batch, "latents_mean": mean.half(), "latents_std": torch.full_like(mean, 0.1).half()}


def as_pretrained(part: Part) -> Build:
    """The objective of a part that needs no other part, with its seed 0."""
    return lambda *_: _PREPARE[part](Path("nowhere"), [], 0)[0]


def teacher(tokenizer: CLIPTokenizer) -> TeacherObjective:
    return TeacherObjective(
        DiffusionDecoder(
            components.make_text_encoder(tokenizer, 0),
            tokenizer,
            components.make_unet(0),
            components.make_vae(0),
            cast("Any", components.make_scheduler()),
        )
    )


def florence(tokenizer: BartTokenizer) -> FlorenceObjective:
    half = torch.full((3, 1, 1), 0.5)
    return FlorenceObjective(components.make_florence(tokenizer, 0), tokenizer, (half, half))


OBJECTIVES: dict[str, Build] = {
    "inspector": as_pretrained("inspector"),
    "vae": as_pretrained("vae"),
    "text": as_pretrained("text"),
    "unet": lambda text, _: teacher(text),
    "vision": as_pretrained("vision"),
    "florence": lambda _, bart: florence(bart),
    "llm": as_pretrained("llm"),
}


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_goes_down_on_one_batch(
    name: str,
    text_tokenizer: CLIPTokenizer,
    florence_tokenizer: BartTokenizer,
    full_batch: Batch,
) -> None:
    objective = OBJECTIVES[name](text_tokenizer, florence_tokenizer)
    trained = [p for p in objective.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    before = torch.get_rng_state()
    values = []
    for _ in range(5):
        losses = objective.loss(full_batch, seed(1))
        optimizer.zero_grad()
        torch.autograd.backward(losses.total)
        optimizer.step()
        values.append(losses.total.item())
    assert all(torch.isfinite(torch.tensor(values)))
    assert values[-1] < values[0] - 0.01
    assert all(value.isfinite() and not value.requires_grad for value in losses.parts.values())
    assert torch.equal(before, torch.get_rng_state()), "every draw comes from the generator"


@pytest.mark.parametrize("name", ["vae", "text", "llm"])
def test_the_generator_alone_decides_the_draws(
    name: str,
    text_tokenizer: CLIPTokenizer,
    florence_tokenizer: BartTokenizer,
    full_batch: Batch,
) -> None:
    objective = OBJECTIVES[name](text_tokenizer, florence_tokenizer)
    with torch.no_grad():
        first, again, other = (float(objective.loss(full_batch, seed(s)).total) for s in (1, 1, 2))
    assert first == again != other


def test_the_teacher_trains_the_unet_alone(
    text_tokenizer: CLIPTokenizer, full_batch: Batch
) -> None:
    objective = teacher(text_tokenizer)
    torch.autograd.backward(objective.loss(full_batch, seed(0)).total)
    for name, parameter in objective.decoder.named_parameters():
        assert (parameter.grad is not None) == name.startswith("unet."), name


def test_captions_are_dropped_for_the_unconditional_branch(
    text_tokenizer: CLIPTokenizer, full_batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def spy(texts: list[str]) -> TextContext:
        seen.extend(texts)
        return encode(texts)

    objective = teacher(text_tokenizer)
    encode = objective.decoder.encode_text
    monkeypatch.setattr(objective.decoder, "encode_text", spy)
    for dropout, dropped in ((0.0, 0), (1.0, len(full_batch["ids"]))):
        seen.clear()
        objective.dropout = dropout
        with torch.no_grad():
            objective.loss(full_batch, seed(0))
        assert seen.count("") == dropped


def test_a_batch_gives_back_its_scenes_and_pictures(batch: Batch) -> None:
    scenes, pixels = scenes_of(batch), pixels_of(batch)
    for key, scene, picture in zip(batch["ids"], scenes, pixels, strict=True):
        assert scene == sample_scene(0, int(key.removeprefix("train-")))
        expected = torch.from_numpy(render(scene).image).permute(2, 0, 1) / 255
        torch.testing.assert_close(picture, expected)


def test_drawn_captions_are_true_and_of_the_forms_asked_for() -> None:
    scenes = [sample_scene(3, index) for index in range(40)]
    tags = draw_captions(scenes, {"tags": 1.0}, seed(0))
    assert all(scene.style == text.split(",")[0] for scene, text in zip(scenes, tags, strict=True))
    mixed = draw_captions(scenes, dict.fromkeys(FORMS, 1 / len(FORMS)), seed(0))
    assert {("." in text) for text in mixed} == {True, False}
    assert all(compare(parse(t), s).precision == 1 for s, t in zip(scenes, mixed, strict=True))
    assert mixed == draw_captions(scenes, dict.fromkeys(FORMS, 1 / len(FORMS)), seed(0))


def test_weights_lie_on_the_objects(batch: Batch) -> None:
    weights = foreground_weights(batch)
    assert set(weights.flatten().tolist()) == {1.0, FOREGROUND_WEIGHT}
    for row, scene in enumerate(scenes_of(batch)):
        objects = torch.from_numpy(render(scene).objects >= 0)
        assert bool((weights[row, 0][objects] == FOREGROUND_WEIGHT).all())
    coarse = latent_weights(batch, 16)
    assert coarse.shape == (len(batch["ids"]), 1, 16, 16)
    assert float(coarse.mean()) == pytest.approx(1, abs=1e-5)
    assert float(coarse.max() / coarse.min()) == pytest.approx(LATENT_WEIGHT)
    inside = F.max_pool2d(weights, 4) > 1
    assert torch.equal(inside, coarse == coarse.max())


def test_florence_sees_image_and_prompt(florence_tokenizer: BartTokenizer, batch: Batch) -> None:
    objective = florence(florence_tokenizer)
    model, tokenizer = objective.florence.eval(), florence_tokenizer
    ids = torch.tensor([tokenizer("A photo of a red cube.").input_ids] * 2)
    inputs = pixels_of(batch)[:2]
    with torch.no_grad():
        logits = [caption_logits(model, tokenizer, inputs, form, ids) for form in components.TASKS]
        other = caption_logits(model, tokenizer, inputs.flip(0), components.TASKS[0], ids)
    assert logits[0].shape == (*ids.shape, len(tokenizer))
    assert not torch.equal(logits[0], logits[1]), "the task matters"
    torch.testing.assert_close(other, logits[0].flip(0))
    assert not torch.equal(other, logits[0]), "the image matters"


def test_texts_go_on_with_prose_or_questions_about_their_scene() -> None:
    scene, rng = make_scene(), np.random.default_rng(0)
    possible = {
        f"{question.question} {question.answer}"
        for seed in range(1000)
        for question in ask(scene, np.random.default_rng(seed))
    }
    tags = describe(scene, "tags", rng)
    texts = [_with_more(scene, "A photo.", rng) for _ in range(80)]
    twice = [text for text in texts if text.startswith(tags)]
    assert 25 < len(twice) < 55
    for text in twice:
        terse, prose = text.split("\n")
        assert terse == tags
        assert compare(parse(prose), scene).f1 == 1
    assert 10 < texts.count("A photo.") < 35
    for text in set(texts) - {"A photo.", *twice}:
        caption, *questions = text.split("\n")
        assert caption == "A photo."
        assert len(questions) == len(set(questions) & possible) == 2
