"""Records: an image's id, the place where its bytes lie, and what is known about it. Images are not opened here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from PIL import Image

from vlv.data.foreign import parse_object, printable, read_at_most, read_up_to, unreadable
from vlv.data.images import DEFAULT_LIMITS, ImageLimits, load_bytes, load_image
from vlv.data.locations import Location, Url, open_seekable
from vlv.errors import DataError, ImageError
from vlv.storage import Json

if TYPE_CHECKING:
    from torch import Tensor

DAMAGED = "damaged_file"
MISSING_IMAGE = "missing_image"
DUPLICATE_KEY = "duplicate_key"
NOT_DOWNLOADED = "not_downloaded"
REFUSED = "refused"
UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class Columns:
    """What the fields of an index are called; None leaves it to the usual names.

    Attributes:
        image: Of a table, the image: its bytes, or its path.
        caption: The caption; in tar shards a suffix, or a field of the `.json`.
        sha256: The SHA-256 of the image file, which is then checked at each read; None checks nothing.
        image_root: Folder below which the images of a table may lie, beside the table's own.
    """

    image: str | None = None
    caption: str | None = None
    sha256: str | None = None
    image_root: str | None = None


GUESSED = Columns()


# Where the bytes of an image lie -----------------------------------------------------------------


class Stored(Protocol):
    """The bytes of an image inside of something else than a file of their own."""

    @property
    def path(self) -> Location | str:
        """What holds them."""

    @property
    def raw_pixels(self) -> bool:
        """Whether they may be pixels instead of an image file, which only a table says."""

    def read(self) -> bytes:
        """The bytes; safe from any thread or process.

        Raises:
            DataError: They are not there, or cannot be read.
        """


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes within a file: a member of a tar."""

    raw_pixels: ClassVar[bool] = False

    path: Location
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{_shown(self.path)} at byte {self.offset}"

    def read(self) -> bytes:
        """The bytes; nothing is kept open.

        Raises:
            DataError: The file is gone or shorter than when it was indexed.
        """
        try:
            with open_seekable(self.path) as file:
                file.seek(self.offset)
                data = read_up_to(file, self.size, self.size)
        except OSError as error:
            raise unreadable(self.path, error) from error
        if len(data) != self.size:
            raise DataError(f"{self}: the file is shorter than when it was indexed")
        return data


@dataclass(frozen=True, slots=True)
class Held:
    """The bytes of an image that are in memory already."""

    path: str  # of the file that they come from
    data: bytes
    raw_pixels: bool = False

    def __str__(self) -> str:
        return self.path

    def read(self) -> bytes:
        """The bytes."""
        return self.data


@dataclass(frozen=True, slots=True)
class Absent:
    """Stands for an image that an index should hold and does not."""

    raw_pixels: ClassVar[bool] = False

    path: str
    reason: str

    def __str__(self) -> str:
        return self.path

    def read(self) -> bytes:
        """Raise DataError: there is nothing to read."""
        raise DataError(self.reason)


