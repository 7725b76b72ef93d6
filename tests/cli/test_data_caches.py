"""`vlv data cache-latents` and `cache-features`."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.cli.conftest import Vlv
from tests.cli.test_train import weights, write_config


def test_caches_made_by_command_serve_a_run(vlv: Vlv, ingredients: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "1.yaml", ingredients, "stage1")
    images = ingredients / "train"
    for kind in ("latents", "features"):
        result = vlv("data", f"cache-{kind}", images, "-o", tmp_path / kind, "-c", config)
        assert result.code == 0, result.err
        assert f"{kind} of 6 images, 0 failed" in result.err
    caches = [f"data.{kind}={tmp_path / kind}" for kind in ("latents", "features")]
    sets = [word for setting in caches for word in ("--set", setting)]
    train = ["train", "stage1", "--config", config, "--run"]
    assert vlv(*train, tmp_path / "live").code == 0
    assert vlv(*train, tmp_path / "cached", *sets).code == 0
    live, cached = (weights(tmp_path / name / "model") for name in ("live", "cached"))
    for name, value in live.items():
        torch.testing.assert_close(cached[name], value, atol=5e-3, rtol=0)
    whole = [*sets, "--set", "stage1.trainable=all"]
    result = vlv(*train, tmp_path / "other", *whole)
    assert "data.features are those of a frozen vision tower" in result.err
    other = ["--set", "data.framing=resize", *sets]
    assert vlv(*train, tmp_path / "other", *other).code == 1
