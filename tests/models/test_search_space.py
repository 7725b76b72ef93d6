"""The search space of a model: what is kept of it, and what is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlv.errors import DataError, ModelFolderError
from vlv.models.pipeline import VLVPipeline
from vlv.models.search_space import Space


def some_space(D: int = 6, d: int = 4) -> Space:
    matrices = torch.randn(4, D, d)
    return Space(torch.randn(D), matrices[0], torch.randn(D), *matrices[1:])


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
