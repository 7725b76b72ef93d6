"""Shards that are read one after the other: their records, in order, without a list of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from vlv.data.hub_sets import count_shards, stream_hub_set
from vlv.data.locations import Location, expand_lists, is_remote
from vlv.data.quarantine import BadRecord
from vlv.data.records import Record, expand, record_of_row, record_of_sample
from vlv.data.tables import GUESSED, Columns, stream_parquet
from vlv.data.tar_stream import stream_tar
from vlv.errors import DataError

_STREAMED = (".tar", ".parquet")
_LISTED_BYTES = 2**39  # half a terabyte of shards: about 10 million pictures

Item = Record | BadRecord


@dataclass(frozen=True, slots=True)
class Shard:
    """One .tar or .parquet file, or one file of a Hugging Face dataset.

    Attributes:
        source: Path, URL, or the dataset.
        columns: What the image, its caption and its hash are called.
        place: Of a dataset: number of this shard, and how many there are.
    """

    source: Location | str
    columns: Columns = GUESSED
    place: tuple[int, int] = (0, 1)

    def __str__(self) -> str:
        return f"{self.source}" if self.place[1] == 1 else f"{self.source}#{self.place[0]}"

    @property
    def name(self) -> str:
        """The last part of its path: what tells it from other shards wherever the data lie."""
        return str(self).rstrip("/").rpartition("/")[2]

    def read(self, start: int = 0) -> Iterator[Item]:
        """Its records in order, their image bytes in memory; what is wrong with one is told in its place.

        A shard that is damaged ends with a bad record in the name of the shard.

        Args:
            start: Records at the beginning to leave out.
        """
        try:
            if isinstance(self.source, str):
                for row in stream_hub_set(self.source, *self.place, self.columns, start):
                    yield record_of_row(row, Path(), f"{self.source}/")
            elif self.source.suffix.lower() == ".tar":
                yield from self._read_tar(self.source, start)
            else:
                for row in stream_parquet(self.source, self.columns, start):
                    yield record_of_row(row, self.source, f"{self.source}/")
        except DataError as error:
            yield BadRecord(str(self), str(self), str(error))

    def _read_tar(self, path: Location, start: int) -> Iterator[Item]:
        for sample in islice(stream_tar(path, start), start, None):
            try:
                yield record_of_sample(sample, path, self.columns)
            except DataError as error:
                yield BadRecord(f"{path}/{sample.key}", str(path), str(error))


def list_shards(
    inputs: Sequence[str | os.PathLike[str]], columns: Columns = GUESSED
) -> list[Shard]:
    """The shards of inputs, in order; folders give the `.tar` files below them, and `.parquet` where there are none.

    Args:
        inputs: As for `find_records`.
        columns: What the image, its caption and its hash are called.

    Raises:
        DataError: An input is missing, or cannot be streamed.
    """
    shards: list[Shard] = []
    for text in inputs:
        for _, place in expand(os.fspath(text)):
            if isinstance(place, str):
                count = count_shards(place)
                shards += [Shard(place, columns, (number, count)) for number in range(count)]
            elif isinstance(place, Path) and place.is_dir():
                shards += [Shard(path, columns) for path in _shards_in(place)]
            elif place.suffix.lower() in _STREAMED:
                shards.append(Shard(place, columns))
            else:
                raise DataError(
                    f"{place}: only .tar and .parquet files and Hugging Face datasets are streamed; "
                    "set data.streaming to false, or pack the images into shards"
                )
    if not shards:
        raise DataError("no shard was given to stream; name .tar or .parquet files")
    return shards


def stream_records(
    inputs: Sequence[str | os.PathLike[str]], columns: Columns = GUESSED
) -> Iterator[Item]:
    """The records of shards one after the other, in memory one at a time; bad ones as `BadRecord`.

    Raises:
        DataError: As `list_shards`.
    """
    for shard in list_shards(inputs, columns):
        yield from shard.read()


def must_stream(inputs: Sequence[str]) -> bool:
    """Whether an input is remote, or so large (10 million records or so) that it should not be listed."""
    return any(is_remote(part) for text in inputs for part in expand_lists(text)) or (
        sum(_shard_bytes(text) for text in inputs) > _LISTED_BYTES
    )


def _shard_bytes(text: str) -> int:
    files = (place for _, place in expand(text) if isinstance(place, Path))
    shards = (
        path for place in files for path in (_shards_in(place) if place.is_dir() else [place])
    )
    return sum(path.stat().st_size for path in shards if path.suffix.lower() in _STREAMED)


def _shards_in(folder: Path) -> list[Path]:
    """The shards below a folder: no hidden files and folders, such as caches, and no tables beside tars.

    Those are indexes, as `vlv data filter`, `vlv data pack` and img2dataset write them.
    """
    found = (path for path in folder.rglob("*") if path.suffix.lower() in _STREAMED)
    shown = (p for p in found if not any(n.startswith(".") for n in p.relative_to(folder).parts))
    shards = sorted(path for path in shown if path.is_file())
    with_tars = {path.parent for path in shards if path.suffix.lower() == ".tar"}
    return [p for p in shards if p.suffix.lower() == ".tar" or p.parent not in with_tars]
