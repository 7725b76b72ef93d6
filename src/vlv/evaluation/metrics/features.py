"""Feature extractors: images to vectors, for distances between sets and similarities between pairs.

Shapes: B images, W feature width. Each extractor says how it resizes, for that alone moves a Frechet distance by units
(Parmar et al. 2022).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from vlv.data.images import to_tensor
from vlv.errors import ModelFolderError
from vlv.evaluation.metrics.inception import SIDE, WIDTH, FIDInception

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

    from vlv.toyworld.inspector import Inspector

Features = NDArray[np.float32]
Resize = Literal["pytorch-fid", "clean-fid"]

_CANNOT_LOAD = (OSError, ValueError, KeyError)


@dataclass(frozen=True)
class Extractor:
    """Images to features.

    Attributes:
        width: W.
        resize: How images are brought to the network's size, in words.
        features: From RGB images of one size to (B, W).
    """

    width: int
    resize: str
    features: Callable[[Sequence[Image.Image]], Features]

    def __call__(self, images: Sequence[Image.Image]) -> Features:
        """Features of RGB images of one size, (B, W)."""
        with torch.no_grad():
            return self.features(images)


def stack(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size as pixels (B, 3, H, W) in [0, 1]."""
    return torch.stack([to_tensor(image) for image in images]).float() / 255


def inspector_features(inspector: Inspector) -> Extractor:
    """What the inspector of the toy world attends to: scene and columns side by side."""

    def features(images: Sequence[Image.Image]) -> Features:
        return _array(inspector.features(stack(images).to(inspector.device)).flatten(1))

    width = inspector.queries.shape[1] * inspector.queries.shape[2]
    return Extractor(width, "bicubic, antialiased, to 64 pixels", features)


def inception_features(
    path: Path, resize: Resize = "pytorch-fid", device: torch.device | str = "cpu"
) -> Extractor:
    """The 2,048 features of FID's Inception.

    Args:
        path: The published weights.
        resize: "pytorch-fid": bilinear on the pixels, without antialiasing; "clean-fid": Pillow's bicubic, with it, in floats.
        device: Where it works.
    """
    model, clean = FIDInception.from_file(path).to(device), resize == "clean-fid"

    def features(images: Sequence[Image.Image]) -> Features:
        pixels = torch.stack([clean_resize(i) for i in images]) if clean else stack(images)
        return _array(model(pixels.to(device)))

    how = "Pillow bicubic, antialiased" if clean else "bilinear, not antialiased"
    return Extractor(WIDTH, f"{how}, to {SIDE} pixels ({resize})", features)


def _array(features: Tensor) -> Features:
    return np.asarray(features.float().cpu().numpy())


def clean_resize(image: Image.Image, side: int = SIDE) -> Tensor:
    """clean-fid's resizing: each channel as floats through Pillow's bicubic filter; (3, side, side) in [0, 1]."""
    channels = [
        Image.fromarray(np.asarray(channel, np.float32), mode="F").resize(
            (side, side), Image.Resampling.BICUBIC
        )
        for channel in image.split()
    ]
    pixels = np.stack([np.asarray(channel) for channel in channels])
    return torch.from_numpy(pixels).clamp(0, 255) / 255


def vision_features(name: str, device: torch.device | str = "cpu") -> Extractor:
    """The pooled vector of a vision backbone of transformers, such as DINOv2, with its own preprocessing; CLIP's projected one.

    Args:
        name: A folder, or ``owner/name`` on the hub.
        device: Where it works.

    Raises:
        ModelFolderError: There is no such model.
    """
    return _vision(name, device)[1]


def _vision(name: str, device: torch.device | str) -> tuple[PreTrainedModel, Extractor]:
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
        model: PreTrainedModel = AutoModel.from_pretrained(name, trust_remote_code=False)
    except _CANNOT_LOAD as error:
        raise ModelFolderError(f"{name} is no vision model of transformers ({error})") from error
    torch.nn.Module.to(model, device).eval()  # the signature of PreTrainedModel.to takes no device
    clip = getattr(model, "get_image_features", None)

    def features(images: Sequence[Image.Image]) -> Features:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"].to(device)
        found = (clip or model)(pixel_values=pixels)
        if isinstance(found, Tensor):
            return _array(found)
        pooled = getattr(found, "pooler_output", None)
        return _array(found.last_hidden_state[:, 0] if pooled is None else pooled)

    width = model.config.projection_dim if clip else model.config.hidden_size
    return model, Extractor(int(width), "as the model's own preprocessor does", features)


