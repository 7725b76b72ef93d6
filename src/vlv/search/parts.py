"""The part files of an index: immutable, each written whole or not at all.

A part is a safetensors file: ``tokens`` (N, L, d) and ``pooled`` (N, d) in float16, small pictures as JPEG in ``pictures`` (all bytes) with
``picture_ends`` (N), and in its metadata what is known of each image. A search reads the rows that it needs, and no file stays open.
"""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from vlv.errors import DataError
from vlv.storage import Json, replacing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from vlv.jobs.inputs import Opened

ROW_BITS = 16
"""A key is the number of the part, and in its lowest bits the row."""
MOST_ROWS = 256
"""Images of a part, which a killed build embeds again at most."""
_PICTURE_PX = 128
_DTYPES = {"F16": np.float16, "U8": np.uint8, "I64": np.int64}


def rows_of_part(batch_size: int) -> int:
    """How many images of a part: whole batches.

    >>> rows_of_part(16), rows_of_part(100), rows_of_part(1000)
    (256, 200, 1000)
    """
    return max(batch_size, MOST_ROWS // batch_size * batch_size)


def picture_of(image: Image.Image | None) -> bytes:
    """A small JPEG for contact sheets; empty where there is no image."""
    if image is None:
        return b""
    small = image.copy()
    small.thumbnail((_PICTURE_PX, _PICTURE_PX), Image.Resampling.BICUBIC)
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


@dataclass(frozen=True)
class Row:
    """One image on its way into a part."""

    about: Json
    """id, file_name, sha256."""
    tokens: Tensor
    """(L, d), float16."""
    pooled: Tensor
    """(d,), float16."""
    picture: bytes

    @classmethod
    def of(cls, item: Opened, tokens: Tensor, pooled: Tensor) -> Self:
        """A row of an input and its tokens."""
        known = item.record.meta or {} if item.z is not None else {}
        about = {
            "id": item.record.id,
            "file_name": str(known.get("file_name") or item.record.name),
            "sha256": item.sha256 or known.get("sha256"),
        }
        return cls(about, tokens.half(), pooled.half(), picture_of(item.image))


def write_part(path: Path, rows: Sequence[Row]) -> None:
    """Write a part.

    Raises:
        OutputError: The disk refuses.
    """
    pictures = b"".join(row.picture for row in rows)
    tensors = {
        "tokens": torch.stack([row.tokens for row in rows]),
        "pooled": torch.stack([row.pooled for row in rows]),
        "pictures": torch.frombuffer(bytearray(pictures or b"\0"), dtype=torch.uint8),
        "picture_ends": torch.tensor([len(row.picture) for row in rows]).cumsum(0),
    }
    about = json.dumps([row.about for row in rows], ensure_ascii=False)
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"images": about})
        temporary.chmod(0o644)  # it is born private


class Part:
    """A part on disk.

    Args:
        path: Its file; the stem is its number.

    Raises:
        DataError: It is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._as_damage():
            self._entries, self._start = _header(path)
            del self._entries["__metadata__"]  # of many parts it is much
            self.num_rows, self.num_tokens, self.width = self._entries["tokens"]["shape"]
            self.number = int(path.stem)

    def images(self) -> list[Json]:
        """What is known of each image: id, file_name, sha256.

        Raises:
            DataError: It is damaged.
        """
        with self._as_damage():
            found: list[Json] = json.loads(_header(self.path)[0]["__metadata__"]["images"])
            if len(found) != self.num_rows or not all("id" in image for image in found):
                raise ValueError("it does not name all of its images")
        return found

    def tokens(self, rows: Sequence[int]) -> NDArray[np.float16]:
        """(len(rows), L, d).

        Raises:
            DataError: It is damaged.
        """
        return self._read("tokens", rows)

    def pooled(self) -> NDArray[np.float16]:
        """(N, d)."""
        return self._read("pooled", range(self.num_rows))

    def picture(self, row: int) -> bytes:
        """The small JPEG of an image; empty where only its embedding was there."""
        ends = [0, *self._read("picture_ends", range(self.num_rows)).tolist()]
        return self._read("pictures", range(ends[row], ends[row + 1])).tobytes()

    @property
    def keys(self) -> NDArray[np.uint64]:
        """The keys of its images, (N,)."""
        return np.arange(self.num_rows, dtype=np.uint64) + np.uint64(self.number << ROW_BITS)

    def _read(self, name: str, rows: Sequence[int]) -> NDArray[Any]:
        """Some rows of a tensor."""
        entry = self._entries[name]
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"][1:]
        size = dtype.itemsize * math.prod(shape)
        found = np.empty((len(rows), *shape), dtype)
        with self._as_damage(), self.path.open("rb", buffering=0) as file:
            for place, (first, count) in _runs(rows):
                file.seek(self._start + entry["data_offsets"][0] + first * size)
                if count and file.readinto(found[place : place + count].data) != count * size:
                    raise ValueError("it ends too early")
        return found

    @contextmanager
    def _as_damage(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{self.path} is damaged ({error}); vlv index build, given again, replaces it"
            ) from error


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Rows that follow one another: where they go, the first, and how many.

    >>> list(_runs([4, 5, 6, 2]))
    [(0, (4, 3)), (3, (2, 1))]
    """
    if isinstance(rows, range):
        yield 0, (rows.start, len(rows))
        return
    start = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1:
            yield start, (rows[start], place - start)
            start = place


def _header(path: Path) -> tuple[Json, int]:
    """What a safetensors file says of its tensors, and where their bytes begin.

    Raises:
        ValueError: The file ends before them.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError("it ends within its header")
        entries: Json = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    if 8 + length + max(ends) != size:
        raise ValueError("it ends before its last tensor")
    return entries, 8 + length


def read_parts(folder: Path) -> tuple[list[Part], list[Path]]:
    """The whole parts of an index by number, and the damaged ones."""
    good, damaged = [], []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            good.append(Part(path))
        except DataError:
            damaged.append(path)
    return good, damaged
