from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.nn import functional as F
from transformers import BartTokenizer, CLIPTokenizer

from vlv.data.source import find_records
from vlv.models.diffusion import DiffusionDecoder
from vlv.toyworld import components
from vlv.toyworld.objectives import (
    FOREGROUND_WEIGHT,
    FlorenceObjective,
    TeacherObjective,
    box_weights,
    caption_logits,
    pixels_of,
)
from vlv.toyworld.pretrain import _PREPARE, Part, Source
from vlv.toyworld.render import render
from vlv.toyworld.table import TableLoader
from vlv.training.objective import Batch, Objective

Build = Callable[[CLIPTokenizer, BartTokenizer], Objective]


@pytest.fixture(autouse=True)
def short_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers that are made here know few texts, which is enough."""
    texts = list(components.corpus(50))
    monkeypatch.setattr(components, "corpus", lambda: iter(texts))


@pytest.fixture(scope="module")
def source(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Twelve scenes as the parts get them."""
    records = find_records([shards])[:12]
    return Source(tmp_path_factory.mktemp("models"), records, 0, torch.device("cpu"))


def first_batch(source: Source, part: Part) -> tuple[Objective, Batch]:
    """The objective of a part that needs no other part, and six scenes of its table."""
    prepared = _PREPARE[part](source)
    loader = TableLoader(
        prepared.columns, 6, seed=0, device=torch.device("cpu"), texts=prepared.texts
    )
    return prepared.objective, next(loader)


def teacher_batch(source: Source, tokenizer: CLIPTokenizer) -> tuple[TeacherObjective, Batch]:
    """The teacher with made-up latents."""
    generator = torch.Generator().manual_seed(0)
    channels = components.LATENT_CHANNELS
    mean = torch.randn(6, channels, 16, 16, generator=generator)
    texts = ["a red cube", "a blue ball", "a cone", "a drum", "photo, night", "a green cube"]
    ids = tokenizer(texts, padding="max_length", max_length=64, return_tensors="pt").input_ids
    batch = {
        "latents_mean": mean.half(),
        "latents_std": torch.full_like(mean, 0.1).half(),
        "boxes": source.images("boxes")["boxes"][:6],
        "texts": ids,
    }
    return teacher(tokenizer), batch


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


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def assert_falls(objective: Objective, batch: Batch) -> None:
    trained = [p for p in objective.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    before = torch.get_rng_state()
    values = []
    for _ in range(5):
        losses = objective.loss(batch, seed(1))
        optimizer.zero_grad()
        torch.autograd.backward(losses.total)
        optimizer.step()
        values.append(losses.total.item())
    assert all(torch.isfinite(torch.tensor(values)))
    assert values[-1] < values[0] - 0.01
    assert all(value.isfinite() and not value.requires_grad for value in losses.parts.values())
    assert torch.equal(before, torch.get_rng_state()), "every draw comes from the generator"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["inspector", "vae", "text", "vision", "llm"])
def test_the_loss_goes_down_on_one_batch(part: Part, source: Source) -> None:
    assert_falls(*first_batch(source, part))


@pytest.mark.slow
def test_the_loss_of_the_teacher_goes_down(source: Source, text_tokenizer: CLIPTokenizer) -> None:
    assert_falls(*teacher_batch(source, text_tokenizer))


def test_the_loss_of_florence_goes_down(source: Source, florence_tokenizer: BartTokenizer) -> None:
    texts = ["a red cube", "a blue ball", "a cone", "a drum", "photo, night", "a green cube"]
    ids = florence_tokenizer(texts, padding=True, return_tensors="pt").input_ids
    batch = {"pixels": source.images("pixels")["pixels"][:6], "tags": ids}
    assert_falls(florence(florence_tokenizer), batch | {"short": ids, "detailed": ids})


def test_the_generator_alone_decides_the_draws(
    source: Source, text_tokenizer: CLIPTokenizer
) -> None:
    for objective, batch in (first_batch(source, "vae"), teacher_batch(source, text_tokenizer)):
        with torch.no_grad():
            first, again, other = (float(objective.loss(batch, seed(s)).total) for s in (1, 1, 2))
        assert first == again != other


def test_the_teacher_trains_the_unet_and_the_text_tower(
    source: Source, text_tokenizer: CLIPTokenizer
) -> None:
    objective, batch = teacher_batch(source, text_tokenizer)
    torch.autograd.backward(objective.loss(batch, seed(0)).total)
    for name, parameter in objective.decoder.named_parameters():
        assert (parameter.grad is None) == name.startswith("vae."), name


def test_captions_are_dropped_for_the_unconditional_branch(
    source: Source, text_tokenizer: CLIPTokenizer
) -> None:
    objective, batch = teacher_batch(source, text_tokenizer)
    for dropout, expected in ((0.0, batch["texts"]), (1.0, objective.empty.expand(6, -1))):
        objective.dropout = dropout
        assert torch.equal(objective._texts(batch, seed(0)), expected)


def test_weights_lie_on_the_objects(source: Source) -> None:
    boxes = source.images("boxes")["boxes"]
    weights = box_weights(boxes, 64, 64, FOREGROUND_WEIGHT)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-4)
    assert float(weights.max() / weights.min()) == pytest.approx(FOREGROUND_WEIGHT)
    for row, scene in enumerate(source.scenes):
        objects = torch.from_numpy(render(scene).objects >= 0)
        assert bool((weights[row, 0][objects] == weights.max()).all())
    inside = F.max_pool2d(weights, 4) > 1
    coarse = box_weights(boxes, 16, 64, 3.0)
    assert torch.equal(inside, coarse == coarse.max())
    assert float(coarse.max() / coarse.min()) == pytest.approx(3)


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
