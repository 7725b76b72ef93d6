"""Records to decoded rows.

Nothing here refers back to the loader, so that a loader that is dropped takes its threads along.
Shapes: S side of the square images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlv.data.framing import DEFAULT_FRAMING, Framing, frame
from vlv.data.images import ImageLimits
from vlv.data.quarantine import BadRecord
from vlv.data.records import Record
from vlv.data.workers import HungError, Pool, Task
from vlv.errors import CacheError, DataError

MEMORY_LIMIT_BYTES = 2**30  # decoded images are kept by default up to this size

Pixels = NDArray[np.uint8]  # (3,S,S)
More = Callable[[int, Record], dict[str, NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class Row:
    """One decoded record; without a `reason` it is sound."""

    index: int
    record: Record
    pixels: Pixels | None = None
    meta: dict[str, Any] | None = None
    reason: str | None = None
    more: dict[str, NDArray[Any]] = field(default_factory=dict)


class Decoder:
    """Record to row; safe to call from several threads.

    Args:
        image_size: S; None leaves the images unread.
        limits: What `load_image` refuses.
        need_captions: Whether a record without a caption is a bad one.
        known_bad: Records that are not tried again.
        more: Further arrays for a record, such as its cached latents.
        keep: Number of records whose decoded images are kept (N S S 3 bytes); 0 keeps none.
        framing: How an image becomes a square, see `frame`.
    """

    def __init__(
        self,
        image_size: int | None,
        *,
        limits: ImageLimits,
        need_captions: bool,
        known_bad: Mapping[str, BadRecord],
        more: More | None = None,
        keep: int = 0,
        framing: Framing = DEFAULT_FRAMING,
    ) -> None:
        self.image_size = image_size
        self.framing = framing
        self.limits = limits
        self.need_captions = need_captions
        self.known_bad = known_bad
        self.more = more
        side = image_size or 0
        self._images = np.empty((keep, 3, side, side), np.uint8) if keep else None
        self._present = np.zeros(keep, bool)

    def __call__(self, index: int, record: Record) -> Row:
        """Decode one record; what is wrong with it is said in the row.

        Raises:
            CacheError: What `more` finds is that of another record, which the next one will not mend.
        """
        known = self.known_bad.get(record.id)
        if known is not None:
            return Row(index, record, reason=known.reason)
        if self.need_captions and not record.caption:
            reason = f"{record.source}: the record {record.id} has no caption"
            return Row(index, record, reason=reason)
        try:
            pixels = self._pixels(index, record)  # first: what is wrong with an image it says best
            more = self.more(index, record) if self.more is not None else {}
            return Row(index, record, pixels, record.meta, more=more)
        except CacheError:
            raise
        except DataError as error:
            return Row(index, record, reason=str(error))

    def _pixels(self, index: int, record: Record) -> Pixels | None:
        if self.image_size is None:
            return None
        if self._images is not None and self._present[index]:
            return np.asarray(self._images[index])
        image = record.load(limits=self.limits)
        square = np.asarray(frame(image, self.image_size, self.framing))  # (S,S,3)
        pixels = np.ascontiguousarray(square.transpose(2, 0, 1))
        if self._images is not None:
            self._images[index] = pixels
            self._present[index] = True
        return pixels


def fits_in_memory(num_records: int, image_size: int | None) -> bool:
    """Whether the decoded images of a data set are at most 1 GiB."""
    return num_records * (image_size or 0) ** 2 * 3 <= MEMORY_LIMIT_BYTES


class Reader:
    """Decode records by threads that work ahead.

    Args:
        decode: Record to row.
        pool: The threads.
    """

    def __init__(self, decode: Decoder, pool: Pool) -> None:
        self.decode = decode
        self.pool = pool

    def begin(self, index: int, record: Record) -> Pending:
        """Queue a record."""
        task = self.pool.submit(partial(self.decode, index, record))
        return Pending(index, record, task)


@dataclass(frozen=True, slots=True)
class Pending:
    """A record on its way to a row."""

    index: int
    record: Record
    task: Task[Row]

    def row(self) -> Row:
        """The row; that of a record that takes too long to read is a bad one."""
        try:
            return self.task.result()
        except HungError as error:
            return Row(self.index, self.record, reason=f"{self.record.source}: {error}")
