"""Batches of records, in an order that can be resumed exactly.

The order of epoch `e` is a permutation drawn from (seed, e), so the whole position is two
numbers: the epoch and how many of its records were consumed. The state belongs to the batches
that were handed out; what was merely read ahead is read again after a resume.
Shapes: B batch, S side of the square images.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from vlv.data.images import DEFAULT_LIMITS, ImageLimits, center_crop_resize
from vlv.data.quarantine import BadRecord, Quarantine
from vlv.data.records import Record
from vlv.errors import DataError

MEMORY_LIMIT_BYTES = 2**30  # decoded images are kept by default up to this size
_CHUNK = 16  # records that a worker decodes at a time
_PREFETCHED_BATCHES = 3
_STATE_VERSION = 1

Pixels = NDArray[np.uint8]  # (S,S,3)
Batch = dict[str, Any]  # see BatchLoader


@dataclass(frozen=True, slots=True)
class _Row:
    """One decoded record; without a `reason` it is sound."""

    index: int
    pixels: Pixels | None = None
    meta: dict[str, Any] | None = None
    reason: str | None = None


_Chunk = list[_Row]


class BatchLoader:
    """An endless iterator of batches; every record comes once per epoch.

    A batch is a dict: `ids` (list of str), `index` (int64 (B), places in `records`), `pixels`
    (uint8 (B,3,S,S)), `captions` (list of str or None), `meta` (list of dict or None), and one
    tensor (B,...) for every array in `extra`.

    A record that cannot be read is skipped, counted, and named in the quarantine file (JSONL: id,
    source, reason); the next ones take its place, so that the batch keeps its size.

    Args:
        records: What `find_records` returns.
        batch_size: B.
        image_size: S; None leaves the images unread (no `pixels`).
        seed: With the epoch, it decides the order.
        shuffle: False keeps the order of the list.
        drop_last: Leave out the last, smaller batch of an epoch.
        num_workers: Threads that decode ahead; 0 decodes when a batch is asked for.
        quarantine: File to which bad records are appended.
        max_bad_share: The share of bad records above which the run stops.
        min_checked: Records (at most one epoch) to see before that share is judged.
        on_bad: Told of each bad record once.
        need_captions: Whether a record without a caption is a bad one.
        extra: Arrays (N,...) whose row i belongs to record i, such as cached latents.
        keep_in_memory: Keep decoded images (N S S 3 bytes); by default up to 1 GiB.
        epochs: Stop after so many; None never stops.
        limits: What `load_image` refuses.

    Raises:
        DataError: There are fewer records than a batch needs, or `extra` has other rows.
    """

    def __init__(
        self,
        records: Sequence[Record],
        batch_size: int,
        image_size: int | None,
        *,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = True,
        num_workers: int = 0,
        quarantine: Path | None = None,
        max_bad_share: float = 0.001,
        min_checked: int = 1000,
        on_bad: Callable[[BadRecord], None] | None = None,
        need_captions: bool = False,
        extra: Mapping[str, NDArray[Any]] | None = None,
        keep_in_memory: bool | None = None,
        epochs: int | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        self.records = records
        self.batch_size = batch_size
        self.image_size = image_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.num_workers = num_workers
        self.need_captions = need_captions
        self.extra = dict(extra or {})
        self.epochs = epochs
        self.limits = limits
        self.quarantine = Quarantine(
            quarantine, max_bad_share, min(min_checked, len(records)), on_bad
        )
        self._check_arguments()
        self._memory = _Memory(len(records), image_size, keep_in_memory)
        self._fingerprint = fingerprint(records)
        self._executor: ThreadPoolExecutor | None = None
        self._epoch = 0
        self._position = 0  # records of this epoch that were consumed
        self._stream = self._chunks()
        self._rows: deque[_Row] = deque()

    # Iteration

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        num_ends = 0
        while True:
            rows, ended = self._gather()
            if len(rows) == self.batch_size or (rows and not self.drop_last):
                return self._batch(rows)
            num_ends += ended
            if num_ends > 1:
                raise DataError(
                    f"a whole epoch of {len(self.records)} records gave no batch of "
                    f"{self.batch_size}: {len(self.quarantine.bad)} of them cannot be read"
                )

    def _gather(self) -> tuple[list[_Row], bool]:
        """Up to B sound rows, fewer at the end of the epoch; and whether it ended."""
        rows: list[_Row] = []
        while len(rows) < self.batch_size:
            if not self._rows:
                self._rows.extend(next(self._stream))
                if not self._rows:
                    self._epoch, self._position = self._epoch + 1, 0
                    return rows, True
            row = self._rows.popleft()
            self._position += 1
            self.quarantine.count(self.records[row.index], row.reason)
            if row.reason is None:
                rows.append(row)
        return rows, False

    def _batch(self, rows: list[_Row]) -> Batch:
        index = np.array([row.index for row in rows])
        chosen = [self.records[i] for i in index]
        batch: Batch = {
            "ids": [record.id for record in chosen],
            "index": torch.from_numpy(index),
            "captions": [record.caption for record in chosen],
            "meta": [row.meta for row in rows],
        }
        stacked = [row.pixels for row in rows if row.pixels is not None]
        if stacked:
            pixels = torch.from_numpy(np.stack(stacked))  # (B,S,S,3)
            batch["pixels"] = pixels.permute(0, 3, 1, 2).contiguous()
        for name, array in self.extra.items():
            batch[name] = torch.from_numpy(np.array(array[index]))
        return batch

    # Reading ahead

    def _chunks(self) -> Iterator[_Chunk]:
        """Decoded chunks from the present position on; an empty one ends each epoch."""
        pending: deque[Callable[[], _Chunk]] = deque()
        ahead = _PREFETCHED_BATCHES * -(-self.batch_size // _CHUNK) if self.num_workers else 0
        for indices in self._plan(self._epoch, self._position):
            pending.append(self._submit(indices))
            if len(pending) > ahead:
                yield pending.popleft()()
        while pending:
            yield pending.popleft()()

    def _plan(self, epoch: int, position: int) -> Iterator[list[int]]:
        while self.epochs is None or epoch < self.epochs:
            order = self._order(epoch)
            for start in range(position, len(order), _CHUNK):
                yield order[start : start + _CHUNK].tolist()
            yield []
            epoch, position = epoch + 1, 0

    def _order(self, epoch: int) -> NDArray[np.int64]:
        count = len(self.records)
        if not self.shuffle:
            return np.arange(count)
        return np.random.default_rng([self.seed, epoch]).permutation(count)

    def _submit(self, indices: list[int]) -> Callable[[], _Chunk]:
        if not indices or not self.num_workers:
            return partial(self._decode, indices)
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self.num_workers, thread_name_prefix="vlv-decode")
        return self._executor.submit(self._decode, indices).result

    def _decode(self, indices: list[int]) -> _Chunk:
        return [self._decode_one(index) for index in indices]

    def _decode_one(self, index: int) -> _Row:
        record = self.records[index]
        known = self.quarantine.bad.get(record.id)
        if known is not None:
            return _Row(index, reason=known.reason)
        if self.need_captions and not record.caption:
            return _Row(index, reason=f"{record.source}: the record {record.id} has no caption")
        try:
            return _Row(index, self._pixels(index, record), record.meta)
        except DataError as error:
            return _Row(index, reason=str(error))

    def _pixels(self, index: int, record: Record) -> Pixels | None:
        if self.image_size is None:
            return None
        pixels = self._memory.get(index)
        if pixels is None:
            image = record.load(limits=self.limits)
            pixels = np.asarray(center_crop_resize(image, self.image_size))
            self._memory.put(index, pixels)
        return pixels

    # State

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out, as plain JSON values."""
        return {
            **self._identity(),
            "epoch": self._epoch,
            "position": self._position,
            "num_checked": self.quarantine.num_checked,
            "num_bad": self.quarantine.num_bad,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            DataError: The state belongs to other records, another order or another image size.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise DataError(
                    f"cannot resume: the saved data position has {name} {state.get(name)}, this "
                    f"run has {value}; name the same data and settings, or start a new run"
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self.quarantine.num_checked = int(state["num_checked"])
        self.quarantine.num_bad = int(state["num_bad"])
        self._rows.clear()
        self._stream = self._chunks()

    def _identity(self) -> dict[str, Any]:
        """What must agree for a position to mean the same records."""
        return {
            "version": _STATE_VERSION,
            "num_records": len(self.records),
            "fingerprint": self._fingerprint,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "image_size": self.image_size,
        }

    # Resources

    def close(self) -> None:
        """Stop the threads; the loader hands out nothing more."""
        self._stream = iter(())
        self._rows.clear()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_arguments(self) -> None:
        count = len(self.records)
        if self.batch_size < 1 or self.num_workers < 0 or self.seed < 0:
            raise ValueError(
                f"batch_size must be at least 1, num_workers and seed at least 0, not "
                f"{self.batch_size}, {self.num_workers}, {self.seed}"
            )
        if count < (self.batch_size if self.drop_last else 1):
            raise DataError(
                f"{count} records are too few for batches of {self.batch_size}; "
                "lower the batch size or add data"
            )
        for name, array in self.extra.items():
            if name in ("ids", "index", "pixels", "captions", "meta"):
                raise DataError(f"'{name}' is a name of the loader; call the extra array otherwise")
            if len(array) != count:
                raise DataError(f"'{name}' has {len(array)} rows for {count} records")


def epoch_batches(
    records: Sequence[Record],
    batch_size: int,
    image_size: int | None,
    *,
    num_workers: int = 0,
    on_bad: Callable[[BadRecord], None] | None = None,
    extra: Mapping[str, NDArray[Any]] | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> Iterator[Batch]:
    """One pass over the records in their order, the last, smaller batch included.

    Args:
        records: What `find_records` returns.
        batch_size: B.
        image_size: S, or None to leave the images unread.
        num_workers: Threads that decode ahead.
        on_bad: Told of each record that cannot be read, which is then skipped.
        extra: Arrays (N,...) whose row i belongs to record i.
        limits: What `load_image` refuses.

    Raises:
        DataError: A record cannot be read and `on_bad` is not given.
    """
    if not records:
        return
    loader = BatchLoader(
        records,
        batch_size,
        image_size,
        seed=0,
        shuffle=False,
        drop_last=False,
        num_workers=num_workers,
        max_bad_share=0.0 if on_bad is None else 1.0,
        min_checked=0,
        on_bad=on_bad,
        extra=extra,
        keep_in_memory=False,
        epochs=1,
        limits=limits,
    )
    with loader:
        yield from loader


def fingerprint(records: Sequence[Record]) -> str:
    """A hash of the ids in their order: another data set has another one."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(record.id.encode())
        digest.update(b"\0")
    return digest.hexdigest()


class _Memory:
    """Decoded images (S,S,3), kept after their first use if there is room."""

    def __init__(self, count: int, size: int | None, keep: bool | None) -> None:
        num_bytes = count * 3 * size * size if size else 0
        if keep is None:
            keep = num_bytes <= MEMORY_LIMIT_BYTES
        self._images = np.empty((count, size, size, 3), np.uint8) if keep and size else None
        self._present = np.zeros(count, bool)

    def get(self, index: int) -> Pixels | None:
        if self._images is None or not self._present[index]:
            return None
        pixels: Pixels = self._images[index]
        return pixels

    def put(self, index: int, pixels: Pixels) -> None:
        if self._images is not None:
            self._images[index] = pixels
            self._present[index] = True
