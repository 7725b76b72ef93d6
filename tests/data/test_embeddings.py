"""Files of `vlv embed` are read like images: by the ids of the images, one embedding each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlv.data.source import Source, find_records
from vlv.errors import DataError

Z = torch.arange(24.0).reshape(3, 2, 4)


def write(path: Path, names: list[str], *, beside: bool = True) -> Path:
    """As `vlv embed` writes them."""
    images = [{"id": n, "file_name": f"in/{n}", "sha256": f"hash of {n}"} for n in names]
    save_file({"z": Z[: len(names)].clone()}, path, {"vlv": json.dumps({"files": images})})
    if beside:
        path.with_suffix(".json").write_text(json.dumps({"model_hash": "abc"}))
    return path


def test_the_embeddings_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "z.safetensors", ["a.png", "b.png", "c.png"])
    records = find_records([path])
    assert [record.id for record in records] == ["a.png", "b.png", "c.png"]
    assert all(record.is_embedding for record in records)
    assert torch.equal(torch.stack([record.embedding() for record in records]), Z)
    assert records[1].meta == {
        "file_name": "in/b.png",
        "sha256": "hash of b.png",
        "model_hash": "abc",
    }
    with pytest.raises(DataError, match=r"row 0: this is a caption embedding, .*no image"):
        records[0].load()
    assert torch.equal(Source([path]).find("c.png").embedding(), Z[2])
    with pytest.raises(DataError, match=r"no image has the id c\.pn; did you mean c\.png"):
        Source([path]).find("c.pn")


def test_without_the_json_beside_it_and_with_a_glob(tmp_path: Path) -> None:
    for name in "xy":
        write(tmp_path / f"{name}.safetensors", ["a.png"], beside=False)
    records = find_records([tmp_path / "*.safetensors"])
    assert [record.id for record in records] == [f"{tmp_path}/{n}.safetensors/a.png" for n in "xy"]
    assert records[0].meta == {"file_name": "in/a.png", "sha256": "hash of a.png"}


def test_other_files_of_tensors_are_refused(tmp_path: Path) -> None:
    save_file({"weight": Z.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="no embeddings that vlv embed wrote"):
        find_records([tmp_path / "model.safetensors"])
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"broken\.safetensors: cannot be read"):
        find_records([tmp_path / "broken.safetensors"])
