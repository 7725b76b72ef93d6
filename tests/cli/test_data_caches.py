"""`vlv data cache-latents` and `cache-features`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.cli.conftest import Vlv
from tests.cli.test_train import weights, write_config
from vlv.data import decoding


@pytest.mark.slow
def test_caches_made_by_command_serve_a_run(vlv: Vlv, ingredients: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "1.yaml", ingredients, "stage1")
    images = ingredients / "train"
    for kind in ("latents", "features"):
        result = vlv("data", f"cache-{kind}", images, "-o", tmp_path / kind, "-c", config)
        assert result.code == 0, result.err
        assert f"{kind} of 6 images, 0 failed" in result.err
    caches = [f"data.{kind}={tmp_path / kind}" for kind in ("latents", "features")]
    sets = [word for setting in caches for word in ("--set", setting)]
    train = ["train", config, "--run-dir"]
    assert vlv(*train, tmp_path / "live").code == 0
    assert vlv(*train, tmp_path / "cached", *sets).code == 0
    live, cached = (weights(tmp_path / name / "model") for name in ("live", "cached"))
    for name, value in live.items():
        torch.testing.assert_close(cached[name], value, atol=5e-3, rtol=0)
    half = vlv(*train, tmp_path / "bf16", *sets, "--set", "loop.precision=bf16")
    assert half.code == 0, half.err
    whole = [*sets, "--set", "stage1.trainable=all"]
    result = vlv(*train, tmp_path / "other", *whole)
    assert "data.features are those of a frozen vision tower" in result.err
    other = ["--set", "data.framing=resize", *sets]
    assert vlv(*train, tmp_path / "other", *other).code == 1


@pytest.mark.slow
def test_caches_beside_shards_serve_streamed_and_listed_runs(
    vlv: Vlv, ingredients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command for each cache, no folder named; a streamed run needs it, and no run opens an image again."""
    shards = tmp_path / "shards"
    assert vlv("data", "pack", ingredients / "train", "-o", shards, "--per-shard", 4).code == 0
    data = {"inputs": [str(shards)], "held_out": [], "streaming": True}
    config = write_config(tmp_path / "1.yaml", ingredients, "stage1", data=data)
    train = ["train", config, "--run-dir"]
    assert vlv(*train, tmp_path / "live").code == 0
    beside = ["--set", "data.latents=beside", "--set", "data.features=beside"]
    refused = vlv(*train, tmp_path / "cached", *beside)
    assert refused.code == 1
    assert f"run vlv data cache-latents {shards}/shard-00000.tar with the --config" in refused.err
    for kind in ("latents", "features"):
        result = vlv("data", f"cache-{kind}", shards, "-c", config)
        assert result.code == 0, result.err
        assert f"{kind} of 6 images, 0 failed -> beside the shards" in result.err

    decoded: list[Image.Image] = []
    monkeypatch.setattr(decoding, "frame", lambda image, *_: decoded.append(image))
    assert vlv(*train, tmp_path / "cached", *beside).code == 0
    live, cached = (weights(tmp_path / name / "model") for name in ("live", "cached"))
    for name, value in live.items():
        torch.testing.assert_close(cached[name], value, atol=5e-3, rtol=0)
    listed = vlv(*train, tmp_path / "listed", *beside, "--set", "data.streaming=false")
    assert listed.code == 0, listed.err
    assert not decoded


@pytest.mark.slow
def test_what_both_caches_hold_is_not_decoded_again(
    vlv: Vlv, ingredients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both caches no image is opened, and one that could not be read is known; with one of them, all are."""
    images, (latents, features) = tmp_path / "images", (tmp_path / "latents", tmp_path / "features")
    shutil.copytree(ingredients / "train", images)
    (images / "bad.png").write_bytes(b"no image")
    data = {"inputs": [str(images)], "held_out": [], "max_bad_share": 1.0}
    config = write_config(tmp_path / "1.yaml", ingredients, "stage1", data=data)
    for kind, folder in (("latents", latents), ("features", features)):
        result = vlv("data", f"cache-{kind}", images, "-o", folder, "-c", config)
        assert result.code == 2
        assert "6 images, 1 failed" in result.err

    decoded: list[Image.Image] = []
    frame = decoding.frame
    monkeypatch.setattr(decoding, "frame", lambda i, *rest: (decoded.append(i), frame(i, *rest))[1])
    train = ["train", config, "--set", f"data.latents={latents}", "--run-dir"]
    both = ["--set", f"data.features={features}"]
    assert vlv(*train, tmp_path / "both", *both).code == 0
    assert not decoded
    [line] = (tmp_path / "both" / "quarantine.jsonl").read_text().splitlines()
    assert "bad.png: its latents_mean are not finite; the image could not be read" in line
    assert vlv(*train, tmp_path / "one").code == 0
    assert len(decoded) >= 6
