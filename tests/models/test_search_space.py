"""The search space of a model: what it makes of contexts, what is kept of it, and what is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlv.errors import DataError, ModelFolderError
from vlv.models.pipeline import VLVPipeline
from vlv.models.search_net import SearchNet
from vlv.models.search_space import FittedSpace, PlainSpace, Space

D, L, M, WIDTH = 6, 5, 3, 4


def some_space() -> FittedSpace:
    net = SearchNet(D, L, M, WIDTH)
    torch.nn.init.normal_(net.text_head.weight.weight)
    return FittedSpace(net)


def test_tokens_and_pooled_vectors_have_unit_length_and_their_shapes() -> None:
    plain, fitted = PlainSpace(torch.randn(D), torch.randn(D, WIDTH)), some_space()
    c, text = torch.randn(2, L, D), torch.randn(7, D)
    for space, count in ((plain, L), (fitted, M)):
        assert (space.text_width, space.width) == (D, WIDTH)
        for found in (space.images(c), space.image_queries(c)):
            assert [x.shape for x in found] == [(2, count, WIDTH), (2, WIDTH), (2, count)]
        assert [x.shape for x in space.text(text)] == [(7, WIDTH), (WIDTH,), (7,)]
        for tokens, pooled, weights in (space.images(c), space.text(text)):
            torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(tokens.shape[:-1]))
            torch.testing.assert_close(pooled.norm(dim=-1), torch.ones(pooled.shape[:-1]))
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_a_text_is_the_same_beside_a_longer_one() -> None:
    net = SearchNet(D, L, M, WIDTH).eval()
    torch.nn.init.normal_(net.text_head.weight.weight)
    short, long = torch.randn(2, D), torch.randn(5, D)
    padded = torch.nn.utils.rnn.pad_sequence([short, long], batch_first=True)
    together = net.texts(padded, torch.arange(5) < torch.tensor([[2], [5]]))
    alone = net.texts(short[None])
    torch.testing.assert_close(together.tokens[0, :2], alone.tokens[0])
    torch.testing.assert_close(together.pooled[0], alone.pooled[0])
    torch.testing.assert_close(together.weights[0, :2], alone.weights[0])
    assert together.weights[0, 2:].abs().max() == 0


def test_contexts_of_another_length_are_refused() -> None:
    for use in (some_space().images, some_space().image_queries):
        with pytest.raises(DataError, match=f"images of {L} tokens, and these have {L + 1}"):
            use(torch.randn(2, L + 1, D))


def test_a_space_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    for space in (some_space(), PlainSpace(torch.randn(D), torch.randn(D, WIDTH))):
        space.save(path)
        again = Space.load(path)
        assert again.hash() == space.hash() != some_space().hash()
        text = torch.randn(3, D)
        assert all(torch.equal(*x) for x in zip(again.text(text), space.text(text), strict=True))


@pytest.mark.parametrize("kind", ["missing", "cut", "another", "shapes", "fewer", "nan"])
def test_what_is_no_space_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s.safetensors"
    if kind == "another":
        save_file({"z": torch.zeros(1, 2, 3)}, path)
    elif kind == "cut":
        some_space().save(path)
        path.write_bytes(path.read_bytes()[:-4])
    elif kind != "missing":
        some_space().save(path)
        tensors = load_file(path)
        name = "image.places"
        if kind == "fewer":
            del tensors[name]
        else:
            tensors[name] = tensors[name][:, :3].clone() if kind == "shapes" else tensors[name] / 0
        save_file(tensors, path)
    with pytest.raises(DataError, match="is no search space"):
        Space.load(path)


def test_a_model_keeps_its_space(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    assert VLVPipeline.from_pretrained(folder, parts=["embed"]).search_space is None
    space = some_space()
    space.save(folder / "search.safetensors")
    pipe = VLVPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "copy")
    again = VLVPipeline.from_pretrained(tmp_path / "copy", parts=["embed"]).search_space
    assert again is not None
    assert again.hash() == space.hash()


def test_a_damaged_space_of_a_model_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "search.safetensors").write_bytes(b"none")
    with pytest.raises(
        ModelFolderError, match=r"search.safetensors is no search space.*copy the model"
    ):
        VLVPipeline.from_pretrained(folder, parts=["embed"])
