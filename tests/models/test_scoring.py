"""How well captions explain their images to the frozen decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.models import families
from vlv.errors import ConfigError, DataError
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.folder import shipped_models
from vlv.models.pipeline import VLVPipeline
from vlv.models.scoring import Scores, Scoring, score_captions, split_text
from vlv.toyworld.render import render
from vlv.toyworld.scene import sample_scene
from vlv.toyworld.writing import describe

FEW = Scoring(timesteps=3, lowest=0.15, highest=0.95, batch_size=4)
RED, BLUE = "a large red cube", "a small blue sphere"


@pytest.fixture
def latents(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(2, *tiny.LATENT_SHAPE, generator=generator)


@torch.no_grad()
def loss_by_hand(decoder: DiffusionDecoder, latents: torch.Tensor, text: str) -> torch.Tensor:
    """One image, one text, one timestep after the other."""
    places, noise = FEW.places(decoder.num_timesteps), FEW.noise(latents[None])
    found = []
    for place, eps in zip(places, noise, strict=True):
        found.append(
            decoder.denoising_loss(
                latents[None],
                decoder.encode_text([text]).c,
                torch.Generator(),
                timesteps=place[None],
                noise=eps[None],
            )
        )
    return torch.stack(found)


def test_every_caption_meets_the_same_timesteps_and_noise(
    tiny_decoder: DiffusionDecoder, latents: torch.Tensor
) -> None:
    one, two = score_captions(tiny_decoder, latents, [[RED, BLUE], [BLUE]], FEW)
    assert FEW.places(1000).tolist() == [150, 550, 950]
    for scores, image in ((one, latents[0]), (two, latents[1])):
        for text, losses in zip(scores.captions, scores.losses, strict=True):
            torch.testing.assert_close(losses, loss_by_hand(tiny_decoder, image, text))
        torch.testing.assert_close(scores.null, loss_by_hand(tiny_decoder, image, ""))
    assert one.captions == (RED, BLUE)
    assert one.losses.shape == (2, 3)
    assert one.z is None


def test_neither_batch_nor_neighbours_matter(
    tiny_decoder: DiffusionDecoder, latents: torch.Tensor
) -> None:
    together = score_captions(tiny_decoder, latents, [[RED, RED], [BLUE, RED]], FEW)
    alone = score_captions(tiny_decoder, latents[1:], [[BLUE, RED]], replace(FEW, batch_size=64))
    torch.testing.assert_close(together[1].losses, alone[0].losses)
    assert torch.equal(together[0].losses[0], together[0].losses[1]), "the same text, scored once"


@pytest.mark.parametrize("name", families.NAMES)
def test_every_family_of_decoders_scores(name: str) -> None:
    decoder: Any = families.make_decoder(name)
    channels = int(decoder.vae.config["latent_channels"])
    latents = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    (scores,) = score_captions(decoder, latents, [[RED, BLUE]], FEW)
    assert scores.losses.isfinite().all()
    assert not torch.equal(scores.losses[0], scores.losses[1])
    torch.testing.assert_close(scores.losses[0], loss_by_hand(decoder, latents[0], RED))


def test_a_long_caption_is_read_in_whole_sentences(
    tiny_decoder: DiffusionDecoder, latents: torch.Tensor
) -> None:
    text = "A red cube. A blue sphere. Two green cones. The night."
    pieces = split_text(tiny_decoder, text)
    assert " ".join(pieces) == text
    assert len(pieces) > 1
    assert all(piece.endswith(".") for piece in pieces)
    lengths = [len(tiny_decoder.tokenizer(piece).input_ids) for piece in pieces]
    assert max(lengths) <= tiny_decoder.num_positions, "nothing is cut"
    (scores,) = score_captions(tiny_decoder, latents[:1], [[text, RED]], FEW)
    assert scores.num_chunks == (len(pieces), 1)
    by_hand = [loss_by_hand(tiny_decoder, latents[0], piece) for piece in pieces]
    torch.testing.assert_close(scores.losses[0], torch.stack(by_hand).mean(0))


def test_a_sentence_without_end_is_divided_between_words(tiny_decoder: DiffusionDecoder) -> None:
    text = " ".join(["a red cube"] * 12)
    pieces = split_text(tiny_decoder, text)
    assert " ".join(pieces) == text
    assert max(len(tiny_decoder.tokenizer(p).input_ids) for p in pieces) <= tiny.TEXT_POSITIONS


def scores_of(losses: list[float], z: float | None = None) -> Scores:
    return Scores(
        captions=tuple(map(str, range(len(losses)))),
        losses=torch.tensor(losses)[:, None],
        null=torch.tensor([1.0]),
        z=None if z is None else torch.tensor([z]),
        num_chunks=(1,) * len(losses),
    )


def test_shares_run_from_no_text_to_the_best_at_hand() -> None:
    scores = scores_of([0.5, 0.25, 1.0])
    assert scores.recovered == pytest.approx((2 / 3, 1.0, 0.0))
    assert scores.best == 1
    assert scores.margin == pytest.approx(1 / 3)
    assert scores_of([0.5], z=0.2).recovered == pytest.approx((0.625,)), "z is better than both"
    assert scores_of([0.5]).margin is None
    assert scores_of([1.5, 1.2]).recovered == (0.0, 0.0), "nothing explains more than no text"
    joined = scores_of([0.5]).joined(scores_of([0.25]))
    assert joined.recovered == pytest.approx((2 / 3, 1.0))


def test_the_pipeline_scores_one_image_or_several(
    tiny_pipeline: VLVPipeline, pixels: torch.Tensor
) -> None:
    one = tiny_pipeline.score(pixels[0], [RED, BLUE], timesteps=3)
    several = tiny_pipeline.score(list(pixels), [[RED, BLUE], RED, BLUE], timesteps=3)
    assert [scores.captions for scores in several] == [(RED, BLUE), (RED,), (BLUE,)]
    torch.testing.assert_close(one.losses, several[0].losses)
    assert one.z is not None, "there is an encoder"
    assert tiny_pipeline.score(pixels[0], RED, timesteps=3).captions == (RED,)


@pytest.mark.parametrize(
    ("images", "captions", "options", "message"),
    [
        (slice(0, 2), [RED], {}, "2 images need as many lists of captions, got 1"),
        (0, "  ", {}, "the caption is empty"),
        (0, RED, {"timesteps": 0}, "timesteps is 0; choose between 1 and 1000"),
        (0, RED, {"lowest": 0.5, "highest": 0.4}, "choose 0 <= lowest <= highest < 1"),
        (0, RED, {"highest": float("nan")}, "highest is nan"),
        (0, RED, {"steps": 4}, "score has no steps; did you mean timesteps?"),
    ],
)
def test_what_cannot_be_scored(
    tiny_pipeline: VLVPipeline, pixels: torch.Tensor, images: Any, captions: Any, options: Any, message: str
) -> None:  # fmt: skip
    given = pixels[images] if isinstance(images, int) else list(pixels[images])
    with pytest.raises((ConfigError, DataError), match=message):
        tiny_pipeline.score(given, captions, **options)


def test_a_loss_without_a_number_is_an_error(
    tiny_decoder: DiffusionDecoder, latents: torch.Tensor
) -> None:
    with pytest.raises(ConfigError, match="the denoising loss is not finite"):
        score_captions(tiny_decoder, latents * float("nan"), [[RED], [BLUE]], FEW)


@pytest.mark.skipif("vlv-tiny" not in shipped_models(), reason="the model is not shipped")
def test_the_shipped_decoder_tells_true_captions_from_those_of_other_scenes() -> None:
    scenes = [sample_scene(5, index, "val") for index in range(6)]
    images = [render(scene).image for scene in scenes]
    texts = [describe(scene, "detailed", np.random.default_rng(0)) for scene in scenes]
    pipe = VLVPipeline.from_pretrained("vlv-tiny", parts=["generate"])
    captions = [[text, other] for text, other in zip(texts, texts[1:] + texts[:1], strict=True)]
    found = pipe.score(images, captions, timesteps=6)
    assert [scores.best for scores in found] == [0] * 6
    assert min(scores.margin or 0 for scores in found) > 0.3
