"""Caches of what frozen parts make of images: part by part, checked, and equal to what is computed live."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.data import files
from tests.data.loading import listed
from vlv.config import Stage1Config
from vlv.data.loader import LoaderSettings
from vlv.data.records import Record
from vlv.data.shards import TarShardWriter
from vlv.data.source import find_records
from vlv.errors import CacheError, DataError
from vlv.training.cache_parts import BESIDE
from vlv.training.caches import Cache, features_cache, fill_cache, latents_cache
from vlv.training.stages import Stage1

SIZE = tiny.IMAGE_SIZE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of three images, and two images beside them."""
    path = tmp_path / "images"
    with TarShardWriter(path, per_shard=3) as writer:
        for number in range(6):
            writer.write(f"{number}", {"png": files.noise_png(number, SIZE)})
    for number in (6, 7):
        (path / f"{number}.png").write_bytes(files.noise_png(number, SIZE))
    return path


def once(size: int = SIZE, **options: Any) -> LoaderSettings:
    return LoaderSettings(**{"batch_size": 2, "image_size": size, **options})


def caches() -> list[Cache]:
    return [latents_cache(tiny.make_decoder()), features_cache(tiny.make_encoder().eval())]


@pytest.mark.parametrize("kind", [0, 1])
def test_each_row_is_what_the_frozen_part_makes_of_its_record(
    folder: Path, tmp_path: Path, kind: int
) -> None:
    cache, records = caches()[kind], find_records([folder])
    filled = fill_cache(cache, records, tmp_path / "cache", once())
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "images",
        "shard-00000.tar",
        "shard-00001.tar",
    ]
    with listed(records, 8, SIZE, seed=2, arrays=filled, num_workers=1) as loader:
        batch = next(loader)
    for name, expected in zip(cache.names, cache.compute(batch["pixels"]), strict=True):
        assert batch[name].dtype == torch.float16
        torch.testing.assert_close(batch[name].float(), expected.float(), atol=5e-3, rtol=2e-3)


def test_an_interrupted_cache_goes_on_with_its_shard(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, records = caches()[0], find_records([folder])
    fill_cache(cache, records, tmp_path / "cache", once())
    (tmp_path / "cache/shard-00001.tar/manifest.json").unlink()
    seen: list[str] = []
    load = Record.load
    monkeypatch.setattr(
        Record, "load", lambda self, **o: (seen.append(self.id), load(self, **o))[1]
    )
    fill_cache(cache, records, tmp_path / "cache", once())
    assert seen == ["3", "4", "5"]


def test_other_data_are_refused_and_the_same_elsewhere_are_not(
    folder: Path, tmp_path: Path
) -> None:
    cache = caches()[0]
    fill_cache(cache, find_records([folder]), tmp_path / "cache", once())
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    fill_cache(cache, find_records([copy]), tmp_path / "cache", once())  # other times, same bytes
    shard = copy / "shard-00000.tar"
    shard.unlink()
    with TarShardWriter(copy, per_shard=3) as writer:
        for number in range(3):
            writer.write(f"{number}", {"png": files.noise_png(number + 50, SIZE)})
    with pytest.raises(
        DataError, match=r"shard-00000\.tar was made with other settings \(content was "
    ):
        fill_cache(cache, find_records([copy]), tmp_path / "cache", once())
    with pytest.raises(DataError, match="image_size was 32, now 16"):
        fill_cache(cache, find_records([folder]), tmp_path / "cache", once(16))


def test_another_vision_tower_is_refused(folder: Path, tmp_path: Path) -> None:
    records, encoder = find_records([folder]), tiny.make_encoder()
    fill_cache(features_cache(encoder), records, tmp_path / "cache", once())
    with torch.no_grad():
        next(encoder.vision()[0].parameters()).add_(1)
    with pytest.raises(DataError, match="vision_tower was "):
        fill_cache(features_cache(encoder), records, tmp_path / "cache", once())


def test_two_files_of_one_name_have_no_common_folder(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        with TarShardWriter(tmp_path / name) as writer:
            writer.write(name, {"png": files.noise_png(number, SIZE)})
    cache, records = caches()[0], find_records([tmp_path])
    with pytest.raises(CacheError, match="have the same name, so their latents cannot share"):
        fill_cache(cache, records, tmp_path / "cache", once())
    fill_cache(cache, records, BESIDE, once())
    for name in "ab":
        assert (tmp_path / name / ".vlv-latents/shard-00000.tar/manifest.json").is_file()


def test_single_images_have_no_shard_to_lie_beside(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(files.noise_png(0, SIZE))
    with pytest.raises(CacheError, match=r"of single images cannot lie beside .* name a folder"):
        fill_cache(caches()[0], find_records([tmp_path]), BESIDE, once())


def test_training_draws_as_it_does_live(folder: Path, tmp_path: Path) -> None:
    """The same draws give the same loss to half precision, from pixels or from both caches."""
    records, decoder, encoder = find_records([folder]), tiny.make_decoder(), tiny.make_encoder()
    objective = Stage1(encoder, decoder, Stage1Config())
    extra: dict[str, Any] = {}
    for cache, name in ((latents_cache(decoder), "l"), (features_cache(encoder), "f")):
        extra |= fill_cache(cache, records, tmp_path / name, once())
    live = next(listed(records, 4, SIZE, seed=0))
    cached = next(listed(records, 4, None, seed=0, arrays=extra))
    assert "pixels" not in cached
    losses = []
    for batch in (live, cached):
        batch["step"] = 0
        losses.append(objective.loss(batch, torch.Generator().manual_seed(0)).total.item())
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert np.isfinite(losses).all()
