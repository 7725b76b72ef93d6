"""Captions among which the frozen decoder chooses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vlv.errors import ConfigError, MissingPartError
from vlv.models.decoding import Generation, RowSampling
from vlv.models.draws import mixed_seed
from vlv.models.pipeline import VLVPipeline
from vlv.models.scoring import Scoring, score_captions
from vlv.models.verification import Verification

SHORT = 6
FEW = Scoring(timesteps=2)


def test_the_candidate_with_the_lowest_loss_is_kept(
    tiny_pipeline: VLVPipeline, pixels: torch.Tensor
) -> None:
    z = tiny_pipeline.embed(list(pixels))
    c = tiny_pipeline.context(z)
    captioner = tiny_pipeline.caption_decoder
    assert captioner is not None
    plan = Generation(max_new_tokens=SHORT)
    written = [[x.text for x in captioner.write(c.sequence, plan)]]
    for number in (1, 2, 3):
        seeds = [mixed_seed(seed, "candidate", number) for seed in plan.seeds(3)]
        drawn = captioner.write(c.sequence, replace(plan, do_sample=True, seed=seeds))
        written.append([x.text for x in drawn])
    candidates = [[text for text in texts if text] for texts in zip(*written, strict=True)]
    assert len({text for texts in candidates for text in texts}) > 4, "samples differ"
    scores = score_captions(
        tiny_pipeline.decoder, tiny_pipeline._latents(list(pixels)), candidates, FEW, c=c
    )
    expected = [texts[x.best] for texts, x in zip(candidates, scores, strict=True)]

    found = tiny_pipeline.describe(
        list(pixels), verify=Verification(4, scoring=FEW), max_new_tokens=SHORT
    )
    assert [x.text for x in found] == expected
    for caption, scored in zip(found, scores, strict=True):
        assert caption.check is not None
        assert caption.check.num_candidates == 4
        assert caption.check.score == pytest.approx(max(scored.recovered), abs=1e-4)


def test_neighbours_and_batches_change_nothing(
    tiny_pipeline: VLVPipeline, pixels: torch.Tensor
) -> None:
    how = Verification(3, scoring=FEW)
    images = list(pixels)
    several = tiny_pipeline.describe(
        images, verify=how, max_new_tokens=SHORT, seed=[4, 5, 6], batch_size=2
    )
    alone = tiny_pipeline.describe(images[2], verify=how, max_new_tokens=SHORT, seed=[6])
    assert several[2] == replace(alone[0], check=several[2].check)
    assert several[2].check is not None
    assert alone[0].check is not None
    assert several[2].check.score == pytest.approx(alone[0].check.score, abs=1e-4)
    texts = tiny_pipeline.caption(images, verify=3, max_new_tokens=SHORT)
    assert len(texts) == 3
    assert isinstance(tiny_pipeline.caption(images[0], verify=2, max_new_tokens=SHORT), str)


def test_an_image_whose_caption_explains_enough_is_settled(
    tiny_pipeline: VLVPipeline, pixels: torch.Tensor
) -> None:
    """Shares are negative or positive at random here: a low wish is met after the first round, a high one never."""
    images = list(pixels)
    numbers = {}
    for enough in (-1e9, 1e9):
        how = Verification(6, enough=enough, scoring=FEW)
        found = tiny_pipeline.describe(images, verify=how, max_new_tokens=SHORT)
        numbers[enough] = [x.check.num_candidates for x in found if x.check]
    assert numbers[1e9] == [6, 6, 6]
    assert set(numbers[-1e9]) <= {4, 6}
    assert 4 in numbers[-1e9]


def test_what_cannot_be_verified(tiny_pipeline: VLVPipeline, pixels: torch.Tensor) -> None:
    z = tiny_pipeline.embed(list(pixels))
    with pytest.raises(ConfigError, match="give the images"):
        tiny_pipeline.caption(z=z, verify=2)
    with pytest.raises(ConfigError, match="3 images need as many caption embeddings, got 2"):
        tiny_pipeline.describe(list(pixels), z=z[:2], verify=2)
    with pytest.raises(ConfigError, match="candidates is 1; choose between 2 and 1000"):
        tiny_pipeline.caption(pixels[0], verify=1)
    with pytest.raises(ConfigError, match="enough is nan"):
        Verification(4, enough=float("nan"))
    blind = VLVPipeline(
        encoder=tiny_pipeline.encoder,
        text_encoder=tiny_pipeline.text_encoder,
        tokenizer=tiny_pipeline.tokenizer,
        caption_decoder=tiny_pipeline.caption_decoder,
    )
    with pytest.raises(MissingPartError, match="no unet and no vae"):
        blind.caption(pixels[0], verify=2)


def test_samples_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    count = 4000
    sampler = RowSampling(range(count), 1.0, 1.0, torch.device("cpu"))
    noisy = sampler(torch.empty(count, 0, dtype=torch.long), logits.expand(count, -1))
    shares = torch.bincount(noisy.argmax(-1), minlength=4) / count
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.03, rtol=0)
    cold = RowSampling(range(count), 1.0, 0.5, torch.device("cpu"))
    noisy = cold(torch.empty(count, 0, dtype=torch.long), logits.expand(count, -1))
    assert set(noisy.argmax(-1).tolist()) == {0}, (
        "the likeliest token holds half of the probability"
    )


def test_a_sample_does_not_depend_on_its_batch(
    tiny_pipeline: VLVPipeline, pixels: torch.Tensor
) -> None:
    drawn = {"do_sample": True, "max_new_tokens": SHORT, "temperature": 2.0}
    z = tiny_pipeline.embed(list(pixels))
    together = tiny_pipeline.caption(z=z, seed=[1, 2, 3], **drawn)
    assert [tiny_pipeline.caption(z=z[i : i + 1], seed=[i + 1], **drawn)[0] for i in range(3)] == together  # fmt: skip
    assert tiny_pipeline.caption(z=z, seed=[4, 2, 3], **drawn)[1:] == together[1:]
    assert tiny_pipeline.caption(z=z, seed=0, **drawn) == tiny_pipeline.caption(z=z, seed=0, batch_size=2, **drawn)  # fmt: skip
    with pytest.raises(ConfigError, match="3 captions need as many seeds, got 2"):
        tiny_pipeline.caption(z=z, seed=[1, 2], **drawn)
