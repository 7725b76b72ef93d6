"""Batches of records that are too many to list: shards read one after the other, shuffled, resumed exactly.

The shards of an epoch, in an order drawn from (seed, epoch), are dealt to *strands*. A strand reads its shards one after
the other, some records (a *block*) at a time; the order within a block is drawn from (seed, epoch, and where it begins).
Each strand fills the same rows of every global batch, at its own pace through the epochs, and each rank runs the same
number of strands. So a row depends on seed, the number of strands and the global batch, and neither on the number of
ranks nor on that of workers; bad records are passed over within their strand. The position of a strand is four numbers:
epoch, shard and record where the present block begins, and how much of the block was used. To resume is to read one
block, and for tars what lies before it in its shard, again.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vlv.data.batches import Batch, check_ranks, make_batch
from vlv.data.framing import DEFAULT_FRAMING, Framing
from vlv.data.images import DEFAULT_LIMITS, ImageLimits
from vlv.data.lanes import check_identity, check_lanes, load_counts
from vlv.data.quarantine import BadRecord, Quarantine
from vlv.data.reader import Decoder, Reader, Row
from vlv.data.records import Record
from vlv.data.streams import Item, Shard
from vlv.data.tables import Held
from vlv.data.workers import HungError, Pool, Task
from vlv.errors import DataError

DEFAULT_BUFFER = 1000
_CHUNK = 16  # records that are read at a time
_MAX_EMPTY_EPOCHS = 64  # where shards are few, a strand may get nothing of them now and then
_STATE_VERSION = 1


class StreamLoader:
    """An endless iterator of batches from shards; every record comes once per epoch, whatever ranks and workers.

    A batch is that of `BatchLoader` without `index`. Memory does not depend on the number of records or shards.

    Args:
        shards: What `list_shards` returns, the same for every rank.
        batch_size: B, the rows that this rank gets of each global batch.
        image_size: S; None leaves the images unread (no `pixels`).
        seed: With the epoch, it decides the order.
        shuffle: False keeps the order of the shards and of their records.
        buffer: Records of a block: the larger, the better the shuffling and the more memory, two blocks of encoded
            images for each strand of this rank.
        rank: Number of this process, from 0.
        num_ranks: Processes that share each global batch.
        num_strands: A multiple of num_ranks that divides the global batch; None is num_ranks. A run can be resumed by
            any number of ranks that divides it.
        num_workers: Threads that decode ahead, beside one per strand that reads; 0 does both when a batch is asked for.
        prefetch: Batches that the threads may be ahead.
        timeout_seconds: What takes longer to read is bad; None waits for ever.
        quarantine: File to which bad records are appended; each rank needs its own.
        max_bad_share: The share of bad records above which the run stops.
        min_checked: Records to see before that share is judged.
        on_bad: Told of each bad record once.
        need_captions: Whether a record without a caption is a bad one.
        more: Further arrays for a record, such as its cached latents; called by the threads.
        framing: How an image becomes a square, see `frame`.
        limits: What `load_image` refuses.

    Raises:
        DataError: The strands fit neither the ranks nor the batch.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        batch_size: int,
        image_size: int | None,
        *,
        seed: int,
        shuffle: bool = True,
        buffer: int = DEFAULT_BUFFER,
        rank: int = 0,
        num_ranks: int = 1,
        num_strands: int | None = None,
        num_workers: int = 0,
        prefetch: int = 3,
        timeout_seconds: float | None = None,
        quarantine: Path | None = None,
        max_bad_share: float = 0.001,
        min_checked: int = 1000,
        on_bad: Callable[[BadRecord], None] | None = None,
        need_captions: bool = False,
        more: Callable[[int, Record], dict[str, NDArray[Any]]] | None = None,
        framing: Framing = DEFAULT_FRAMING,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        check_ranks(batch_size, num_workers, seed, rank, num_ranks)
        self.batch_size, self.rank, self.num_ranks = batch_size, rank, num_ranks
        self.image_size, self.framing = image_size, framing
        self.plan = Plan(tuple(shards), num_strands or num_ranks, seed if shuffle else None, buffer)
        per_strand, rest = divmod(batch_size * num_ranks, self.plan.num_strands)
        if rest or self.plan.num_strands % num_ranks:
            raise DataError(
                f"{self.plan.num_strands} strands do not fit: their number must be a multiple of the {num_ranks} "
                f"processes and divide the global batch of {batch_size * num_ranks}"
            )
        self.quarantine = Quarantine(quarantine, max_bad_share, min_checked, on_bad)
        decoder = Decoder(
            image_size,
            limits=limits,
            need_captions=need_captions,
            known_bad=self.quarantine.bad,
            more=more,
            framing=framing,
        )
        self._pool = Pool(num_workers, timeout_seconds)
        mine = self.plan.num_strands // num_ranks
        ahead = prefetch * per_strand if num_workers else 0
        self._strands = [
            Strand(number, self.plan, Reader(decoder, self._pool), ahead)
            for number in range(rank * mine, (rank + 1) * mine)
        ]
        self._per_strand = per_strand
        self._seed, self._shuffle = seed, shuffle
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
        rows = [self._sound_row(s) for s in self._strands for _ in range(self._per_strand)]
        self._num_batches += 1
        batch = make_batch(rows)
        del batch["index"]
        return batch

    def _sound_row(self, strand: Strand) -> Row:
        first = strand.place.epoch
        while strand.place.epoch < first + _MAX_EMPTY_EPOCHS:
            row = strand.next()
            self.quarantine.count(row.record, row.reason)
            if row.reason is None:
                return row
        raise DataError(
            f"whole epochs of {len(self.plan.shards)} shards gave no record that can be read; the latest: {row.reason}"
        )

    # State

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out, as plain JSON values; see also `merge_states`."""
        start = self._strands[0].number * self._per_strand
        return {
            **self._identity(),
            "batches": self._num_batches,
            "lanes": [[start, start + self.batch_size]],
            "places": {str(s.number): list(astuple(s.place)) for s in self._strands},
            "num_checked": self.quarantine.num_checked,
            "num_bad": self.quarantine.num_bad,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, by this rank or, merged, by all of them.

        Raises:
            DataError: The state belongs to other shards, another order, image size or global batch, or it is that of
                another rank.
        """
        check_identity(state, self._identity())
        start = self._strands[0].number * self._per_strand
        check_lanes(state, start, start + self.batch_size)
        self._num_batches = int(state["batches"])
        load_counts(self.quarantine, state, start, start + self.batch_size)
        for strand in self._strands:
            strand.go_to(Place(*state["places"][str(strand.number)]))

    def _identity(self) -> dict[str, Any]:
        """What must agree for a position to mean the same records."""
        digest = hashlib.sha256("\0".join(shard.name for shard in self.plan.shards).encode())
        return {
            "version": f"stream {_STATE_VERSION}",
            "num_shards": len(self.plan.shards),
            "fingerprint": digest.hexdigest(),
            "seed": self._seed,
            "shuffle": self._shuffle,
            "buffer": self.plan.buffer,
            "image_size": self.image_size,
            "framing": self.framing,
            "global_batch": self.global_batch,
            "num_strands": self.plan.num_strands,
        }

    # Resources

    def close(self) -> None:
        """Stop the threads; the loader hands out nothing more."""
        self._closed = True
        for strand in self._strands:
            strand.close()
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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a strand stands: the block that begins at a record of a shard, and the rows used of it."""

    epoch: int = 0
    shard: int = 0  # place in the strand's shards of this epoch
    record: int = 0
    used: int = 0


@dataclass(frozen=True)
class Plan:
    """Which strand reads what in which epoch.

    Attributes:
        shards: All of them.
        num_strands: Among how many they are dealt.
        seed: With the epoch, it decides the order; None keeps that of the shards.
        buffer: Records of a block.
    """

    shards: tuple[Shard, ...]
    num_strands: int
    seed: int | None
    buffer: int

    def shards_of(self, epoch: int, strand: int) -> list[tuple[Shard, int, int]]:
        """Shards in order, each with the part of it (number, of how many) that the strand takes.

        Where there are fewer shards than strands, several strands read a shard and each takes every so manieth record.
        """
        num_parts = -(-self.num_strands // len(self.shards))
        units = [(shard, part, num_parts) for part in range(num_parts) for shard in self.shards]
        order = np.arange(len(units))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(units))
        return [units[i] for i in order[strand :: self.num_strands]]

    def order_of(self, place: Place, strand: int, count: int) -> list[int]:
        """The order of the records of a block."""
        if self.seed is None:
            return list(range(count))
        seed = [self.seed, place.epoch, place.shard, place.record, strand]
        return [int(i) for i in np.random.default_rng(seed).permutation(count)]


class Strand:
    """The rows that one strand gives, read and decoded ahead.

    Args:
        number: Of the strand.
        plan: What it reads.
        reader: Decodes.
        ahead: Rows to decode ahead.

    Attributes:
        place: After the last row that was handed out.
    """

    def __init__(self, number: int, plan: Plan, reader: Reader, ahead: int) -> None:
        self.number, self.ahead = number, ahead
        self._plan, self._reader = plan, reader
        self._files = Pool(1 if ahead else 0, reader.pool.timeout_seconds)
        self.go_to(Place())

    def go_to(self, place: Place) -> None:
        """Go on from a place."""
        self.place = place
        self._pending: deque[tuple[Callable[[], Row], Place]] = deque()
        self._entries = self._read(place)

    def next(self) -> Row:
        """The next row, sound or not."""
        while len(self._pending) <= self.ahead:
            item, after = next(self._entries)
            self._pending.append((self._begin(item), after))
        row, self.place = self._pending.popleft()
        return row()

    def close(self) -> None:
        """Stop the thread that reads."""
        self._pending.clear()
        self._entries = iter(())
        self._files.close()

    def _begin(self, item: Item) -> Callable[[], Row]:
        if isinstance(item, Record):
            return self._reader.begin(-1, item).row
        record = Record(item.id, Held(item.source, b""))
        return partial(Row, -1, record, reason=item.reason)

    def _read(self, place: Place) -> Iterator[tuple[Item, Place]]:
        """Items in the order of use, each with the place after it."""
        num_empty = 0  # epochs in a row
        while num_empty < _MAX_EMPTY_EPOCHS:
            shards = self._plan.shards_of(place.epoch, self.number)
            items = self._items(shards, place.shard, place.record)
            num_empty += 1
            while block := list(islice(items, self._plan.buffer)):
                num_empty = 0
                end = Place(place.epoch, *block[-1][1])
                order = self._plan.order_of(place, self.number, len(block))
                for used in range(place.used, len(block)):
                    item = block[order[used]][0]
                    is_last = used + 1 == len(block)
                    yield item, (end if is_last else _with_used(place, used + 1))
                place = end
                block.clear()  # before the next one is read
            place = Place(place.epoch + 1)
        raise DataError(
            f"the {len(self._plan.shards)} shards hold no records for strand {self.number}"
        )

    def _items(
        self, shards: Sequence[tuple[Shard, int, int]], first: int, record: int
    ) -> Iterator[tuple[Item, tuple[int, int]]]:
        """Items from a record of a shard on, each with the shard and record that come next."""
        for number in range(first, len(shards)):
            shard, part, num_parts = shards[number]
            for item in self._chunks(shard, record):
                record += 1
                if (record - 1) % num_parts == part:
                    yield item, (number, record)
            record = 0

    def _chunks(self, shard: Shard, start: int) -> Iterator[Item]:
        """The items of a shard, read ahead by the thread up to a block."""
        source = shard.read(start)
        num_ahead = max(1, self._plan.buffer // _CHUNK) if self.ahead else 0
        tasks: deque[Task[list[Item]]] = deque()
        while True:
            while len(tasks) <= num_ahead:
                tasks.append(self._files.submit(partial(_take, source)))
            try:
                items = tasks.popleft().result()
            except HungError as error:
                yield BadRecord(str(shard), str(shard), f"{shard}: {error}")
                return
            yield from items
            if len(items) < _CHUNK:
                return


def _take(source: Iterator[Item]) -> list[Item]:
    return list(islice(source, _CHUNK))


def _with_used(place: Place, used: int) -> Place:
    return Place(place.epoch, place.shard, place.record, used)
