"""Which sentences and claims of a caption the frozen decoder does not believe."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import tiny
from vlv.errors import ConfigError, DataError, MissingPartError, ModelFolderError
from vlv.models.calibration import CALIBRATION_NAME, Calibration, Logistic
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.doubts import (
    Claim,
    ClaimDoubt,
    ClaimEvidence,
    Evidence,
    SentenceDoubt,
    SentenceEvidence,
    Verdict,
    gather_evidence,
    judge,
)
from vlv.models.folder import shipped_models
from vlv.models.pipeline import VLVPipeline
from vlv.models.scoring import Scoring, score_captions, split_text
from vlv.toyworld.claims import find_claims
from vlv.toyworld.render import render
from vlv.toyworld.scene import sample_scene
from vlv.toyworld.writing import describe

FEW = Scoring(timesteps=2)
TEXT = "A red cube. A cone."
CALIBRATION = Calibration(
    scale=0.01,
    threshold=0.5,
    claim=Logistic((1.0,), -1.0),
    sentence=Logistic((2.0, 0.5), -2.0),
    plain=Logistic((1.0, 0.0), -1.0),
    claims="toyworld",
)


@pytest.fixture
def latents(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(1, *tiny.LATENT_SHAPE, generator=generator)


def losses_of(decoder: DiffusionDecoder, latents: torch.Tensor, texts: list[str]) -> list[float]:
    (scores,) = score_captions(decoder, latents, [texts], FEW)
    return [float(x) for x in scores.losses.mean(1)]


def test_evidence_is_the_change_of_the_loss(
    tiny_decoder: DiffusionDecoder, latents: torch.Tensor
) -> None:
    (found,) = gather_evidence(tiny_decoder, latents, [TEXT], FEW, read_claims=find_claims)
    changed = ["A cone.", "A blue cube. A cone.", "A red cube. A cube."]
    whole, first, blue, cube = losses_of(tiny_decoder, latents, [TEXT, *changed])
    one, two = found.sentences
    assert (TEXT[one.start : one.end], TEXT[two.start : two.end]) == (
        "A red cube.",
        "A cone.",
    )
    assert one.omission == pytest.approx(math.log(whole / first), abs=1e-5)
    colour, shape = one.claims
    assert colour.claim.alternatives == ("yellow", "green", "turquoise", "blue", "purple")
    assert colour.changes[3] == pytest.approx(math.log(whole / blue), abs=1e-5)
    assert [claim.claim.name for claim in two.claims] == ["shape"]
    assert two.claims[0].changes[1] == pytest.approx(math.log(whole / cube), abs=1e-5)
    assert one.exchange == max(*colour.changes, *shape.changes)
    assert colour.instead == colour.claim.alternatives[int(np.argmax(colour.changes))]
    assert one.word is None


def test_without_a_grammar_words_are_left_out(
    tiny_decoder: DiffusionDecoder, latents: torch.Tensor
) -> None:
    (found,) = gather_evidence(tiny_decoder, latents, [TEXT], FEW)
    one, two = found.sentences
    texts = [f"{x} A cone." for x in ("red cube.", "A cube.", "A red.")]
    whole, *without = losses_of(tiny_decoder, latents, [TEXT, *texts])
    assert one.word == pytest.approx(math.log(whole / min(without)), abs=1e-5)
    assert one.exchange is None
    assert one.features == (one.word, one.omission)
    assert two.claims == ()
    (lone,) = gather_evidence(tiny_decoder, latents, ["Cube"], FEW)
    assert lone.sentences[0].word == lone.sentences[0].omission, "one word is the whole sentence"


def test_long_texts_are_judged_in_pieces(
    tiny_decoder: DiffusionDecoder, latents: torch.Tensor
) -> None:
    text = "\n ".join(["A red cube.", "A cone."] * 6)
    pieces = split_text(tiny_decoder, text)
    assert len(pieces) > 1
    (found,) = gather_evidence(tiny_decoder, latents, [text], FEW, read_claims=find_claims)
    assert found.num_chunks == len(pieces)
    assert len(found.sentences) == 12
    assert [text[x.start : x.end] for x in found.sentences[:2]] == [
        "A red cube.",
        "A cone.",
    ]
    whole, without = losses_of(
        tiny_decoder, latents, [pieces[-1], pieces[-1].removesuffix(" A cone.")]
    )
    assert found.sentences[-1].omission == pytest.approx(math.log(whole / without), abs=1e-5)


def evidence(*exchanges: float) -> Evidence:
    """Sentences "A red cube." with a best exchange each."""
    sentences = []
    for number, best in enumerate(exchanges):
        start = 12 * number
        claims = [
            ClaimEvidence(Claim(start + 2, start + 5, "colour", ("blue", "green")), (best, -1.0)),
            ClaimEvidence(Claim(start + 6, start + 10, "shape", ("cone",)), (-1.0,)),
        ]
        sentences.append(SentenceEvidence(start, start + 11, -0.1, None, tuple(claims)))
    return Evidence(" ".join(["A red cube."] * len(exchanges)), 0.9, 1, tuple(sentences))


def test_a_better_exchange_means_doubt() -> None:
    verdict = judge(evidence(-0.2, 0.2), CALIBRATION)
    good, bad = verdict.sentences
    logit = 2 * math.asinh(0.2 / 0.01) + 0.5 * math.asinh(-0.1 / 0.01) - 2
    assert bad.probability == pytest.approx(1 / (1 + math.exp(-logit)))
    assert good.probability < 0.01 < 0.9 < bad.probability == verdict.doubt
    assert bad.claims[0].instead == "blue"
    assert bad.claims[0].probability > 0.5 > bad.claims[1].probability
    assert verdict.fixed == "A red cube. A blue cube."
    assert judge(evidence(-0.2, -0.2), CALIBRATION).fixed == "A red cube. A red cube."


def test_a_doubtful_sentence_without_a_better_exchange_is_left_out() -> None:
    strict = replace(CALIBRATION, threshold=0.0)
    assert judge(evidence(-0.2, 0.2), strict).fixed == "A blue cube."
    assert judge(evidence(-0.2), strict).fixed == ""
    claim = ClaimDoubt(2, 5, "red", 0.4, "colour", "blue", 0.1)
    sentence = SentenceDoubt(0, 11, "A red cube.", 0.8, (claim,))
    assert Verdict("A red cube.", 0.5, 1, (sentence,), 0.5).fixed == "A blue cube."


def test_verify_takes_one_or_several(tiny_pipeline: VLVPipeline, pixels: torch.Tensor) -> None:
    images = list(pixels)
    how = {"calibration": CALIBRATION, "read_claims": find_claims, "timesteps": 2}
    several = tiny_pipeline.verify(images, [TEXT, "A cone.", "Hello"], **how)  # type: ignore[arg-type]
    alone = tiny_pipeline.verify(images[0], TEXT, **how)  # type: ignore[arg-type]
    assert alone.doubt == pytest.approx(several[0].doubt, abs=1e-4)
    assert alone.score == pytest.approx(
        tiny_pipeline.score(images[0], TEXT, timesteps=2).recovered[0], abs=1e-4
    )
    assert [len(verdict.claims) for verdict in several] == [3, 1, 0]
    assert all(0 <= verdict.doubt <= 1 for verdict in several)


def test_what_cannot_be_verified(tiny_pipeline: VLVPipeline, pixels: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="has no calibration of doubts"):
        tiny_pipeline.verify(pixels[0], TEXT)
    with pytest.raises(DataError, match="the caption is empty"):
        tiny_pipeline.verify(pixels[0], "  ", calibration=CALIBRATION)
    with pytest.raises(ConfigError, match="3 images need as many lists of captions, got 2"):
        tiny_pipeline.verify(list(pixels), [TEXT, TEXT], calibration=CALIBRATION)
    blind = VLVPipeline(text_encoder=tiny_pipeline.text_encoder, tokenizer=tiny_pipeline.tokenizer)
    with pytest.raises(MissingPartError, match="no unet and no vae"):
        blind.verify(pixels[0], TEXT, calibration=CALIBRATION)


def test_calibration_travels_with_the_model(tiny_pipeline: VLVPipeline, tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path)) / "model"
    pipe = VLVPipeline(
        **{k: v for k, v in tiny_pipeline.components.items() if k in {"text_encoder", "tokenizer"}},
        image_size=32,
    )
    pipe.calibration = CALIBRATION
    pipe.save_pretrained(folder)
    assert VLVPipeline.from_pretrained(folder).calibration == CALIBRATION
    file = folder / CALIBRATION_NAME
    for damage in (
        "{}",
        "[",
        file.read_text().replace("0.01", '"x"'),
        file.read_text().replace("2.0,", ""),
    ):
        file.write_text(damage)
        with pytest.raises(ModelFolderError):
            VLVPipeline.from_pretrained(folder)


@pytest.mark.slow
def test_the_shipped_decoder_knows_a_wrong_claim() -> None:
    """Of each scene a true caption, and one with the colour or style exchanged."""
    pipe = VLVPipeline.from_pretrained(shipped_models()["vlv-tiny"], parts=["embed", "generate"])
    scenes = [x for index in range(12) if (x := sample_scene(5, index, "test")).style == "photo"][
        :3
    ]
    images = [render(scene).image for scene in scenes]
    texts = [describe(x, "short", np.random.default_rng(0)) for x in scenes]
    wrong = [text.replace("photograph", "photo").replace("photo", "comic") for text in texts]
    assert texts != wrong
    true = pipe.verify(images, texts, read_claims=find_claims)
    false = pipe.verify(images, wrong, read_claims=find_claims)
    for good, bad in zip(true, false, strict=True):
        assert bad.doubt > 0.5
        assert bad.doubt > good.doubt
        assert bad.score < good.score
