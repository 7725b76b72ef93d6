"""The encoder's own captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from vlv.errors import DataError
from vlv.models.encoder import VLVEncoder, normalize
from vlv.training.own_captions import _write, cached_ids


def test_same_tokens_as_florence_with_its_ordinary_inputs(
    tiny_encoder: VLVEncoder, pixels: torch.Tensor
) -> None:
    backbone = tiny_encoder.backbone
    num_tokens = tiny_encoder.image_features(pixels).shape[1]
    ids = [backbone.config.image_token_id] * num_tokens + list(tiny_encoder.config.prompt_ids)
    expected = backbone.generate(  # type: ignore[operator]
        input_ids=torch.tensor([ids]).expand(len(pixels), -1),
        pixel_values=normalize(pixels, tiny_encoder.config),
        max_new_tokens=tiny_encoder.num_queries,
        num_beams=1,
        do_sample=False,
    )
    assert torch.equal(_write(tiny_encoder, pixels), expected)


def test_ids_are_made_once(tmp_path: Path) -> None:
    tokenizer, cache = tiny.make_clip_tokenizer(), tmp_path / "run" / "ids.npy"
    first = cached_ids(cache, 2, lambda: ["a red cube", ""], tokenizer, 8)
    assert first.shape == (2, 8)
    assert first[0, 0] == tokenizer.bos_token_id
    again = cached_ids(cache, 2, lambda: pytest.fail("made twice"), tokenizer, 8)
    assert np.array_equal(first, again)
    with pytest.raises(DataError, match="2 captions for 3 images"):
        cached_ids(cache, 3, list, tokenizer, 8)
