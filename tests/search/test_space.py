"""Texts as tokens of contexts, and how alike texts and images are."""

from __future__ import annotations

import torch

from vlv.models.pipeline import VLVPipeline
from vlv.models.search_net import Embedded
from vlv.search.space import alikeness, max_sim, plain_space, read_texts


def test_late_interaction_is_the_weighted_mean_of_each_token_s_best() -> None:
    tokens = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    images = torch.tensor([[[1.0, 0.0], [0.6, 0.8]], [[-1.0, 0.0], [0.0, 1.0]]])
    query = Embedded(tokens, tokens[0], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(max_sim(query, images), torch.tensor([0.9, 0.5]))
    query = query._replace(weights=torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(max_sim(query, images), torch.tensor([0.82, 0.9]))
    torch.testing.assert_close(
        alikeness(tokens, images), torch.tensor([(0.9 + 0.9) / 2, (0.5 + 0.5) / 2])
    )


def test_an_image_is_most_like_itself() -> None:
    tokens = torch.nn.functional.normalize(torch.randn(5, 7, 4), dim=-1)
    scores = torch.stack([alikeness(x, tokens) for x in tokens])
    assert scores.argmax(1).tolist() == list(range(5))
    torch.testing.assert_close(scores.diagonal(), torch.ones(5))
    torch.testing.assert_close(scores, scores.T)


def test_texts_are_read_without_start_and_padding(tiny_pipeline: VLVPipeline) -> None:
    texts = ["A cone.", "A large red cube stands to the left of a small blue sphere on a floor."]
    short, long = read_texts(tiny_pipeline, texts)
    whole = tiny_pipeline.decoder.encode_text(texts).c.sequence
    assert tiny_pipeline.tokenizer is not None
    count = len(tiny_pipeline.tokenizer(texts[0]).input_ids)
    torch.testing.assert_close(short, whole[0, 1:count])
    assert len(long) == whole.shape[1] - 1, "the longer one is cut to the tower's length"
    assert plain_space(tiny_pipeline).text(short).tokens.shape == short.shape
