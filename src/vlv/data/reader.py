"""Records to decoded rows: in the order of an epoch, ahead of their use, by threads.

Nothing here refers back to the loader, so that a loader that is dropped takes its threads along.
Shapes: S side of the square images.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlv.data.images import ImageLimits, center_crop_resize
from vlv.data.quarantine import BadRecord
from vlv.data.records import Record
from vlv.errors import DataError

MEMORY_LIMIT_BYTES = 2**30  # decoded images are kept by default up to this size
_CHUNK = 16  # records that a thread decodes at a time

Pixels = NDArray[np.uint8]  # (S,S,3)


@dataclass(frozen=True, slots=True)
class Row:
    """One decoded record; without a `reason` it is sound."""

    index: int
    pixels: Pixels | None = None
    meta: dict[str, Any] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Order:
    """The order of the records in each epoch.

    Attributes:
        count: Number of records.
        seed: With the epoch, it decides the permutation; None keeps the order of the list.
        epochs: How many there are; None for no end.
    """

    count: int
    seed: int | None
    epochs: int | None

    def of(self, epoch: int) -> NDArray[np.int64]:
        """The places of the records in this epoch, (count)."""
        if self.seed is None:
            return np.arange(self.count)
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)

    def chunks(self, epoch: int, position: int) -> Iterator[list[int]]:
        """Places from a position on, some at a time; an empty list ends each epoch."""
        while self.epochs is None or epoch < self.epochs:
            places = self.of(epoch)
            for start in range(position, self.count, _CHUNK):
                yield places[start : start + _CHUNK].tolist()
            yield []
            epoch, position = epoch + 1, 0


class Decoder:
    """Record number to row; safe to call from several threads.

    Args:
        records: What `find_records` returns.
        image_size: S; None leaves the images unread.
        limits: What `load_image` refuses.
        need_captions: Whether a record without a caption is a bad one.
        keep_in_memory: Keep decoded images (N S S 3 bytes); None: up to 1 GiB.
        known_bad: Records that are not tried again.
    """

    def __init__(
        self,
        records: Sequence[Record],
        image_size: int | None,
        *,
        limits: ImageLimits,
        need_captions: bool,
        keep_in_memory: bool | None,
        known_bad: Mapping[str, BadRecord],
    ) -> None:
        self.records = records
        self.image_size = image_size
        self.limits = limits
        self.need_captions = need_captions
        self.known_bad = known_bad
        shape = (len(records), image_size or 0, image_size or 0, 3)
        if keep_in_memory is None:
            keep_in_memory = int(np.prod(shape)) <= MEMORY_LIMIT_BYTES
        self._images = np.empty(shape, np.uint8) if keep_in_memory else None
        self._present = np.zeros(len(records), bool)

    def __call__(self, index: int) -> Row:
        """Decode one record; what is wrong with it is said in the row, never raised."""
        record = self.records[index]
        known = self.known_bad.get(record.id)
        if known is not None:
            return Row(index, reason=known.reason)
        if self.need_captions and not record.caption:
            return Row(index, reason=f"{record.source}: the record {record.id} has no caption")
        try:
            return Row(index, self._pixels(index, record), record.meta)
        except DataError as error:
            return Row(index, reason=str(error))

    def _pixels(self, index: int, record: Record) -> Pixels | None:
        if self.image_size is None:
            return None
        if self._images is not None and self._present[index]:
            return np.asarray(self._images[index])
        image = record.load(limits=self.limits)
        pixels = np.asarray(center_crop_resize(image, self.image_size))
        if self._images is not None:
            self._images[index] = pixels
            self._present[index] = True
        return pixels


class Reader:
    """Decode in order, by threads that run ahead.

    Args:
        decode: Record number to row.
        order: Which comes when.
        num_workers: Threads; 0 decodes when a row is asked for.
        ahead: Rows that the threads may be ahead.
    """

    def __init__(
        self, decode: Callable[[int], Row], order: Order, *, num_workers: int, ahead: int
    ) -> None:
        self.decode = decode
        self.order = order
        self.num_workers = num_workers
        self.ahead = ahead
        self._executor: ThreadPoolExecutor | None = None

    def read(self, epoch: int, position: int) -> Iterator[list[Row]]:
        """Decoded chunks from a position on; an empty one ends each epoch."""
        pending: deque[Callable[[], list[Row]]] = deque()
        num_ahead = -(-self.ahead // _CHUNK) if self.num_workers else 0
        for places in self.order.chunks(epoch, position):
            pending.append(self._submit(places))
            if len(pending) > num_ahead:
                yield pending.popleft()()
        while pending:
            yield pending.popleft()()

    def close(self) -> None:
        """Stop the threads, and wait for what they are at."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def _submit(self, places: list[int]) -> Callable[[], list[Row]]:
        if not places or not self.num_workers:
            return partial(_decode_all, self.decode, places)
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self.num_workers, thread_name_prefix="vlv-decode")
        return self._executor.submit(_decode_all, self.decode, places).result


def _decode_all(decode: Callable[[int], Row], places: list[int]) -> list[Row]:
    return [decode(place) for place in places]
