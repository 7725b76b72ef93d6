"""Decode records by threads that work ahead.

Nothing here refers back to the loader, so that a loader that is dropped takes its threads along.
Shapes: S side of the square images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlv.data.framing import frame
from vlv.data.records import BadRecord, Held, Record
from vlv.data.workers import HungError, Pool, Task
from vlv.errors import CacheError, DataError
from vlv.storage import Json

if TYPE_CHECKING:
    from vlv.data.loader import LoaderSettings

_MEMORY_LIMIT_BYTES = 2**30  # decoded images are kept by default up to this size

Arrays = dict[str, NDArray[Any]]
RowsOf = Callable[[int, Record], Arrays]
"""Precomputed arrays of a record, from its index and itself."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """One decoded record; a bad one has a `reason` instead of pixels."""

    index: int
    record: Record
    pixels: NDArray[np.uint8] | None = None  # (3,S,S)
    meta: Json | None = None
    arrays: Arrays = field(default_factory=dict)
    reason: str | None = None


class Decoder:
    """Turn records into pixels and metadata, in threads.

    Args:
        settings: Those of the loader.
        known_bad: Bad records by id; they are not tried again.
        rows_of: Gives precomputed arrays of a record, such as latents.
        keep: Number of listed records whose decoded images stay in memory; 0 keeps none.
    """

    def __init__(
        self,
        settings: LoaderSettings,
        known_bad: Mapping[str, BadRecord],
        rows_of: RowsOf | None = None,
        keep: int = 0,
    ) -> None:
        self._settings, self._known_bad, self._rows_of = settings, known_bad, rows_of
        self._pool = Pool(settings.num_workers, settings.timeout_seconds)
        side = settings.image_size or 0
        self._images = np.empty((keep, 3, side, side), np.uint8) if keep else None
        self._present = np.zeros(keep, bool)

    def submit(self, index: int, item: Record | BadRecord) -> Pending:
        """Queue a record; one that is known to be bad stays so."""
        if isinstance(item, BadRecord):
            record = Record(item.id, Held(item.source, b""))
            return Pending(Decoded(index, record, reason=item.reason))
        return Pending(Decoded(index, item), self._pool.submit(partial(self.decode, index, item)))

    def decode(self, index: int, record: Record) -> Decoded:
        """Decode one record; safe to call from several threads.

        Raises:
            CacheError: The precomputed arrays belong to another image: the cache is wrong, not the record.
        """
        known = self._known_bad.get(record.id)
        if known is not None:
            return Decoded(index, record, reason=known.reason)
        texts = self._settings.texts
        try:
            meta = record.meta
            if texts is not None:
                texts.of(f"{record.source}: the record {record.id}", record.caption, meta)
            pixels = self._pixels(index, record)  # before the arrays: its errors tell more
            arrays = self._rows_of(index, record) if self._rows_of is not None else {}
            return Decoded(index, record, pixels, meta, arrays)
        except CacheError:
            raise
        except DataError as error:
            return Decoded(index, record, reason=str(error))

    def close(self) -> None:
        """Stop the threads."""
        self._pool.close()

    def _pixels(self, index: int, record: Record) -> NDArray[np.uint8] | None:
        size = self._settings.image_size
        if size is None:
            return None
        if self._images is not None and self._present[index]:
            return np.asarray(self._images[index])
        image = record.load(limits=self._settings.limits)
        square = np.asarray(frame(image, size, self._settings.framing))  # (S,S,3)
        pixels = np.ascontiguousarray(square.transpose(2, 0, 1))
        if self._images is not None:
            self._images[index] = pixels
            self._present[index] = True
        return pixels


@dataclass(frozen=True, slots=True)
class Pending:
    """A record that is being decoded, or (without a task) needs no decoding."""

    bare: Decoded
    task: Task[Decoded] | None = None

    def result(self) -> Decoded:
        """Wait for it; a record that takes longer than the time limit is bad."""
        if self.task is None:
            return self.bare
        try:
            return self.task.result()
        except HungError as error:
            index, record = self.bare.index, self.bare.record
            return Decoded(index, record, reason=f"{record.source}: {error}")


def fits_in_memory(num_records: int, image_size: int | None) -> bool:
    """Whether the decoded images of a data set take 1 GiB at most."""
    return num_records * (image_size or 0) ** 2 * 3 <= _MEMORY_LIMIT_BYTES
