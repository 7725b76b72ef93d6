"""Image classifiers and vision backbones of transformers, as numbers for the rules; one copy in each process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vlv.data.images import to_tensor
from vlv.errors import ConfigError, ModelFolderError
from vlv.models.hub import download
from vlv.models.vision_encoder import read_image_statistics


class _Model:
    """A model with the pixels it wants."""

    def __init__(self, source: str, revision: str | None, kind: str) -> None:
        import transformers

        folder = Path(source)
        if not folder.is_dir():
            folder = download(source, None, revision)
        self.size, mean, std = read_image_statistics(folder)
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        auto = getattr(transformers, kind)
        try:
            self.net = auto.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False
            ).eval()
        except (OSError, ValueError) as error:
            line = str(error).splitlines()[0]
            raise ModelFolderError(f"{source} cannot be loaded as {kind} ({line})") from error

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """The whole image, squeezed to the square that the model knows: uint8 (3,S,S)."""
        return to_tensor(image.resize((self.size, self.size)))

    def normalised(self, squares: Sequence[torch.Tensor]) -> torch.Tensor:
        """(B,3,S,S), as the network wants them."""
        return (torch.stack(list(squares)).float() / 255 - self.mean) / self.std


class Classifier(_Model):
    """The probability of one label."""

    def __init__(self, source: str, revision: str | None, label: str) -> None:
        super().__init__(source, revision, "AutoModelForImageClassification")
        labels: dict[int, str] = self.net.config.id2label
        places = [number for number, name in labels.items() if name == label]
        if not places:
            raise ConfigError(
                f"{source} has no label {label}; choose one of {', '.join(labels.values())}"
            )
        self.place = int(places[0])

    @torch.inference_mode()
    def scores(self, squares: Sequence[torch.Tensor]) -> list[float]:
        """Probabilities, one for each square."""
        logits = self.net(pixel_values=self.normalised(squares)).logits
        alone = logits.shape[1] == 1
        shares = logits.sigmoid() if alone else logits.softmax(dim=1)
        return [float(share) for share in shares[:, self.place]]


class Backbone(_Model):
    """An embedding of length 1."""

    def __init__(self, source: str, revision: str | None) -> None:
        super().__init__(source, revision, "AutoModel")

    @torch.inference_mode()
    def embed(self, squares: Sequence[torch.Tensor]) -> NDArray[np.float32]:
        """Unit vectors, float32 (B,D): the pooled output, or the mean of the tokens."""
        net = getattr(self.net, "vision_model", self.net)  # of a model with a text tower
        output = net(pixel_values=self.normalised(squares))
        pooled = getattr(output, "pooler_output", None)
        vectors = pooled if pooled is not None else output.last_hidden_state.mean(dim=1)
        vectors = vectors.flatten(1).float()
        unit: NDArray[np.float32] = torch.nn.functional.normalize(vectors, dim=1).numpy()
        return unit


@lru_cache(maxsize=4)
def classifier(source: str, revision: str | None, label: str) -> Classifier:
    """A classifier, loaded once in this process."""
    return Classifier(source, revision, label)


@lru_cache(maxsize=2)
def backbone(source: str, revision: str | None) -> Backbone:
    """A backbone, loaded once in this process."""
    return Backbone(source, revision)
