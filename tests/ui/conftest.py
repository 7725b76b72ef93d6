"""Folders of images with captions, and a workbench without a browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from vlv.ui.commands import ModelFlags
from vlv.ui.desk import Desk
from vlv.ui.workbench import Workbench

if TYPE_CHECKING:
    from vlv.models.pipeline import VLVPipeline

CAPTIONS = {
    "a.png": "A red cube.",
    "b.png": None,
    "c.png": "A blue sphere, far away.",
    "sub/d.png": "A red cone.",
    "sub/e.png": None,
}


def write_image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_folder(folder: Path) -> Path:
    for seed, (name, caption) in enumerate(CAPTIONS.items()):
        write_image(folder / name, seed)
        if caption is not None:
            (folder / name).with_suffix(".txt").write_text(f"{caption}\n")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images")


@pytest.fixture
def make_bench(tmp_path: Path) -> Callable[..., Workbench]:
    def make(load: Callable[[], VLVPipeline], model: Path | str = "vlv-tiny") -> Workbench:
        flags = ModelFlags(str(model), device="cpu", dtype="float32")
        return Workbench(Desk(load), flags, "float32", tmp_path / "work")

    return make


def no_model() -> VLVPipeline:
    raise AssertionError("no model is needed here")


@pytest.fixture
def loads_once(monkeypatch: pytest.MonkeyPatch, tiny_pipeline: VLVPipeline) -> None:
    """Commands take the model of `tiny_folder` that is loaded already."""
    monkeypatch.setattr("vlv.cli.common.load_pipeline", lambda *given, **more: tiny_pipeline)
