"""Open the images of records in batches, by threads; a bad file is reported in its place, never skipped silently."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypeVar

import torch

from vlv.data.framing import DEFAULT_FRAMING, Framing, frame
from vlv.errors import ConfigError, DataError
from vlv.models.arguments import present
from vlv.models.hashing import weights_hash

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from vlv.data.records import Record
    from vlv.models.pipeline import VLVPipeline

logger = logging.getLogger(__name__)

R = TypeVar("R")
READERS = 2
"""Threads that open images."""

FIRST_AUTO, MOST_AUTO = 8, 512
"""Where an automatic batch size begins and ends."""
WORTHWHILE = 1.05
"""Gain in images per second that makes a batch of twice the size worth its memory."""


@dataclass(frozen=True)
class Opened:
    """One input file after an attempt to read it.

    Attributes:
        record: Where it came from.
        image: The upright RGB image, cropped and resized where that was asked for; None when the file is bad.
        z: Its caption embedding (Q,D), where the record is one and no image.
        size: Width and height of the upright image in the file; None when the file is bad.
        sha256: Hash of the file's bytes; None when they could not be read.
        stat: Size and modification time of the file before it was read; None inside archives.
        error: What is wrong with the file; None when it is good.
    """

    record: Record
    image: Image.Image | None = None
    z: Tensor | None = None
    size: tuple[int, int] | None = None
    sha256: str | None = None
    stat: tuple[int, int] | None = None
    error: str | None = None


def file_stat(record: Record) -> tuple[int, int] | None:
    """Size and modification time (ns) of a record's file; None inside archives, or where it is gone."""
    if isinstance(record.source, Path):
        with suppress(OSError):
            found = os.stat(record.source)  # noqa: PTH116
            return found.st_size, found.st_mtime_ns
    return None


def open_record(
    record: Record,
    size: int | None = None,
    framing: Framing = DEFAULT_FRAMING,
    *,
    embeddings: bool = False,
) -> Opened:
    """Read one record; a bad file comes back with its error.

    Args:
        record: What to read.
        size: Bring it to a square of this many pixels a side; None keeps all.
        framing: How, see `frame`.
        embeddings: Take a caption embedding for its image; otherwise it counts as a bad file.
    """
    stat, digest = file_stat(record), None
    try:
        if embeddings and record.is_embedding:
            return Opened(record, z=record.embedding())
        content = record.open()
        digest = hashlib.sha256(content).hexdigest()
        image = record.decode(content)
    except DataError as error:
        return Opened(record, sha256=digest, stat=stat, error=str(error))
    small = image if size is None else frame(image, size, framing)
    return Opened(record, small, None, image.size, digest, stat)


class Reader:
    """Opens records, images or caption embeddings, in order, by threads that work ahead of the caller.

    Args:
        records: What to read.
        size: See `open_record`.
        framing: See `open_record`.
    """

    def __init__(
        self, records: Iterable[Record], size: int | None = None, framing: Framing = DEFAULT_FRAMING
    ) -> None:
        self._records = iter(records)
        self._size, self._framing = size, framing
        self._pool = ThreadPoolExecutor(READERS)
        self._waiting: deque[Future[Opened]] = deque()

    def take(self, count: int) -> list[Opened]:
        """The next records, good and bad, none at the end; as many more are read while the caller works."""
        self._fill(count)
        batch = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        self._fill(count)
        return [future.result() for future in batch]

    def _fill(self, count: int) -> None:
        for record in islice(self._records, max(0, count - len(self._waiting))):
            self._waiting.append(
                self._pool.submit(open_record, record, self._size, self._framing, embeddings=True)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *rest: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def open_batches(
    records: Iterable[Record],
    batch_size: int,
    size: int | None = None,
    framing: Framing = DEFAULT_FRAMING,
) -> Iterator[list[Opened]]:
    """Yield the records in order, ``batch_size`` at a time, good and bad."""
    with Reader(records, size, framing) as reader:
        while batch := reader.take(batch_size):
            yield batch


def good_items(batch: Sequence[Opened]) -> list[Opened]:
    """Inputs of a batch that can be used, bad files left out."""
    return [item for item in batch if item.error is None]


def embeddings(pipe: VLVPipeline, items: Sequence[Opened]) -> Tensor:
    """Caption embeddings (B,Q,D) of inputs, whether they are images or embeddings already."""
    images = [item.image for item in items if item.image is not None]
    made = list(pipe.embed(images)) if images else []
    like, rows = (made or [torch.empty(0)])[0], iter(made)
    return torch.stack([next(rows) if item.z is None else item.z.to(like) for item in items])


def check_embeddings(pipe: VLVPipeline, records: Iterable[Record]) -> None:
    """Make sure that caption embeddings among the inputs were made by this model.

    Raises:
        DataError: Another model made one: its numbers mean something else here.
    """
    ours = None
    for record in records:
        if record.is_embedding:
            ours = ours or weights_hash(present(pipe.encoder, "encoder"))
            theirs = (record.meta or {}).get("model_hash")
            if theirs not in (None, ours):
                raise DataError(
                    f"{record.name}: its embedding was made by another model; embed the image with this one"
                )


class BatchSize:
    """How many images to process together: a fixed number, or ``auto``: doubled while that is faster.

    Either is halved when the device runs out of memory.

    Attributes:
        now: Images of the next batch.
    """

    def __init__(self, given: int | Literal["auto"]) -> None:
        self.now = FIRST_AUTO if given == "auto" else given
        self._grows = given == "auto"
        self._best = 0.0  # images per second of the size before
        self._rates: list[float] = []  # of this size

    @classmethod
    def parse(cls, text: str) -> Self:
        """A batch size as it is written on the command line.

        Raises:
            ConfigError: It is neither ``auto`` nor a number above 0.
        """
        if text == "auto":
            return cls("auto")
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(f"--batch-size is {text}; it must be auto, or a number from 1")
        return cls(int(text))

    def measured(self, count: int, seconds: float) -> None:
        """So many images took so long; the second batch of a size decides, as the first one warms up."""
        if not self._grows or count < self.now:
            return
        self._rates.append(count / max(seconds, 1e-9))
        if len(self._rates) < 2:
            return
        rate, self._rates = max(self._rates), []
        if rate < WORTHWHILE * self._best:
            self._grows, self.now = False, max(1, self.now // 2)
        elif self.now >= MOST_AUTO:
            self._grows = False
        else:
            self._best, self.now = rate, 2 * self.now

    def run(self, make: Callable[[Sequence[Opened]], list[R]], items: Sequence[Opened]) -> list[R]:
        """What ``make`` returns for the inputs, in smaller batches where they do not fit into memory."""
        try:
            return make(items) if items else []
        except torch.OutOfMemoryError:
            if len(items) == 1:
                raise
        half = len(items) // 2
        self.now, self._grows = min(self.now, half), False
        logger.warning("note: %d images do not fit into memory; going on with %d", 2 * half, half)
        torch.cuda.empty_cache()
        return self.run(make, items[:half]) + self.run(make, items[half:])
