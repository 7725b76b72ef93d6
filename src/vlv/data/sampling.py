"""In which order records are read: a sequence for each partition of the data, with positions to resume from.

The rows of every global batch are divided among *partitions*. A partition reads records of its own, at its own pace:
where one is bad, its next one takes the place, and no other partition (or rank) is affected. So a row depends on the seed,
the number of partitions and the bad records of its partition, but not on the number of ranks or workers.

Listed records: each row of the global batch is a partition. In epoch e partition i reads the places i, i + G, i + 2 G ...
of a permutation drawn from (seed, e). Its position is the number of records that it has read.

Shards: those of an epoch, in an order drawn from (seed, epoch), are dealt to the partitions. A partition reads its shards
one after the other in *blocks* of some records, which are shuffled by (seed, epoch, and where the block begins). Its
position is four numbers: epoch, shard and record at which the block begins, and how much of the block was used. To resume
is to read one block again, and for tars what lies before it in its shard.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vlv.data.decoding import Decoded, Decoder, Pending
from vlv.data.parts import Part
from vlv.data.records import BadRecord, Entry, Record
from vlv.data.workers import HungError, Pool, Task
from vlv.errors import DataError
from vlv.storage import Json

MAX_EMPTY_EPOCHS = 64
"""Where shards are few, a partition may get nothing of them now and then."""
_CHUNK = 16  # records that are read at a time

Position = tuple[int, ...]
Sample = tuple[int, Entry, Position]
"""Index among listed records (-1 in shards), record, and the position after it."""


class Sampler(Protocol):
    """The order of the records of every partition."""

    num_partitions: int
    start: Position

    def samples(self, partition: int, position: Position) -> Generator[Sample]:
        """The records of a partition from a position on, without end."""

    def epoch_of(self, position: Position) -> int:
        """The epoch in which a position lies."""

    def usual_position(self, num_batches: int) -> Position | None:
        """Where a partition stands after that many batches if none of its records was bad; None if unknown."""

    def identity(self) -> Json:
        """What must agree for a saved position to mean the same records."""


class Partition:
    """The decoded records of one partition, decoded ahead.

    Args:
        number: Number of the partition.
        sampler: The order of its records.
        decoder: Decodes them.

    Attributes:
        position: After the last record that was handed out.
    """

    def __init__(self, number: int, sampler: Sampler, decoder: Decoder) -> None:
        self.number = number
        self._sampler, self._decoder = sampler, decoder
        self._pending: deque[tuple[Pending, Position]] = deque()
        self.go_to(sampler.start)

    def go_to(self, position: Position) -> None:
        """Go on from a position."""
        self._pending.clear()
        self.position = position
        self._samples = self._sampler.samples(self.number, position)

    def prefetch(self, depth: int) -> None:
        """Have so many records decoding or decoded."""
        while len(self._pending) < depth:
            index, item, after = next(self._samples)
            self._pending.append((self._decoder.submit(index, item), after))

    def next(self) -> Decoded:
        """The next record, good or bad."""
        self.prefetch(1)
        pending, self.position = self._pending.popleft()
        return pending.result()

    def close(self) -> None:
        """Stop the thread that reads, if there is one."""
        self._pending.clear()
        self._samples.close()


class ListSampler:
    """The order of records that are listed; the same for any number of ranks.

    Args:
        records: N records.
        num_partitions: G, the rows of a global batch.
        seed: With the epoch, it decides the permutation; None keeps the order of the list.
    """

    start: Position = (0,)

    def __init__(self, records: Sequence[Record], num_partitions: int, seed: int | None) -> None:
        self.records, self.num_partitions, self.seed = records, num_partitions, seed
        self._per_epoch = len(records) // num_partitions
        self._epochs: dict[int, NDArray[np.int64]] = {}
        self._fingerprint = fingerprint(record.id for record in records)

    def samples(self, partition: int, position: Position) -> Generator[Sample]:
        """The records of a partition from a position on, without end."""
        for number in count(position[0]):
            epoch, row = divmod(number, self._per_epoch)
            index = int(self._permutation(epoch)[row * self.num_partitions + partition])
            yield index, self.records[index], (number + 1,)

    def epoch_of(self, position: Position) -> int:
        """The epoch in which a position lies."""
        return position[0] // self._per_epoch

    def usual_position(self, num_batches: int) -> Position:
        """Where a partition stands after that many batches if none of its records was bad."""
        return (num_batches,)

    def identity(self) -> Json:
        """What must agree for a saved position to mean the same records."""
        return {"num_records": len(self.records), "fingerprint": self._fingerprint}

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """The order of an epoch, (N); the partitions may be in three epochs at a time."""
        if epoch not in self._epochs:
            order = np.arange(len(self.records))
            if self.seed is not None:
                order = np.random.default_rng([self.seed, epoch]).permutation(len(self.records))
            while len(self._epochs) > 2:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = order
        return self._epochs[epoch]


class ShardSampler:
    """The order of records that are streamed from shards; memory does not depend on their number.

    Args:
        shards: All of them, the same for every rank.
        num_partitions: Number of partitions that the shards are dealt to.
        seed: With the epoch, it decides the order; None keeps that of the shards and their records.
        buffer: Records of a block.
        reads_ahead: Whether each partition reads by a thread of its own.
        timeout_seconds: A shard that takes longer to give some records is bad.
    """

    start: Position = (0, 0, 0, 0)

    def __init__(
        self,
        shards: Sequence[Part],
        num_partitions: int,
        seed: int | None,
        buffer: int,
        *,
        reads_ahead: bool = False,
        timeout_seconds: float | None = None,
    ) -> None:
        self.shards, self.num_partitions, self.seed = tuple(shards), num_partitions, seed
        self.buffer = buffer
        self._reads_ahead, self._timeout_seconds = reads_ahead, timeout_seconds

    def samples(self, partition: int, position: Position) -> Generator[Sample]:
        """The records of a partition from a position on, without end.

        Raises:
            DataError: Many epochs in a row held no records for it.
        """
        epoch, shard, record, used = position
        num_empty = 0
        pool = Pool(1 if self._reads_ahead else 0, self._timeout_seconds)
        try:
            while num_empty < MAX_EMPTY_EPOCHS:
                items = self._items(self.shards_of(epoch, partition), shard, record, pool)
                num_empty += 1
                while block := list(islice(items, self.buffer)):
                    num_empty = 0
                    begin, (_, shard, record) = (epoch, shard, record), block[-1]
                    order = self._order(*begin, partition, len(block))
                    for place in range(used, len(block)):
                        is_last = place + 1 == len(block)
                        after = (epoch, shard, record, 0) if is_last else (*begin, place + 1)
                        yield -1, block[order[place]][0], after
                    used = 0
                    block.clear()  # before the next one is read
                epoch, shard, record = epoch + 1, 0, 0
        finally:
            pool.close()
        raise DataError(f"the {len(self.shards)} shards hold no records for partition {partition}")

    def shards_of(self, epoch: int, partition: int) -> list[tuple[Part, int, int]]:
        """Shards in order, each with the part of it (number, of how many) that the partition reads.

        Where there are fewer shards than partitions, several of these read a shard, and each takes every n-th record.
        """
        num_parts = -(-self.num_partitions // len(self.shards))
        units = [(shard, part, num_parts) for part in range(num_parts) for shard in self.shards]
        order = np.arange(len(units))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(units))
        return [units[i] for i in order[partition :: self.num_partitions]]

    def epoch_of(self, position: Position) -> int:
        """The epoch in which a position lies."""
        return position[0]

    def usual_position(self, num_batches: int) -> None:
        """Unknown: it depends on the sizes of the shards."""

    def identity(self) -> Json:
        """What must agree for a saved position to mean the same records."""
        return {
            "num_shards": len(self.shards),
            "fingerprint": fingerprint(shard.name for shard in self.shards),
            "buffer": self.buffer,
            "num_partitions": self.num_partitions,
        }

    def _order(
        self, epoch: int, shard: int, record: int, partition: int, count: int
    ) -> Sequence[int]:
        """The order of the records of the block that begins there."""
        if self.seed is None:
            return range(count)
        seed = [self.seed, epoch, shard, record, partition]
        return [int(i) for i in np.random.default_rng(seed).permutation(count)]

    def _items(
        self, shards: Sequence[tuple[Part, int, int]], first: int, record: int, pool: Pool
    ) -> Iterator[tuple[Entry, int, int]]:
        """Items from a record of a shard on, each with the shard and record that come next."""
        for number in range(first, len(shards)):
            shard, part, num_parts = shards[number]
            for item in self._read(shard, record, pool):
                record += 1
                if (record - 1) % num_parts == part:
                    yield item, number, record
            record = 0

    def _read(self, shard: Part, start: int, pool: Pool) -> Iterator[Entry]:
        """The items of a shard, read ahead by the thread up to a block."""
        source = shard.read(start)
        num_ahead = max(1, self.buffer // _CHUNK) if self._reads_ahead else 0
        tasks: deque[Task[list[Entry]]] = deque()
        while True:
            while len(tasks) <= num_ahead:
                tasks.append(pool.submit(partial(_take, source)))
            try:
                items = tasks.popleft().result()
            except HungError as error:
                yield BadRecord(str(shard), str(shard), f"{shard}: {error}")
                return
            yield from items
            if len(items) < _CHUNK:
                return


def _take(source: Iterator[Entry]) -> list[Entry]:
    return list(islice(source, _CHUNK))


def fingerprint(names: Iterable[str]) -> str:
    """A hash of names in their order: another data set has another one."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0".encode())
    return digest.hexdigest()
