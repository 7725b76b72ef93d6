"""Hugging Face datasets: of the hub, or a folder that `save_to_disk` wrote; listed, or read as a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from vlv.data.parts import Detail, Part
from vlv.data.records import GUESSED, Columns, Entry
from vlv.data.tables import RECORDS, bytes_column, hold, image_bytes, make_entry
from vlv.errors import DataError
from vlv.storage import Json

_PREFIX = "hf:"
_DEFAULT_SPLIT = "train"


@dataclass(frozen=True, slots=True)
class HubCell:
    """The image bytes of one row of a dataset."""

    raw_pixels: ClassVar[bool] = True

    path: str  # what was named: hf:OWNER/NAME:SPLIT
    column: str
    row: int

    def __str__(self) -> str:
        return f"{self.path}, row {self.row}"

    def read(self) -> bytes:
        """The bytes of the image.

        Raises:
            DataError: The cell holds none.
        """
        data = open_hub_set(self.path).select_columns([self.column])
        return image_bytes(data[self.row][self.column], str(self), *folders_of(self.path))


def is_hub_set(text: str) -> bool:
    """Whether an input names a dataset."""
    return text.startswith(_PREFIX)


def is_saved_set(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def splits_of(folder: Path) -> list[str]:
    """The datasets in a folder that `save_to_disk` wrote: itself, or its splits."""
    if not (folder / "dataset_dict.json").is_file():
        return [f"{_PREFIX}{folder}"]
    names = sorted(path.name for path in folder.iterdir() if is_saved_set(path))
    return [f"{_PREFIX}{folder}:{name}" for name in names]


@dataclass(frozen=True)
class HubRows(Part):
    """Some rows of a dataset, to be listed.

    Attributes:
        start: First row.
        stop: The one after the last; None goes on to the end.
    """

    source: str
    start: int = 0
    stop: int | None = None

    def split(self, size: int | None = None) -> Iterator[HubRows]:
        """Parts of `size` rows; `RECORDS` by default.

        Raises:
            DataError: `datasets` is absent, or there is no such dataset or split.
        """
        count, size = len(open_hub_set(self.source)), size or RECORDS
        for start in range(0, count, size):
            yield replace(self, start=start, stop=min(start + size, count))

    def scan(self, detail: Detail) -> Iterator[Entry]:
        """The rows without their images, each with the place of its image.

        Raises:
            DataError: As `split`, or there is no column of images.
        """
        data = open_hub_set(self.source)
        column = _image_column(data, self.columns, self.source)
        heavy = [name for name in data.column_names if not _is_light(data, name)]
        light = data.remove_columns(heavy)
        end = len(data) if self.stop is None else self.stop
        for start in range(self.start, end, RECORDS):
            stop = min(start + RECORDS, end)
            rows = light.select(range(start, stop)).to_list() if light.column_names else []
            for number in range(start, stop):
                values = rows[number - start] if rows else {}
                cell = HubCell(self.source, column, number)
                yield make_entry(values, str(cell), self.columns, cell, f"{number:08d}")


@dataclass(frozen=True)
class HubShard(Part):
    """One of the files that a dataset is made of, to be read as a stream.

    Attributes:
        number: Which one.
        num_shards: How many there are.
    """

    source: str
    number: int = 0
    num_shards: int = 1

    def __str__(self) -> str:
        return self.source if self.num_shards == 1 else f"{self.source}#{self.number}"

    def stream(self, start: int) -> Iterator[Entry]:
        """The rows one after the other, image bytes included.

        Raises:
            DataError: `datasets` is absent, the dataset cannot be read, or it has no column of images.
        """
        data = _streamed(self.source).shard(self.num_shards, self.number)
        column: str | None = None
        for number, values in enumerate(_reported(data.skip(start), self.source), start=start):
            if column is None:
                column = _named_image_column(values, self.columns, self.source)
            where = f"{self.source}, shard {self.number}, row {number}"
            image = hold(values.pop(column), self.source, where, *folders_of(self.source))
            light = {name: value for name, value in values.items() if not isinstance(value, bytes)}
            key = f"{self.number:05d}-{number:08d}"
            entry = make_entry(light, where, self.columns, image, key)
            yield replace(entry, id=f"{self.source}/{entry.id}")


def shards_of(text: str, columns: Columns = GUESSED) -> list[HubShard]:
    """The files that a dataset is made of.

    Raises:
        DataError: `datasets` is absent, or there is no such dataset or split.
    """
    count = int(_streamed(text).num_shards)
    return [HubShard(text, columns, number, count) for number in range(count)]


def _reported(rows: Iterable[Json], text: str) -> Iterator[Json]:
    """Rows whose errors say of which dataset they are."""
    try:
        yield from rows
    except Exception as error:  # of any of the libraries below `datasets`
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{text}: cannot be read ({reason})") from error


@lru_cache(maxsize=4)
def open_hub_set(text: str) -> Any:
    """A dataset with random access, its images left as bytes.

    Raises:
        DataError: `datasets` is absent, or there is no such dataset or split.
    """
    return _undecoded(_load(text, streaming=False))


@lru_cache(maxsize=4)
def _streamed(text: str) -> Any:
    data = _load(text, streaming=True)
    if hasattr(data, "to_iterable_dataset"):  # a folder of save_to_disk
        data = data.to_iterable_dataset(num_shards=max(1, len(data.cache_files)))
    return _undecoded(data)


def _load(text: str, *, streaming: bool) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{text}: this needs datasets; pip install 'vlv[data]'") from error
    name, split = _name_and_split(text)
    try:
        if not Path(name).exists():
            return datasets.load_dataset(name, split=split or _DEFAULT_SPLIT, streaming=streaming)
        data = datasets.load_from_disk(name)
        return data[split or _DEFAULT_SPLIT] if isinstance(data, datasets.DatasetDict) else data
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{text}: the dataset cannot be opened ({reason})") from error


def _name_and_split(text: str) -> tuple[str, str]:
    name, _, split = text.removeprefix(_PREFIX).rpartition(":")
    return (name, split) if name else (split, "")


@lru_cache(maxsize=4)
def folders_of(text: str) -> tuple[Path, str]:
    """The folders in which the files may lie that a dataset names: its own, and where `datasets` keeps downloads."""
    import datasets

    folder, downloads = Path(_name_and_split(text)[0]), datasets.config.HF_CACHE_HOME
    return folder if folder.is_dir() else Path(downloads), str(downloads)


def _undecoded(data: Any) -> Any:
    import datasets

    for name, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    return data


def _image_column(data: Any, columns: Columns, text: str) -> str:
    import datasets

    column = bytes_column(data.features.arrow_schema, columns, text)
    images = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    heavy = [name for name in data.column_names if not _is_light(data, name)]
    found = column or next(iter([*images, *heavy]), None)
    if found is None:
        raise DataError(f"{text}: no column holds images; it has {', '.join(data.column_names)}")
    return found


def _named_image_column(values: Json, columns: Columns, text: str) -> str:
    names = [
        name
        for name, value in values.items()
        if isinstance(value, bytes) or (isinstance(value, dict) and "bytes" in value)
    ]
    column = columns.image or next((name for name in ("image", *names) if name in names), None)
    if column is None or column not in values:
        raise DataError(f"{text}: no column holds images; it has {', '.join(values)}")
    return column


def _is_light(data: Any, name: str) -> bool:
    return "binary" not in str(data.features.arrow_schema.field(name).type)
