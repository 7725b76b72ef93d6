from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.data.loading import listed
from vlv.data.loader import LoaderSettings
from vlv.data.source import find_records
from vlv.errors import DataError
from vlv.training.caches import fill_cache, latents_cache

if TYPE_CHECKING:
    from pathlib import Path

    from vlv.data.records import Record


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    folder = tmp_path / "images"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for name in "abcde":
        pixels = draws.integers(0, 256, (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return find_records([folder])


def cache_latents(
    decoder: Any, records: list[Record], folder: Path, on_bad: Any = None, **options: Any
) -> dict[str, Any]:
    settings = {"batch_size": 2, "image_size": tiny.IMAGE_SIZE, **options}
    cache = latents_cache(decoder)
    return fill_cache(cache, records, folder, LoaderSettings(**settings), on_bad=on_bad)


def test_rows_belong_to_records(records: list[Record], tmp_path: Path) -> None:
    decoder = tiny.make_decoder()
    cached = cache_latents(decoder, records, tmp_path / "cache")
    assert cached["latents_mean"].shape == (5, *tiny.LATENT_SHAPE)
    assert cached["latents_mean"].dtype == np.float16
    loader = listed(records, 3, tiny.IMAGE_SIZE, seed=4, arrays=cached)
    drawn = next(iter(loader))
    mean, std = decoder.posterior(drawn["pixels"])
    torch.testing.assert_close(drawn["latents_mean"].float(), mean, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(drawn["latents_std"].float(), std, atol=2e-3, rtol=2e-3)


def test_reused_when_everything_agrees(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = tiny.make_decoder()
    first = cache_latents(decoder, records, tmp_path / "cache")
    monkeypatch.delattr(type(decoder), "posterior")
    again = cache_latents(decoder, records, tmp_path / "cache")
    assert np.array_equal(first["latents_std"], again["latents_std"])


def test_reused_when_only_the_vae_decoder_differs(records: list[Record], tmp_path: Path) -> None:
    decoder, folder = tiny.make_decoder(), tmp_path / "cache"
    first = cache_latents(decoder, records, folder)
    with torch.no_grad():
        decoder.vae.decoder.conv_out.weight.add_(1)
    again = cache_latents(decoder, records, folder)
    assert np.array_equal(first["latents_mean"], again["latents_mean"])


def test_refused_when_something_differs(records: list[Record], tmp_path: Path) -> None:
    decoder, folder = tiny.make_decoder(), tmp_path / "cache"
    cache_latents(decoder, records, folder)
    with pytest.raises(
        DataError, match=r"records was \w+, now .*; delete the folder or name another"
    ):
        cache_latents(decoder, records[:4], folder)
    with pytest.raises(DataError, match="image_size was 32, now 16"):
        cache_latents(decoder, records, folder, image_size=16)
    decoder.vae = tiny.make_vae(seed=9)
    with pytest.raises(DataError, match="vae_encoder was "):
        cache_latents(decoder, records, folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        cache_latents(decoder, records, folder)


def interrupted(decoder: Any, records: list[Record], folder: Path, **options: Any) -> None:
    """One batch of a cache."""
    plain = decoder.posterior
    answers = iter([plain])
    decoder.posterior = lambda pixels: next(answers)(pixels)
    with pytest.raises(StopIteration):
        cache_latents(decoder, records, folder, **options)
    decoder.posterior = plain


def test_an_interrupted_computation_goes_on(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlv.training.cache_parts.SAVE_SECONDS", 0.0)
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    decoder, folder, bad = tiny.make_decoder(), tmp_path / "cache", []
    options = {"on_bad": bad.append}
    whole = cache_latents(decoder, records, tmp_path / "whole", **options)
    interrupted(decoder, records, folder, **options)
    assert not (folder / "manifest.json").exists()
    plain, sizes = decoder.posterior, []
    decoder.posterior = lambda pixels: (sizes.append(len(pixels)), plain(pixels))[1]
    found = cache_latents(decoder, records, folder, **options)
    assert sizes == [2]  # b and c were done
    for name, array in whole.items():
        assert np.array_equal(found[name], array, equal_nan=True)
    assert [record.id for record in bad] == 3 * [records[0].id]  # told of in each of the calls
    assert {file.name for file in folder.iterdir()} == {
        file.name for file in (tmp_path / "whole").iterdir()
    }


@pytest.mark.parametrize("change", ["an image", "the VAE", "the VAE, and back", "nothing saved"])
def test_an_interrupted_computation_of_something_else_is_begun_again(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    decoder, folder = tiny.make_decoder(), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(
            "vlv.training.cache_parts.SAVE_SECONDS", 60.0 if change == "nothing saved" else 0.0
        )
        interrupted(decoder, records, folder)
    assert (folder / "progress.json").exists() == (change != "nothing saved")
    if change == "an image":
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    if change.startswith("the VAE"):
        first, decoder.vae = decoder.vae, tiny.make_vae(seed=9)
        if change.endswith("back"):
            interrupted(decoder, records, folder)
            decoder.vae = first
    found = cache_latents(decoder, records, folder)
    fresh = cache_latents(decoder, records, tmp_path / "fresh")
    assert np.array_equal(found["latents_mean"], fresh["latents_mean"])


def test_bad_image_leaves_a_row_that_cannot_be_used(records: list[Record], tmp_path: Path) -> None:
    (tmp_path / "images" / "b.png").write_bytes(b"no image")
    decoder, bad = tiny.make_decoder(), []
    with pytest.raises(DataError):
        cache_latents(decoder, records, tmp_path / "strict")
    cached = cache_latents(decoder, records, tmp_path / "cache", on_bad=bad.append)
    assert [record.id for record in bad] == [records[1].id]
    broken = [bool(np.isnan(row).all()) for row in cached["latents_mean"]]
    assert broken == [False, True, False, False, False]


def test_missing_file_is_named(records: list[Record], tmp_path: Path) -> None:
    decoder, folder = tiny.make_decoder(), tmp_path / "cache"
    cache_latents(decoder, records, folder)
    (folder / "latents_std.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot be read .*delete the folder"):
        cache_latents(decoder, records, folder)


@pytest.mark.slow
def test_another_framing_is_refused(records: list[Record], tmp_path: Path) -> None:
    decoder, folder = tiny.make_decoder(), tmp_path / "cache"
    cache_latents(decoder, records, folder)
    with pytest.raises(DataError, match="framing was cut, now resize"):
        cache_latents(decoder, records, folder, framing="resize")
