"""The space in which texts and images are compared, and how alike they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlv.errors import DataError
from vlv.models.pipeline import VLVPipeline
from vlv.search.space import Space, max_sim, plain_space, read_texts


def some_space(D: int = 6, d: int = 4) -> Space:
    matrices = torch.randn(4, D, d)
    return Space(torch.randn(D), matrices[0], torch.randn(D), *matrices[1:])


def test_late_interaction_is_the_mean_of_each_token_s_best() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    images = torch.tensor([[[1.0, 0.0], [0.6, 0.8]], [[-1.0, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(max_sim(query, images), torch.tensor([0.9, 0.5]))
    torch.testing.assert_close(
        max_sim(query, images, both_ways=True), torch.tensor([(0.9 + 0.9) / 2, (0.5 + 0.5) / 2])
    )


def test_an_image_is_most_like_itself() -> None:
    tokens = torch.nn.functional.normalize(torch.randn(5, 7, 4), dim=-1)
    scores = torch.stack([max_sim(x, tokens, both_ways=True) for x in tokens])
    assert scores.argmax(1).tolist() == list(range(5))
    torch.testing.assert_close(scores.diagonal(), torch.ones(5))
    torch.testing.assert_close(scores, scores.T)


def test_tokens_and_pooled_vectors_have_unit_length_and_their_shapes() -> None:
    space = some_space()
    assert (space.text_width, space.width) == (6, 4)
    images, text = space.images(torch.randn(2, 5, 6)), space.text(torch.randn(3, 6))
    assert [x.shape for x in (*images, *text)] == [(2, 5, 4), (2, 4), (3, 4), (4,)]
    for tensor in (*images, *text):
        torch.testing.assert_close(tensor.norm(dim=-1), torch.ones(tensor.shape[:-1]))


def test_a_space_is_kept(tmp_path: Path) -> None:
    space = some_space()
    space.save(tmp_path / "s.safetensors")
    assert Space.load(tmp_path / "s.safetensors").hash() == space.hash() != some_space().hash()


@pytest.mark.parametrize("kind", ["missing", "cut", "another", "shapes", "nan"])
def test_what_is_no_space_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s.safetensors"
    space = some_space()
    if kind == "another":
        save_file({"z": torch.zeros(1, 2, 3)}, path)
    elif kind == "shapes":
        Space(space.image_centre[:3], *space.tensors[1:]).save(path)
    elif kind == "nan":
        Space(space.image_centre / 0, *space.tensors[1:]).save(path)
    elif kind == "cut":
        space.save(path)
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="is no search space"):
        Space.load(path)


def test_texts_are_read_without_start_and_padding(tiny_pipeline: VLVPipeline) -> None:
    texts = ["A cone.", "A large red cube stands to the left of a small blue sphere on a floor."]
    short, long = read_texts(tiny_pipeline, texts)
    whole = tiny_pipeline.decoder.encode_text(texts).c.sequence
    assert tiny_pipeline.tokenizer is not None
    count = len(tiny_pipeline.tokenizer(texts[0]).input_ids)
    torch.testing.assert_close(short, whole[0, 1:count])
    assert len(long) == whole.shape[1] - 1, "the longer one is cut to the tower's length"
    assert plain_space(tiny_pipeline).text(short).tokens.shape == short.shape
