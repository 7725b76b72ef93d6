"""A caption decoder, its language model in a cache, and contexts to write about."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests import tiny
from vlv.engine import saved_language_model

if TYPE_CHECKING:
    from pathlib import Path

    from vlv.models.captioner import CaptionDecoder


@pytest.fixture(scope="module")
def decoder() -> CaptionDecoder:
    """A caption decoder, shared by a module."""
    return tiny.make_caption_decoder()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(decoder: CaptionDecoder) -> Path:
    """The language model, as engines read it."""
    return saved_language_model(decoder)


@pytest.fixture
def c() -> torch.Tensor:
    """Contexts of five images."""
    return torch.randn(5, tiny.NUM_QUERIES, tiny.TEXT_WIDTH)
