"""Caches of shards that are streamed: the same draws, the same position, and nothing but what belongs to the image."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.data import files
from tests.data.loading import streamed
from vlv.data.loader import Loader, LoaderSettings
from vlv.data.parts import Part
from vlv.data.positions import merge_states
from vlv.data.shards import TarShardWriter
from vlv.data.source import Source
from vlv.errors import CacheError, DataError
from vlv.training.cache_parts import BESIDE
from vlv.training.caches import ShardRows, features_cache, fill_shards, latents_cache
from vlv.training.stages import latents_of

if TYPE_CHECKING:
    from vlv.models.diffusion import DiffusionDecoder

SIZE = tiny.IMAGE_SIZE


def write_shards(folder: Path, first: int = 0) -> Path:
    """Three shards of four images."""
    with TarShardWriter(folder, per_shard=4) as writer:
        for number in range(12):
            writer.write(f"{number}", {"png": files.noise_png(first + number, SIZE)})
    return folder


def once(size: int = SIZE, **options: Any) -> LoaderSettings:
    return LoaderSettings(batch_size=64, image_size=size, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with latents beside them."""
    folder = write_shards(tmp_path_factory.mktemp("made") / "shards")
    cache = latents_cache(tiny.make_decoder())
    assert fill_shards(cache, Source([folder]).shards(), BESIDE, once()) == 12
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return shutil.copytree(made, tmp_path / "shards")


def rows_of(
    folder: Path, decoder: DiffusionDecoder | None = None, size: int = SIZE, **options: Any
) -> ShardRows:
    """The latents beside the shards of a folder."""
    cache = latents_cache(decoder or tiny.make_decoder())
    return ShardRows([(cache, BESIDE)], Source([folder]).shards(), once(size, **options))


def loader(
    shards: list[Part], more: ShardRows | None, size: int | None = None, **options: Any
) -> Loader:
    options = {"batch_size": 4, "seed": 3, "buffer": 3, "num_partitions": 2} | options
    return streamed(shards, image_size=size, rows_of=more, **options)


