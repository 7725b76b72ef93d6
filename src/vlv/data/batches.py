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
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from vlv.data.images import DEFAULT_LIMITS, ImageLimits
from vlv.data.quarantine import BadRecord, Quarantine
from vlv.data.reader import Decoder, Order, Reader, Row
from vlv.data.records import Record
from vlv.errors import DataError

_PREFETCHED_BATCHES = 3
_STATE_VERSION = 1

Batch = dict[str, Any]  # see BatchLoader


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
        self.extra = dict(extra or {})
        self._check_arguments(num_workers)
        self.quarantine = Quarantine(
            quarantine, max_bad_share, min(min_checked, len(records)), on_bad
        )
        decoder = Decoder(
            records,
            image_size,
            limits=limits,
            need_captions=need_captions,
            keep_in_memory=keep_in_memory,
            known_bad=self.quarantine.bad,
        )
        self._reader = Reader(
            decoder,
            Order(len(records), seed if shuffle else None, epochs),
            num_workers=num_workers,
            ahead=_PREFETCHED_BATCHES * batch_size,
        )
        self._fingerprint = fingerprint(records)
        self._epoch = 0
        self._position = 0  # records of this epoch that were consumed
        self._stream = self._reader.read(self._epoch, self._position)
        self._rows: deque[Row] = deque()

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

    def _gather(self) -> tuple[list[Row], bool]:
        """Up to B sound rows, fewer at the end of the epoch; and whether it ended."""
        rows: list[Row] = []
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

    def _batch(self, rows: list[Row]) -> Batch:
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
        self._stream = self._reader.read(self._epoch, self._position)

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
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_arguments(self, num_workers: int) -> None:
        count = len(self.records)
        if self.batch_size < 1 or num_workers < 0 or self.seed < 0:
            raise ValueError(
                f"batch_size must be at least 1, num_workers and seed at least 0, not "
                f"{self.batch_size}, {num_workers}, {self.seed}"
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
