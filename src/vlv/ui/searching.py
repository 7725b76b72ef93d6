"""Searches of the workbench, as `vlv search` does them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from vlv.data.images import load_image
from vlv.errors import ConfigError
from vlv.models.arguments import whole_number
from vlv.search.index import MOST_HITS, Hit, Index
from vlv.search.store import check_finished
from vlv.ui import commands
from vlv.ui.commands import command

if TYPE_CHECKING:
    from vlv.models.pipeline import VLVPipeline
    from vlv.ui.commands import ModelFlags

MOST_FOUND = 200
"""Images that a search shows at most."""


@dataclass
class SearchableIndex:
    """An index that the workbench searches; it is opened when the first search asks for it.

    Attributes:
        folder: What `vlv index build` wrote.

    Raises:
        DataError: It is no index, holds nothing, or was not finished.
    """

    folder: Path
    _index: Index | None = None
    _opening: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        check_finished(self.folder)

    def open(self, pipe: VLVPipeline) -> Index:
        """The index of this model.

        Raises:
            DataError: It was built with another model, or is damaged.
            ConfigError: The package usearch is missing.
        """
        with self._opening:
            if self._index is None:
                self._index = Index(self.folder, pipe)
            return self._index


@dataclass(frozen=True)
class Found:
    """An image that was found, and what it looks like where the index keeps a picture."""

    hit: Hit
    picture: Image.Image | None


@dataclass(frozen=True)
class SearchPlan:
    """A search that is wanted.

    Attributes:
        index: Where.
        text: For what.
        image: Or for images that are like this one.
        k: How many images.
        flags: Which model.

    Raises:
        ConfigError: There is no query, there are two, or too many images are wanted.
    """

    index: SearchableIndex
    text: str
    image: Path | None
    k: int
    flags: ModelFlags

    def __post_init__(self) -> None:
        if bool(self.text.strip()) == (self.image is not None):
            raise ConfigError("describe in words what to find, or drop an image: one of the two")
        whole_number("k", self.k, 1, min(MOST_FOUND, MOST_HITS))

    @property
    def command(self) -> str:
        """The command that does the same."""
        flags = self.flags
        given = commands.options(
            [
                ("--image", self.image, None),
                ("-k", self.k, 10),
                ("--model", flags.model, "vlv-tiny"),
                ("--adapter", flags.adapter, None),
                ("--device", flags.device, "auto"),
                ("--dtype", flags.dtype, "auto"),
            ]
        )
        text = [] if self.image else [*(["--"] if self.text.startswith("-") else []), self.text]
        return command("vlv", "search", *commands.inputs([str(self.index.folder)]), *given, *text)

    def run(self, pipe: VLVPipeline) -> list[Found]:
        """Search; the best comes first.

        Raises:
            VLVError: The image cannot be read, or the index is not one of this model.
        """
        index = self.index.open(pipe)
        if self.image is not None:
            hits = index.search(image=load_image(self.image), k=self.k)
        else:
            hits = index.search(self.text, k=self.k)
        return [Found(hit, _picture(index.picture(hit))) for hit in hits]


def _picture(data: bytes) -> Image.Image | None:
    return Image.open(BytesIO(data)).convert("RGB") if data else None