def draws(batch: dict[str, Any], seed: int = 0) -> Tensor:
    decoder = tiny.make_decoder()
    if "pixels" in batch:
        batch = batch | {"pixels": batch["pixels"].float() / 255}
    return latents_of(decoder, batch, torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_draws_from_its_cache_as_it_does_live(made: Path, num_workers: int) -> None:
    """Three epochs: the records are the same, and so are the draws to half precision."""
    shards, rows = Source([made]).shards(), rows_of(made)
    assert len(shards) == 3  # the caches beside them are none
    with (
        loader(shards, None, SIZE) as live,
        loader(shards, rows, num_workers=num_workers) as cached,
    ):
        for _ in range(9):
            one, other = next(live), next(cached)
            assert one["ids"] == other["ids"]
            assert "pixels" not in other
            assert other["latents_mean"].dtype == torch.float16
            torch.testing.assert_close(draws(one), draws(other), atol=5e-3, rtol=2e-3)


def test_a_resumed_stream_gives_the_same_rows_by_any_split(made: Path) -> None:
    shards, rows = Source([made]).shards(), rows_of(made)
    with loader(shards, rows) as whole:
        expected = [next(whole) for _ in range(6)]
    split = {"batch_size": 2, "num_ranks": 2}
    ranks = [loader(shards, rows, rank=rank, num_workers=1, **split) for rank in (0, 1)]
    for step in range(3):
        parts = [next(rank) for rank in ranks]
        assert torch.equal(
            torch.cat([p["latents_std"] for p in parts]), expected[step]["latents_std"]
        )
    state = merge_states([rank.state_dict() for rank in ranks])
    for rank in ranks:
        rank.close()
    with loader(shards, rows) as again:
        again.load_state_dict(state)
        for batch in expected[3:]:
            got = next(again)
            assert got["ids"] == batch["ids"]
            assert torch.equal(got["latents_mean"], batch["latents_mean"])


def test_features_and_latents_come_together(made: Path, tmp_path: Path) -> None:
    encoder, shards = tiny.make_encoder().eval(), Source([made]).shards()
    features, latents = features_cache(encoder), latents_cache(tiny.make_decoder())
    fill_shards(features, shards, tmp_path / "features", once())
    rows = ShardRows([(latents, BESIDE), (features, str(tmp_path / "features"))], shards, once())
    with loader(shards, rows, SIZE) as both:
        batch = next(both)
    [expected] = features.compute(batch["pixels"])
    torch.testing.assert_close(batch["features"].float(), expected, atol=5e-3, rtol=2e-3)
    assert batch["latents_mean"].shape == (4, *tiny.LATENT_SHAPE)


@pytest.mark.slow
def test_what_does_not_match_is_refused_before_the_run(folder: Path, tmp_path: Path) -> None:
    decoder = tiny.make_decoder()
    with torch.no_grad():
        next(decoder.vae.encoder.parameters()).add_(1)
    with pytest.raises(CacheError, match=r"vae_encoder was .*run vlv data cache-latents"):
        rows_of(folder, decoder=decoder)
    with pytest.raises(CacheError, match="framing was cut, now resize"):
        rows_of(folder, framing="resize")
    with pytest.raises(CacheError, match="image_size was 32, now 16"):
        rows_of(folder, size=16)
    cache, shards = latents_cache(decoder), Source([folder]).shards()
    command = rf"run vlv data cache-latents \S+shard-00000\.tar -o {tmp_path}/no with"
    with pytest.raises(CacheError, match=command):
        ShardRows([(cache, str(tmp_path / "no"))], shards, once())
    with (folder / "shard-00001.tar").open("ab") as shard:
        shard.write(bytes(512))
    with pytest.raises(
        CacheError, match=r"shard-00001\.tar was made with other settings \(bytes was \d+, now"
    ):
        rows_of(folder)


def test_a_changed_shard_of_the_same_size_ends_the_run(folder: Path) -> None:
    """The ids, the size and even the time are those of before; the pictures are not."""
    shard = folder / "shard-00002.tar"
    data, about = bytearray(shard.read_bytes()), shard.stat()
    place = data.index(b"IDAT") + 50
    data[place] ^= 1
    shard.write_bytes(data)
    assert shard.stat().st_size == about.st_size
    with loader(Source([folder]).shards(), rows_of(folder), num_workers=1) as stream:
        batches = itertools.islice(stream, 3)
        with pytest.raises(CacheError, match="not those of this image, so the shard has changed"):
            list(batches)
    assert not stream.quarantine.bad  # it is no bad record


def test_moved_shards_keep_their_cache_and_lost_pictures_are_skipped(tmp_path: Path) -> None:
    folder, cache = tmp_path / "images", latents_cache(tiny.make_decoder())
    with TarShardWriter(folder) as writer:
        for number in range(5):
            data = b"no image" if number == 2 else files.noise_png(number, SIZE)
            writer.write(f"{number}", {"png": data})
    bad: list[Any] = []
    fill_shards(cache, Source([folder]).shards(), BESIDE, once(), on_bad=bad.append)
    assert len(bad) == 1
    moved = folder.rename(tmp_path / "moved")
    rows = rows_of(moved)
    with loader(Source([moved]).shards(), rows, num_partitions=1, max_bad_share=1.0) as stream:
        ids = next(stream)["ids"]
        assert sorted(Path(name).name for name in ids) == ["0", "1", "3", "4"]
        next(stream)
        assert "not finite" in next(iter(stream.quarantine.bad.values())).reason


def test_an_interrupted_shard_goes_on_with_the_hashes_of_its_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlv.training.cache_parts.SAVE_SECONDS", 0.0)
    where, two = tmp_path / "cache", replace(once(), batch_size=2)
    cache, sizes = latents_cache(tiny.make_decoder()), []
    answers = iter([cache.compute])
    broken = replace(cache, compute=lambda pixels: next(answers)(pixels))
    with pytest.raises(StopIteration):
        fill_shards(broken, Source([folder]).shards(), where, two)
    watched = replace(cache, compute=lambda p: (sizes.append(len(p)), cache.compute(p))[1])
    fill_shards(watched, Source([folder]).shards(), where, two)
    assert sizes == [2, 2, 2, 2, 2]  # the first two images were done
    for shard in range(3):
        part = f"shard-{shard:05d}.tar"
        for name in ("hashes", "latents_mean", "latents_std"):
            found, whole = (
                where / part / f"{name}.npy",
                folder / ".vlv-latents" / part / f"{name}.npy",
            )
            np.testing.assert_allclose(np.load(found), np.load(whole), atol=2e-3)


def test_two_shards_of_one_name_share_no_folder(tmp_path: Path) -> None:
    shards = Source([write_shards(tmp_path / name) for name in "ab"]).shards()
    with pytest.raises(CacheError, match="have the same name"):
        fill_shards(latents_cache(tiny.make_decoder()), shards, tmp_path / "cache", once())
    with pytest.raises(CacheError, match="cannot be streamed"):
        fill_shards(
            latents_cache(tiny.make_decoder()), [Part("hf:a/b")], tmp_path / "cache", once()
        )


def test_a_shard_of_which_nothing_can_be_read_is_named(tmp_path: Path) -> None:
    with TarShardWriter(tmp_path / "images") as writer:
        writer.write("0", {"png": b"no image"})
    shards = Source([tmp_path / "images"]).shards()
    with pytest.raises(DataError, match=r"none of 1 images for \S+ can be read"):
        fill_shards(
            latents_cache(tiny.make_decoder()), shards, BESIDE, once(), on_bad=lambda bad: None
        )
