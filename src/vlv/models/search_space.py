"""Where texts and images meet: the search space that was fitted to a model, kept as `search.safetensors` in its folder.

Shapes: B images, L tokens of an image, T tokens of a text, D text width, d width of the space.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from vlv.errors import DataError, ModelFolderError
from vlv.storage import replacing

if TYPE_CHECKING:
    from pathlib import Path

SPACE_NAME = "search.safetensors"
"""In a model folder: the space that was fitted to the model. In an index: the one that it was built with."""


@dataclass(frozen=True, eq=False)
class Space:
    """Affine maps of contexts: one of images and one of texts for late interaction, and two for the vectors of the first stage."""

    image_centre: Tensor
    """(D,)."""
    image_matrix: Tensor
    """(D, d)."""
    text_centre: Tensor
    """(D,)."""
    text_matrix: Tensor
    """(D, d)."""
    image_pool: Tensor
    """Of the mean of an image's tokens, (D, d)."""
    text_pool: Tensor
    """Of the mean of a text's tokens, (D, d)."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a space.

        Raises:
            DataError: The file is damaged, or holds something else.
        """
        names = [field.name for field in fields(cls)]
        try:
            with safe_open(path, "pt") as file:
                space = cls(*(file.get_tensor(name).float() for name in names))
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is no search space, or is damaged ({error})") from error
        D, d = space.image_matrix.shape if space.image_matrix.ndim == 2 else (0, 0)
        shapes = [tuple(getattr(space, name).shape) for name in names]
        if (
            not d
            or shapes != [(D,), (D, d), (D,), *[(D, d)] * 3]
            or not all(x.isfinite().all() for x in space.tensors)
        ):
            raise DataError(f"{path} is no search space: its tensors do not fit together")
        return space

    def save(self, path: Path) -> None:
        """Write the space, atomically.

        Raises:
            OutputError: The disk refuses.
        """
        tensors = {
            field.name: getattr(self, field.name).clone(memory_format=torch.contiguous_format)
            for field in fields(self)
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary)
            temporary.chmod(0o644)  # it is born private

    @property
    def tensors(self) -> list[Tensor]:
        """Those of both maps."""
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def text_width(self) -> int:
        """Numbers of a token of a context, D."""
        return len(self.image_matrix)

    @property
    def width(self) -> int:
        """Numbers of a token, d."""
        return self.image_matrix.shape[1]

    def hash(self) -> str:
        """SHA-256 of its numbers."""
        digest = hashlib.sha256()
        for tensor in self.tensors:
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def images(self, c: Tensor) -> Embedded:
        """Contexts of images, (B, L, D)."""
        c = c.cpu().float() - self.image_centre
        return _embedded(c, self.image_matrix, self.image_pool)

    def text(self, c: Tensor) -> Embedded:
        """The context of one text, (T, D)."""
        c = c.cpu().float() - self.text_centre
        return _embedded(c, self.text_matrix, self.text_pool)


class Embedded(NamedTuple):
    """Images or a text in the space, of unit length."""

    tokens: Tensor
    """For late interaction, (..., L, d)."""
    pooled: Tensor
    """For the first stage, (..., d)."""


def _embedded(c: Tensor, matrix: Tensor, pool: Tensor) -> Embedded:
    return Embedded(F.normalize(c @ matrix, dim=-1), F.normalize(c.mean(-2) @ pool, dim=-1))


def read_search_space(folder: Path) -> Space | None:
    """The search space of a model folder; None where none was fitted.

    Raises:
        ModelFolderError: It is damaged.
    """
    path = folder / SPACE_NAME
    if not path.exists():
        return None
    try:
        return Space.load(path)
    except DataError as error:
        raise ModelFolderError(f"{error}; copy the model again") from error