def cosine(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Cosine of each pair of rows, (B,) in [-1, 1]."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norm = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.asarray((x * y).sum(1) / np.where(norm > 0, norm, 1))


# --- images against texts --------------------------------------------------------------------------


class ClipScores(NamedTuple):
    """CLIPScore of pairs."""

    scores: NDArray[np.float64]
    """(B,), in [0, 2.5]."""
    truncated: NDArray[np.bool_]
    """(B,), whether the text is longer than CLIP reads at once."""


class ClipScore:
    """Reference-free CLIPScore (Hessel et al. 2021): 2.5 max(cos(image, text), 0).

    CLIP reads its text at the end token. Longer texts are cut before the end token is put behind them, so that it is never
    lost: a score of a long caption is that of its beginning, and `truncated` says so. `in_pieces` reads all of it.

    Args:
        name: A CLIP of transformers, as a folder or ``owner/name`` on the hub.
        device: Where it works.

    Raises:
        ModelFolderError: There is no such model.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                name, trust_remote_code=False
            )
        except _CANNOT_LOAD as error:
            raise ModelFolderError(f"{name} is no CLIP of transformers ({error})") from error
        self._model, self._images = _vision(name, device)
        self._device = device
        text: Callable[..., Any] | None = getattr(self._model, "get_text_features", None)
        if text is None:
            raise ModelFolderError(f"{name} is no CLIP of transformers: it reads no text")
        self._text = text
        self._length = int(self._model.config.text_config.max_position_embeddings)

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> ClipScores:
        """Score each image with the beginning of the text in its place."""
        return self._score(images, texts, whole=False)

    def in_pieces(self, images: Sequence[Image.Image], texts: Sequence[str]) -> ClipScores:
        """Score each image with the whole of a text, however long: 2.5 max(mean cosine of its pieces, 0).

        A text that CLIP cannot read at once is cut into the fewest pieces, whose lengths differ by one token at most, and each
        piece has its own start and end token. Of a short text this is CLIPScore itself; `truncated` marks the long ones.
        """
        return self._score(images, texts, whole=True)

    @torch.no_grad()
    def _score(
        self, images: Sequence[Image.Image], texts: Sequence[str], *, whole: bool
    ) -> ClipScores:
        head, tail = self._ends()
        room = self._length - len(head) - len(tail)
        read = self._tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        cut = [pieces(ids, room) if whole else [ids[:room]] for ids in read]
        rows = [{"input_ids": [*head, *ids, *tail]} for parts in cut for ids in parts]
        inputs = self._tokenizer.pad(
            rows, padding="max_length", max_length=self._length, return_tensors="pt"
        )
        numbers = [len(parts) for parts in cut]
        once = {id(image): image for image in images}  # one given several times is looked at once
        place = {key: row for row, key in enumerate(once)}
        seen = self._images(list(once.values()))[[place[id(image)] for image in images]]
        pixels = np.repeat(seen, numbers, axis=0)
        starts = np.cumsum([0, *numbers[:-1]])
        means = np.add.reduceat(cosine(pixels, self._read(inputs)), starts) / numbers
        return ClipScores(2.5 * means.clip(0), np.array([len(ids) > room for ids in read]))

    def _ends(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind a text."""
        around = list(self._tokenizer([""], verbose=False).input_ids[0])
        return around[:-1], around[-1:]

    def _read(self, inputs: BatchEncoding) -> Features:
        """(P, W) of P padded texts."""
        found = self._text(
            input_ids=inputs["input_ids"].to(self._device),
            attention_mask=inputs["attention_mask"].to(self._device),
        )
        return _array(getattr(found, "pooler_output", found))


def pieces(ids: Sequence[int], room: int) -> list[Sequence[int]]:
    """Cut a sequence into as few pieces of at most `room` as can be, whose lengths differ by one at most; one where it is empty.

    >>> pieces([1, 2, 3, 4, 5, 6, 7], 3)
    [[1, 2, 3], [4, 5], [6, 7]]
    """
    number = max(1, -(-len(ids) // room))
    short, more = divmod(len(ids), number)
    ends = [0, *(short * (i + 1) + min(i + 1, more) for i in range(number))]
    return [ids[a:b] for a, b in itertools.pairwise(ends)]


def feature_distances(
    seen: NDArray[np.float32], originals: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Distance of every image from its original in the inspector's features, (N, W) each to (N,)."""
    difference = seen.astype(np.float64) - originals.astype(np.float64)
    return np.asarray(np.linalg.norm(difference, axis=1))
