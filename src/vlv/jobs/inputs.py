"""Records in, opened images out, batch by batch: a bad file is reported where it stood, never skipped silently."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from vlv.data.framing import DEFAULT_FRAMING, Framing, frame
from vlv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from PIL import Image

    from vlv.data.records import Record


@dataclass(frozen=True)
class Opened:
    """One input file after an attempt to read it.

    Attributes:
        record: Where it came from.
        image: The upright RGB image, cropped and resized where that was asked for; None when the file is bad.
        size: Width and height of the upright image in the file; None when the file is bad.
        sha256: Hash of the file's bytes; None when they could not be read.
        error: What is wrong with the file; None when it is good.
    """

    record: Record
    image: Image.Image | None = None
    size: tuple[int, int] | None = None
    sha256: str | None = None
    error: str | None = None


def file_name(record: Record) -> str:
    """How messages and tables name a record's file."""
    return record.name


def open_record(
    record: Record, size: int | None = None, framing: Framing = DEFAULT_FRAMING
) -> Opened:
    """Read one record; a bad file comes back with its error.

    Args:
        record: What to read.
        size: Bring it to a square of this many pixels a side; None keeps all.
        framing: How, see `frame`.
    """
    digest = None
    try:
        content = record.open()
        digest = hashlib.sha256(content).hexdigest()
        image = record.decode(content)
    except DataError as error:
        return Opened(record, sha256=digest, error=str(error))
    small = image if size is None else frame(image, size, framing)
    return Opened(record, small, image.size, digest)


def open_batches(
    records: Iterable[Record],
    batch_size: int,
    size: int | None = None,
    framing: Framing = DEFAULT_FRAMING,
) -> Iterator[list[Opened]]:
    """Yield the records in order, ``batch_size`` at a time, good and bad.

    The next batch is read by threads while the caller works on this one.
    """
    waiting: deque[list[Future[Opened]]] = deque()
    iterator = iter(records)
    with ThreadPoolExecutor(max_workers=2) as pool:
        while chunk := list(islice(iterator, batch_size)):
            waiting.append([pool.submit(open_record, record, size, framing) for record in chunk])
            if len(waiting) > 1:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]


def good_images(batch: Sequence[Opened]) -> list[Image.Image]:
    """Images of a batch, bad files left out."""
    return [item.image for item in batch if item.image is not None]
