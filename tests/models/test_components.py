from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlv.models.folder import MODELS
from vlv.models.pipeline import VLVPipeline


@pytest.mark.slow
def test_a_model_that_was_loaded_small_is_loaded_large_again(
    tiny_folder: Path, tmp_path: Path
) -> None:
    VLVPipeline.from_pretrained(tiny_folder, dtype=torch.float16).save_pretrained(tmp_path / "copy")
    loaded = VLVPipeline.from_pretrained(tmp_path / "copy")
    for name in MODELS:
        assert {p.dtype for p in getattr(loaded, name).parameters()} == {torch.float32}, name
