"""Batches for training, from records that are listed or shards that are streamed, resumed exactly.

A global batch has G = batch_size x num_ranks rows, which are shared by partitions of the data (see `vlv.data.sampling`);
each rank has its rows of every global batch. The same seed gives the same rows for any number of ranks and workers.
Shapes: B batch of one rank, S side of the square images.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from vlv.data.decoding import Decoded, Decoder, RowsOf, fits_in_memory
from vlv.data.framing import DEFAULT_FRAMING, Framing
from vlv.data.images import DEFAULT_LIMITS, ImageLimits
from vlv.data.parts import Part
from vlv.data.positions import check_identity, check_rows, load_counts
from vlv.data.quarantine import Quarantine
from vlv.data.records import BadRecord, Record
from vlv.data.sampling import MAX_EMPTY_EPOCHS, ListSampler, Partition, Sampler, ShardSampler
from vlv.data.texts import TextMix
from vlv.data.workers import Pool, Task
from vlv.errors import DataError
from vlv.storage import Json

_STATE_VERSION = 3
_BUFFER = 1000

Batch = Json  # see Loader
OnBad = Callable[[BadRecord], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderSettings:
    """How a loader makes batches.

    Attributes:
        batch_size: B, the rows that one rank gets of each global batch.
        image_size: S; None leaves the images unread (no `pixels`).
        seed: With the epoch, it decides the order.
        shuffle: False keeps the order of the data.
        framing: How an image becomes a square, see `frame`.
        limits: What `load_image` refuses.
        texts: A record without any of these texts is bad; None needs none.
        num_workers: Threads that decode ahead, beside one that makes batches and (of a stream) one per partition that
            reads; 0 does everything when a batch is asked for.
        prefetch: Batches that the threads may be ahead.
        pin_memory: Put tensors into page-locked memory, from which a GPU copies them while it computes.
        timeout_seconds: A record that takes longer to read is bad; None waits for ever.
        max_bad_share: Share of bad records above which the run stops.
        min_checked: Records (at most an epoch's share of this rank) to see before that share is judged.
    """

    batch_size: int
    image_size: int | None
    seed: int = 0
    shuffle: bool = True
    framing: Framing = DEFAULT_FRAMING
    limits: ImageLimits = DEFAULT_LIMITS
    texts: TextMix | None = None
    num_workers: int = 0
    prefetch: int = 3
    pin_memory: bool = False
    timeout_seconds: float | None = None
    max_bad_share: float = 0.001
    min_checked: int = 1000

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0 or self.seed < 0:
            raise ValueError(
                "batch_size must be at least 1, num_workers and seed at least 0, not "
                f"{self.batch_size}, {self.num_workers}, {self.seed}"
            )


class Rows(Protocol):
    """A precomputed array whose row i belongs to record i, in memory or on the disk."""

    def __len__(self) -> int:
        """The number of rows."""

    def __getitem__(self, index: int, /) -> NDArray[Any]:
        """One row."""


@dataclass(frozen=True)
class Listed:
    """Records with random access. The N mod G last ones of an epoch's permutation are left out of that epoch.

    Attributes:
        records: What `find_records` returns; N of them, the same for every rank.
        arrays: Precomputed arrays (N,...) whose row i belongs to record i, such as latents; a record whose row is not
            finite is bad.
        keep_in_memory: Keep decoded images (N S S 3 bytes); by default up to 1 GiB.

    Raises:
        DataError: An array has another number of rows, or the name of something else in a batch.
    """

    records: Sequence[Record]
    arrays: Mapping[str, Rows] = field(default_factory=dict)
    keep_in_memory: bool | None = None

    def __post_init__(self) -> None:
        for name, array in self.arrays.items():
            if name in ("ids", "index", "pixels", "captions", "meta"):
                raise DataError(f"'{name}' is a name of the loader; call the array otherwise")
            if len(array) != len(self.records):
                raise DataError(f"'{name}' has {len(array)} rows for {len(self.records)} records")

    def sampler(self, settings: LoaderSettings, num_ranks: int) -> Sampler:
        """The order of the records: a partition for each row of the global batch.

        Raises:
            DataError: There are fewer records than rows.
        """
        global_batch = settings.batch_size * num_ranks
        if len(self.records) < global_batch:
            raise DataError(
                f"{len(self.records)} records are too few for batches of {global_batch}; "
                "lower the batch size or add data"
            )
        return ListSampler(self.records, global_batch, settings.seed if settings.shuffle else None)

    def decoder(self, settings: LoaderSettings, known_bad: Mapping[str, BadRecord]) -> Decoder:
        """What decodes them, with their arrays."""
        keep = self.keep_in_memory
        if keep is None:
            keep = fits_in_memory(len(self.records), settings.image_size)
        rows_of = self._rows_of if self.arrays else None
        return Decoder(settings, known_bad, rows_of, len(self.records) if keep else 0)

    def num_judged(self, settings: LoaderSettings, num_ranks: int) -> int:
        """At most one epoch's share."""
        return min(settings.min_checked, len(self.records) // num_ranks)

    def _rows_of(self, index: int, record: Record) -> dict[str, NDArray[Any]]:
        return {
            name: finite_row(np.array(array[index]), name, record)
            for name, array in self.arrays.items()
        }


@dataclass(frozen=True)
class Streamed:
    """Shards that are read one after the other, however many records they hold; every one comes once per epoch.

    Attributes:
        shards: What `Source.shards` returns, the same for every rank.
        buffer: Records that are shuffled together, 1000 by default: more of them shuffle better and take more memory, two blocks of encoded
            images for each partition of this rank.
        num_partitions: A multiple of the number of ranks that divides the global batch; None is the number of ranks. A run
            can be resumed by any number of ranks that divides it.
        rows_of: Gives precomputed arrays of a record, such as latents; called by the threads.
    """

    shards: Sequence[Part]
    buffer: int | None = None
    num_partitions: int | None = None
    rows_of: RowsOf | None = None

    def sampler(self, settings: LoaderSettings, num_ranks: int) -> Sampler:
        """The order of the records.

        Raises:
            DataError: The number of partitions fits neither the ranks nor the batch.
        """
        number, global_batch = self.num_partitions or num_ranks, settings.batch_size * num_ranks
        if global_batch % number or number % num_ranks:
            raise DataError(
                f"{number} partitions do not fit: their number must be a multiple of the {num_ranks} processes "
                f"and divide the global batch of {global_batch}"
            )
        return ShardSampler(
            self.shards,
            number,
            settings.seed if settings.shuffle else None,
            self.buffer or _BUFFER,
            reads_ahead=settings.num_workers > 0,
            timeout_seconds=settings.timeout_seconds,
        )

    def decoder(self, settings: LoaderSettings, known_bad: Mapping[str, BadRecord]) -> Decoder:
        """What decodes them, with their arrays."""
        return Decoder(settings, known_bad, self.rows_of)

    def num_judged(self, settings: LoaderSettings, num_ranks: int) -> int:
        """As the settings say."""
        return settings.min_checked


class Loader:
    """An endless iterator of batches; no record comes twice in an epoch, whatever the number of ranks and workers.

    A batch is a dict: `ids` (list of str), `index` (int64 (B), places among listed records, or -1), `pixels`
    (uint8 (B,3,S,S)), `captions` (list of str or None), `meta` (list of dict or None), and one
    tensor (B,...) for every precomputed array.

    A record that cannot be read is skipped, counted, and named in the quarantine file (JSONL: id, source, reason); the
    next one of its partition takes its place, so that the batch keeps its size.

    Args:
        data: What to read; a list of records is `Listed`.
        settings: How to make batches.
        rank: Number of this process, from 0.
        num_ranks: Processes that share each global batch.
        quarantine: File to which bad records are appended; each rank needs its own.
        on_bad: Told of each bad record once.

    Raises:
        DataError: There are too few records, or the partitions do not fit.
    """

    def __init__(
        self,
        data: Listed | Streamed | list[Record],
        settings: LoaderSettings,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        quarantine: Path | None = None,
        on_bad: OnBad | None = None,
    ) -> None:
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must be at least 0 and less than {num_ranks}, not {rank}")
        if isinstance(data, list):
            data = Listed(data)
        self.settings = settings
        self.global_batch = settings.batch_size * num_ranks
        self.sampler = data.sampler(settings, num_ranks)
        self.quarantine = Quarantine(
            quarantine, settings.max_bad_share, data.num_judged(settings, num_ranks), on_bad
        )
        self._decoder = data.decoder(settings, self.quarantine.bad)
        mine = self.sampler.num_partitions // num_ranks
        self._partitions = [
            Partition(number, self.sampler, self._decoder)
            for number in range(rank * mine, (rank + 1) * mine)
        ]
        self._rows_each = settings.batch_size // mine
        self._first_row = rank * settings.batch_size
        self._num_batches = 0
        self._closed = False
        self._start_ahead()

    # Iteration

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        while len(self._coming) <= self._pool.num_workers:
            self._coming.append(self._pool.submit(self._make))
        batch, self._state = self._coming.popleft().result()
        return batch

    def _start_ahead(self) -> None:
        """Make batches by a thread from now on, one before it is asked for."""
        self._pool = Pool(min(1, self.settings.num_workers))
        self._coming: deque[Task[tuple[Batch, Json]]] = deque()
        self._state = self._position()

    def _make(self) -> tuple[Batch, Json]:
        """The next batch and the position after it."""
        ahead = self.settings.prefetch * self._rows_each if self.settings.num_workers else 0
        for depth in range(1, ahead + 1):  # the nearest batch first
            for partition in self._partitions:
                partition.prefetch(depth)
        rows = [self._good_row(p) for p in self._partitions for _ in range(self._rows_each)]
        self._num_batches += 1
        batch = make_batch(rows)
        if self.settings.pin_memory:
            batch = {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch.items()}
        return batch, self._position()

    def _good_row(self, partition: Partition) -> Decoded:
        last = self.sampler.epoch_of(partition.position) + MAX_EMPTY_EPOCHS
        while self.sampler.epoch_of(partition.position) < last:
            row = partition.next()
            self.quarantine.count(row.record, row.reason)
            if row.reason is None:
                return row
        raise DataError(
            f"{MAX_EMPTY_EPOCHS} epochs gave no record that can be read; the latest: {row.reason}"
        )

    # State

    def state_dict(self) -> Json:
        """The position after the last batch handed out, as plain JSON values; see also `merge_states`."""
        return self._state

    def load_state_dict(self, state: Json) -> None:
        """Go on exactly where `state_dict` was taken, by this rank or, merged, by all of them.

        Raises:
            DataError: The state belongs to other data, another order, image size or global batch, or it is that of
                another rank.
        """
        self._pool.close()  # it waits for the batch in the making
        check_identity(state, self._identity())
        rows = range(self._first_row, self._first_row + self.settings.batch_size)
        check_rows(state, rows)
        self._num_batches = int(state["batches"])
        load_counts(self.quarantine, state, rows)
        usual = self.sampler.usual_position(self._num_batches)
        for partition in self._partitions:
            partition.go_to(tuple(state["positions"].get(str(partition.number), usual)))
        self._start_ahead()

    def _position(self) -> Json:
        usual = self.sampler.usual_position(self._num_batches)
        return {
            **self._identity(),
            "batches": self._num_batches,
            "rows": [[self._first_row, self._first_row + self.settings.batch_size]],
            "positions": {
                str(p.number): list(p.position) for p in self._partitions if p.position != usual
            },
            "num_checked": self.quarantine.num_checked,
            "num_bad": self.quarantine.num_bad,
        }

    def _identity(self) -> Json:
        """What must agree for a position to mean the same records."""
        return {
            "version": _STATE_VERSION,
            **self.sampler.identity(),
            "seed": self.settings.seed,
            "shuffle": self.settings.shuffle,
            "image_size": self.settings.image_size,
            "framing": self.settings.framing,
            "global_batch": self.global_batch,
        }

    # Resources

    def close(self) -> None:
        """Stop the threads; the loader hands out nothing more."""
        self._closed = True
        self._pool.close()
        self._coming.clear()
        for partition in self._partitions:
            partition.close()
        self._decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def epoch_batches(
    data: Listed | list[Record], settings: LoaderSettings, *, on_bad: OnBad | None = None
) -> Iterator[Batch]:
    """One pass over records in their order, the last, smaller batch included.

    Args:
        data: What to read.
        settings: How to make batches; `shuffle`, `seed` and what concerns bad records are not looked at.
        on_bad: Told of each record that cannot be read, which is then skipped.

    Raises:
        DataError: A record cannot be read and `on_bad` is not given.
    """
    if isinstance(data, list):
        data = Listed(data)
    bad = Quarantine(None, 0.0 if on_bad is None else 1.0, 0, on_bad)
    decoder = Listed(data.records, data.arrays, keep_in_memory=False).decoder(settings, bad.bad)
    coming = (decoder.submit(index, record) for index, record in enumerate(data.records))
    try:
        ahead = settings.prefetch * settings.batch_size if settings.num_workers else 1
        pending = deque(islice(coming, ahead))
        rows: list[Decoded] = []
        while pending:
            row = pending.popleft().result()
            pending.extend(islice(coming, 1))
            bad.count(row.record, row.reason)
            if row.reason is None:
                rows.append(row)
            if len(rows) == settings.batch_size:
                yield make_batch(rows)
                rows = []
        if rows:
            yield make_batch(rows)
    finally:
        decoder.close()


def make_batch(rows: Sequence[Decoded]) -> Batch:
    """Rows as the batch that `Loader` describes."""
    batch: Batch = {
        "ids": [row.record.id for row in rows],
        "index": torch.tensor([row.index for row in rows]),
        "captions": [row.record.caption for row in rows],
        "meta": [row.meta for row in rows],
    }
    pixels = [row.pixels for row in rows if row.pixels is not None]
    if pixels:
        batch["pixels"] = torch.from_numpy(np.stack(pixels))  # (B,3,S,S)
    for name in rows[0].arrays:
        batch[name] = torch.from_numpy(np.stack([row.arrays[name] for row in rows]))
    return batch


def finite_row(row: NDArray[Any], name: str, record: Record) -> NDArray[Any]:
    """A row of a precomputed array.

    Raises:
        DataError: It is not finite, as where the image could not be read.
    """
    if not np.isfinite(row).all():
        raise DataError(
            f"{record.name}: its {name} are not finite; the image could not be read when they were computed, or they "
            "exceed the range of their type"
        )
    return row
