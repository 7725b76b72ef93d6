"""Batches of records that are listed, in an order that can be resumed exactly.

A global batch has G = batch_size x num_ranks rows, and each of its G places is a *lane*: a sequence of records of its
own, of which row b of the lane goes into batch b. In epoch `e` lane i has the places i, i + G, i + 2 G ... of a
permutation drawn from (seed, e). A bad record is passed over by its lane alone. So a row depends on nothing but seed,
G, and which records of its lane are bad: not on the number of ranks or workers, and no rank has to hear of the
bad records of another. The position of a lane is the number of batches and of the records it has passed over.
Shapes: B batch of one rank, S side of the square images.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from vlv.data.framing import DEFAULT_FRAMING, Framing
from vlv.data.images import DEFAULT_LIMITS, ImageLimits
from vlv.data.lanes import Lane, Order, check_identity, check_lanes, load_counts, merge_states
from vlv.data.quarantine import BadRecord, Quarantine
from vlv.data.reader import Decoder, More, Reader, Row, fits_in_memory
from vlv.data.records import Record
from vlv.data.workers import Pool
from vlv.errors import DataError

_PREFETCHED_BATCHES = 3
_STATE_VERSION = 2

Batch = dict[str, Any]  # see BatchLoader

__all__ = ["Batch", "BatchLoader", "epoch_batches", "fingerprint", "make_batch", "merge_states"]


class BatchLoader:
    """An endless iterator of batches; no record comes twice in an epoch, whatever the number of ranks and workers.

    A batch is a dict: `ids` (list of str), `index` (int64 (B), places in `records`), `pixels`
    (uint8 (B,3,S,S)), `captions` (list of str or None), `meta` (list of dict or None), and one
    tensor (B,...) for every array in `extra`.

    The N mod G last records of an epoch's permutation are left out of that epoch. A record that cannot be read is
    skipped, counted, and named in the quarantine file (JSONL: id, source, reason); the next one of its lane takes its
    place, so that the batch keeps its size.

    Args:
        records: What `find_records` returns; N of them, the same for every rank.
        batch_size: B, the rows that this rank gets of each global batch.
        image_size: S; None leaves the images unread (no `pixels`).
        seed: With the epoch, it decides the order.
        shuffle: False keeps the order of the list.
        rank: Number of this process, from 0.
        num_ranks: Processes that share each global batch.
        num_workers: Threads that decode ahead; 0 decodes when a batch is asked for.
        prefetch: Batches that the threads may be ahead.
        timeout_seconds: A record that takes longer to read is a bad one; None waits for ever.
        quarantine: File to which bad records are appended; each rank needs its own.
        max_bad_share: The share of bad records above which the run stops.
        min_checked: Records (at most an epoch's share of this rank) to see before that share is judged.
        on_bad: Told of each bad record once.
        need_captions: Whether a record without a caption is a bad one.
        extra: Arrays (N,...) whose row i belongs to record i, such as cached latents; a record whose row is not finite
            is a bad one.
        keep_in_memory: Keep decoded images (N S S 3 bytes); by default up to 1 GiB.
        framing: How an image becomes a square, see `frame`.
        limits: What `load_image` refuses.

    Raises:
        DataError: There are fewer records than a global batch needs, or `extra` has other rows.
    """

    def __init__(
        self,
        records: Sequence[Record],
        batch_size: int,
        image_size: int | None,
        *,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        num_ranks: int = 1,
        num_workers: int = 0,
        prefetch: int = _PREFETCHED_BATCHES,
        timeout_seconds: float | None = None,
        quarantine: Path | None = None,
        max_bad_share: float = 0.001,
        min_checked: int = 1000,
        on_bad: Callable[[BadRecord], None] | None = None,
        need_captions: bool = False,
        extra: Mapping[str, NDArray[Any]] | None = None,
        keep_in_memory: bool | None = None,
        framing: Framing = DEFAULT_FRAMING,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        self.records = records
        self.batch_size = batch_size
        self.image_size = image_size
        self.framing = framing
        self.seed = seed
        self.shuffle = shuffle
        self.rank, self.num_ranks = rank, num_ranks
        self.extra = dict(extra or {})
        check_ranks(batch_size, num_workers, seed, rank, num_ranks)
        _check_rows(len(records), self.global_batch, self.extra)
        self.quarantine = Quarantine(
            quarantine, max_bad_share, min(min_checked, len(records) // num_ranks), on_bad
        )
        keep = (
            fits_in_memory(len(records), image_size) if keep_in_memory is None else keep_in_memory
        )
        decoder = Decoder(
            image_size,
            limits=limits,
            need_captions=need_captions,
            known_bad=self.quarantine.bad,
            more=_rows_of(self.extra),
            keep=len(records) if keep else 0,
            framing=framing,
        )
        self._pool = Pool(num_workers, timeout_seconds)
        self._order = Order(len(records), self.global_batch, seed if shuffle else None)
        first = rank * batch_size
        ahead = prefetch if num_workers else 0
        self._lanes = [
            Lane(number, records, self._order, Reader(decoder, self._pool), ahead)
            for number in range(first, first + batch_size)
        ]
        self._fingerprint = fingerprint(records)
        self._num_batches = 0
        self._closed = False

    @property
    def global_batch(self) -> int:
        """G, the rows of a batch over all ranks."""
        return self.batch_size * self.num_ranks

    # Iteration

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        for depth in range(1, self._lanes[0].ahead + 1):  # the nearest batch first
            for lane in self._lanes:
                lane.look_ahead(depth)
        rows = [self._sound_row(lane) for lane in self._lanes]
        self._num_batches += 1
        return make_batch(rows)

    def _sound_row(self, lane: Lane) -> Row:
        for _ in range(len(self.records) + 1):
            row = lane.next()
            self.quarantine.count(row.record, row.reason)
            if row.reason is None:
                return row
            lane.skipped += 1
        raise DataError(
            f"{len(self.records)} records in a row gave no row for a batch: "
            f"{len(self.quarantine.bad)} of {len(self.records)} cannot be read"
        )

    # State

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out, as plain JSON values; see also `merge_states`."""
        lanes = self._lanes
        return {
            **self._identity(),
            "batches": self._num_batches,
            "lanes": [[lanes[0].number, lanes[-1].number + 1]],
            "skipped": {str(lane.number): lane.skipped for lane in lanes if lane.skipped},
            "num_checked": self.quarantine.num_checked,
            "num_bad": self.quarantine.num_bad,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, by this rank or, merged, by all of them.

        Raises:
            DataError: The state belongs to other records, another order, image size or global batch, or it is that of
                another rank.
        """
        check_identity(state, self._identity())
        start, stop = self._lanes[0].number, self._lanes[-1].number + 1
        check_lanes(state, start, stop)
        self._num_batches = int(state["batches"])
        load_counts(self.quarantine, state, start, stop)
        for lane in self._lanes:
            lane.go_to(self._num_batches, int(state["skipped"].get(str(lane.number), 0)))

    def _identity(self) -> dict[str, Any]:
        """What must agree for a position to mean the same records."""
        return {
            "version": _STATE_VERSION,
            "num_records": len(self.records),
            "fingerprint": self._fingerprint,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "image_size": self.image_size,
            "global_batch": self.global_batch,
            "framing": self.framing,
        }

    # Resources

    def close(self) -> None:
        """Stop the threads; the loader hands out nothing more."""
        self._closed = True
        for lane in self._lanes:
            lane.go_to(0, 0)
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def make_batch(rows: Sequence[Row]) -> Batch:
    """Rows as the batch that `BatchLoader` describes."""
    batch: Batch = {
        "ids": [row.record.id for row in rows],
        "index": torch.tensor([row.index for row in rows]),
        "captions": [row.record.caption for row in rows],
        "meta": [row.meta for row in rows],
    }
    stacked = [row.pixels for row in rows if row.pixels is not None]
    if stacked:
        batch["pixels"] = torch.from_numpy(np.stack(stacked))  # (B,3,S,S)
    for name in rows[0].more:
        batch[name] = torch.from_numpy(np.stack([row.more[name] for row in rows]))
    return batch


def _rows_of(extra: Mapping[str, NDArray[Any]]) -> More | None:
    """For the decoder: the rows of further arrays that belong to a record."""
    if not extra:
        return None
    return lambda index, record: {
        name: checked_row(np.array(array[index]), name, record) for name, array in extra.items()
    }


def checked_row(row: NDArray[Any], name: str, record: Record) -> NDArray[Any]:
    """What was computed of a record before.

    Raises:
        DataError: It is not finite, as where the image could not be read.
    """
    if not np.isfinite(row).all():
        raise DataError(
            f"{record.name}: its {name} are not finite; the image could not be read when they were computed, or they "
            "exceed the range of their type"
        )
    return row


def check_ranks(batch_size: int, num_workers: int, seed: int, rank: int, num_ranks: int) -> None:
    """Raise ValueError for numbers that make no sense."""
    if batch_size < 1 or num_workers < 0 or seed < 0:
        raise ValueError(
            f"batch_size must be at least 1, num_workers and seed at least 0, not "
            f"{batch_size}, {num_workers}, {seed}"
        )
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must be at least 0 and less than {num_ranks}, not {rank}")


def _check_rows(count: int, global_batch: int, extra: Mapping[str, NDArray[Any]]) -> None:
    if count < global_batch:
        raise DataError(
            f"{count} records are too few for batches of {global_batch}; "
            "lower the batch size or add data"
        )
    for name, array in extra.items():
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
    timeout_seconds: float | None = None,
    framing: Framing = DEFAULT_FRAMING,
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
        timeout_seconds: A record that takes longer to read is a bad one; None waits for ever.
        framing: How an image becomes a square, see `frame`.
        limits: What `load_image` refuses.

    Raises:
        DataError: A record cannot be read and `on_bad` is not given.
    """
    _check_rows(len(records), 0, extra or {})
    bad = Quarantine(None, 0.0 if on_bad is None else 1.0, 0, on_bad)
    decoder = Decoder(
        image_size,
        limits=limits,
        need_captions=False,
        known_bad=bad.bad,
        more=_rows_of(extra or {}),
        framing=framing,
    )
    pool = Pool(num_workers, timeout_seconds)
    reader = Reader(decoder, pool)
    coming = (reader.begin(index, record) for index, record in enumerate(records))
    try:
        pending = deque(islice(coming, _PREFETCHED_BATCHES * batch_size if num_workers else 1))
        rows: list[Row] = []
        while pending:
            row = pending.popleft().row()
            pending.extend(islice(coming, 1))
            bad.count(row.record, row.reason)
            if row.reason is None:
                rows.append(row)
            if len(rows) == batch_size:
                yield make_batch(rows)
                rows = []
        if rows:
            yield make_batch(rows)
    finally:
        pool.close()


def fingerprint(records: Sequence[Record]) -> str:
    """A hash of the ids in their order: another data set has another one."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(record.id.encode())
        digest.update(b"\0")
    return digest.hexdigest()