@dataclass(frozen=True, slots=True)
class EmbeddingRow:
    """The caption embedding of an image, in a file that `vlv embed` wrote, instead of the image."""

    raw_pixels: ClassVar[bool] = False

    path: Path
    row: int

    def __str__(self) -> str:
        return f"{printable(self.path)}, row {self.row}"

    def read(self) -> bytes:
        """Raise DataError: the image is not kept."""
        raise DataError(
            f"{self}: this is a caption embedding, from which no image can be read; name the images themselves"
        )

    def tensor(self) -> Tensor:
        """The embedding z, (Q,D).

        Raises:
            DataError: The file is gone or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                z: Tensor = file.get_slice("z")[self.row]
        except (SafetensorError, OSError, IndexError) as error:
            raise unreadable(self.path, error) from error
        return z


ImagePlace = Path | Stored


def _shown(path: Location) -> str:
    return path.text if isinstance(path, Url) else printable(path)


# Records -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, init=False)
class Record:
    """One image and what is known about it.

    Attributes:
        id: Unique and stable: the path relative to the folder that was named, or the tar key.
        source: Where the bytes of the image lie.
        caption: The text that belongs to it, if any.
        meta_json: Everything else, as the text of a JSON object; `meta` is the object.
        sha256: What an index says that the SHA-256 of the image file is; it is checked at each read.
        extras: Other members of its tar, suffix to place; only where everything was asked for.
    """

    id: str
    source: ImagePlace
    caption: str | None
    meta_json: str | None
    sha256: str | None
    extras: Mapping[str, Span] | None

    def __init__(
        self,
        id: str,
        source: ImagePlace,
        caption: str | None = None,
        meta: Mapping[str, object] | None = None,
        *,
        meta_json: str | None = None,
        sha256: str | None = None,
        extras: Mapping[str, Span] | None = None,
    ) -> None:
        if meta is not None:
            meta_json = json.dumps(meta, ensure_ascii=False)
        for name, value in (("id", id), ("source", source), ("caption", caption)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "meta_json", meta_json)
        object.__setattr__(self, "sha256", sha256)
        object.__setattr__(self, "extras", extras)

    @property
    def meta(self) -> Json | None:
        """The metadata, parsed anew at each access: tens of thousands stay small in memory.

        Raises:
            DataError: It is not a JSON object.
        """
        return None if self.meta_json is None else parse_object(self.meta_json, self.id)

    @property
    def name(self) -> str:
        """How messages and tables name the file of the image."""
        if isinstance(self.source, Path):
            return printable(self.source)
        return f"{printable(str(self.source.path))}/{self.id}"

    def open(self, *, max_bytes: int = DEFAULT_LIMITS.max_bytes) -> bytes:
        """The bytes of the image file; safe from any thread or process.

        Raises:
            DataError: The file is gone, shorter than when it was indexed, over the limit, or another than the index
                states.
        """
        if isinstance(self.source, Span) and self.source.size > max_bytes:
            raise _too_large(self.name, max_bytes)
        if isinstance(self.source, Path):
            data = read_at_most(self.source, max_bytes + 1)
        else:
            data = self.source.read()
        if len(data) > max_bytes:
            raise _too_large(self.name, max_bytes)
        if self.sha256 is not None and hashlib.sha256(data).hexdigest() != self.sha256.lower():
            raise ImageError(
                f"{self.name}: the SHA-256 of the image is not the one that the index states"
            )
        return data

    def load(self, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
        """The image, upright and RGB: see `load_image`, and `load_bytes` for what tables may hold.

        Raises:
            DataError: It cannot be read or decoded, or is over a limit.
        """
        if isinstance(self.source, Path) and self.sha256 is None:
            return load_image(self.source, limits=limits)
        return self.decode(self.open(max_bytes=limits.max_bytes), limits=limits)

    def decode(self, data: bytes, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
        """The image in bytes that `open` gave; see `load`."""
        raw_pixels = not isinstance(self.source, Path) and self.source.raw_pixels
        return load_bytes(data, raw_pixels=raw_pixels, limits=limits, name=self.name)

    @property
    def is_embedding(self) -> bool:
        """Whether this is a caption embedding that `vlv embed` wrote, and no image."""
        return isinstance(self.source, EmbeddingRow)

    def embedding(self) -> Tensor:
        """The caption embedding z, (Q,D).

        Raises:
            DataError: This is an image, or the file is gone or damaged.
        """
        if not isinstance(self.source, EmbeddingRow):
            raise DataError(f"{self.name}: this is an image and no caption embedding")
        return self.source.tensor()


def _too_large(place: object, max_bytes: int) -> ImageError:
    return ImageError(f"{place}: larger than the limit of {max_bytes} bytes")


@dataclass(frozen=True)
class BadRecord:
    """What stands in the place of a record that cannot be used, and why.

    Attributes:
        id: Of the record, or what names its place.
        source: Where it lies.
        reason: In words.
        kind: Such as `UNREADABLE`.
        is_file: Whether a whole file, or the rest of it, is meant.
    """

    id: str
    source: str
    reason: str
    kind: str = UNREADABLE
    is_file: bool = False


Entry = Record | BadRecord
