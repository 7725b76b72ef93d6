"""Where texts and images meet: the search space that was fitted to a model, kept as `search.safetensors` in its folder.

Shapes: B images or texts, L tokens of an image's context, T of a text, D text width, d width of the space, M tokens of an image in it.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from vlv.errors import DataError, ModelFolderError
from vlv.models.search_net import Embedded, SearchNet
from vlv.storage import replacing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SPACE_NAME = "search.safetensors"
"""In a model folder: the space that was fitted to the model. In an index: the one that it was built with."""


class Space(ABC):
    """Takes contexts to where a search compares them."""

    @staticmethod
    def load(path: Path) -> Space:
        """Read a space.

        Raises:
            DataError: The file is damaged, or holds something else.
        """
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is no search space, or is damaged ({error})") from error
        try:
            if not all(x.isfinite().all() for x in tensors.values()):
                raise ValueError("not all of its numbers are finite")
            kind = PlainSpace if tensors.keys() == {"centre", "matrix"} else FittedSpace
            return kind.of(tensors)
        except (ValueError, KeyError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(
                f"{path} is no search space: its tensors do not fit together ({reason})"
            ) from error

    def save(self, path: Path) -> None:
        """Write the space, atomically.

        Raises:
            OutputError: The disk refuses.
        """
        tensors = {
            name: x.clone(memory_format=torch.contiguous_format) for name, x in self.tensors.items()
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary)
            temporary.chmod(0o644)  # it is born private

    def hash(self) -> str:
        """SHA-256 of its numbers."""
        digest = hashlib.sha256()
        for _, tensor in sorted(self.tensors.items()):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """What is kept, by name."""

    @property
    @abstractmethod
    def text_width(self) -> int:
        """Numbers of a token of a context, D."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Numbers of a token in the space, d."""

    @abstractmethod
    def images(self, c: Tensor) -> Embedded:
        """Images that are searched among, from their contexts (B, L, D)."""

    @abstractmethod
    def image_queries(self, c: Tensor) -> Embedded:
        """Images that are searched for, from their contexts (B, L, D)."""

    @abstractmethod
    def text(self, c: Tensor) -> Embedded:
        """A text that is searched for, from its context (T, D)."""


class PlainSpace(Space):
    """One affine map for all: how contexts are compared where nothing was fitted.

    Args:
        centre: What all contexts have in common, (D,).
        matrix: (D, d).
    """

    def __init__(self, centre: Tensor, matrix: Tensor) -> None:
        if matrix.ndim != 2 or not matrix.shape[1] or centre.shape != matrix.shape[:1]:
            raise ValueError(f"centre {tuple(centre.shape)}, matrix {tuple(matrix.shape)}")
        self.centre, self.matrix = centre.float(), matrix.float()

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> PlainSpace:
        """From what was kept."""
        return cls(tensors["centre"], tensors["matrix"])

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Centre and matrix."""
        return {"centre": self.centre, "matrix": self.matrix}

    @property
    def text_width(self) -> int:
        """Numbers of a token of a context, D."""
        return len(self.matrix)

    @property
    def width(self) -> int:
        """Numbers of a token, d."""
        return self.matrix.shape[1]

    def images(self, c: Tensor) -> Embedded:
        """Contexts (B, L, D), or one (T, D): every token and their mean."""
        c = c.cpu().float() - self.centre
        tokens = F.normalize(c @ self.matrix, dim=-1)
        weights = torch.full(tokens.shape[:-1], 1 / tokens.shape[-2])
        return Embedded(tokens, F.normalize(c.mean(-2) @ self.matrix, dim=-1), weights)

    image_queries = text = images


class FittedSpace(Space):
    """A small network that was fitted to images and texts of a model; its numbers are kept in half precision.

    Args:
        net: The network, of which a rounded copy is taken.
    """

    def __init__(self, net: SearchNet) -> None:
        self._kept = {name: x.detach().cpu().half() for name, x in net.state_dict().items()}
        self._net = _net_of(self._kept)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> FittedSpace:
        """From what was kept.

        Raises:
            ValueError, KeyError, RuntimeError: It is something else.
        """
        return cls(_net_of(tensors))

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The numbers of the network."""
        return self._kept

    @property
    def text_width(self) -> int:
        """Numbers of a token of a context, D."""
        return self._net.text_width

    @property
    def width(self) -> int:
        """Numbers of a token in the space, d."""
        return self._net.width

    @torch.no_grad()
    def images(self, c: Tensor) -> Embedded:
        """Contexts (B, L, D) to M tokens each.

        Raises:
            DataError: The contexts have another number of tokens than those that the space was fitted to.
        """
        return self._net.images(self._checked(c))

    @torch.no_grad()
    def image_queries(self, c: Tensor) -> Embedded:
        """The same images as `images`, with what they are searched for by.

        Raises:
            DataError: The contexts have another number of tokens than those that the space was fitted to.
        """
        return self._net.image_queries(self._checked(c))

    @torch.no_grad()
    def text(self, c: Tensor) -> Embedded:
        """The context of one text, (T, D)."""
        found = self._net.texts(c.cpu().float()[None])
        return Embedded(*(x[0] for x in found))

    def _checked(self, c: Tensor) -> Tensor:
        if c.shape[1] != self._net.num_places:
            raise DataError(
                f"the search space was fitted to images of {self._net.num_places} tokens, "
                f"and these have {c.shape[1]}; fit one to these"
            )
        return c.cpu().float()


def _net_of(tensors: Mapping[str, Tensor]) -> SearchNet:
    """The network whose numbers these are."""
    places, text_width = tensors["image.places"], tensors["image.centre"].shape[-1]
    num_tokens = len(tensors["image.asked"]) - 1
    net = SearchNet(text_width, len(places), num_tokens, places.shape[1])
    net.load_state_dict({name: x.float() for name, x in tensors.items()})
    return net.eval()


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
