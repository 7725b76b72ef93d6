"""Hugging Face datasets: of the hub, or a folder that `save_to_disk` wrote; listed, or read as a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlv.data.tables import GUESSED, Columns, Held, Row, bytes_column, bytes_of, hold, make_row
from vlv.errors import DataError

_PREFIX = "hf:"
_DEFAULT_SPLIT = "train"
_CHUNK = 1000


@dataclass(frozen=True, slots=True)
class HubCell:
    """The image bytes of one row of a dataset."""

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
        return bytes_of(open_hub_set(self.path)[self.row][self.column], str(self))


def is_hub_set(text: str) -> bool:
    """Whether an input names a dataset."""
    return text.startswith(_PREFIX)


def is_saved_set(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def list_hub_set(text: str, columns: Columns = GUESSED) -> Iterator[tuple[Row, HubCell]]:
    """The rows of a dataset without their images, each with the place of its image.

    Args:
        text: `hf:OWNER/NAME[:SPLIT]` or `hf:FOLDER[:SPLIT]`; the split is train by default.
        columns: What the image, caption and hash are called.

    Raises:
        DataError: `datasets` is absent, or there is no such dataset, split or column of images.
    """
    data = open_hub_set(text)
    column = _image_column(data, columns, text)
    light = data.remove_columns([name for name in data.column_names if not _is_light(data, name)])
    for start in range(0, len(data), _CHUNK):
        stop = min(start + _CHUNK, len(data))
        rows = light.select(range(start, stop)).to_list() if light.column_names else []
        for number in range(start, stop):
            values = rows[number - start] if rows else {}
            yield _row(values, text, number, columns), HubCell(text, column, number)


def stream_hub_set(
    text: str, shard: int, num_shards: int, columns: Columns = GUESSED, start: int = 0
) -> Iterator[Row]:
    """The rows of one shard of a dataset one after the other, image bytes included.

    Args:
        text: As for `list_hub_set`.
        shard: Number of the shard.
        num_shards: What `count_shards` says.
        columns: What the image, caption and hash are called.
        start: Rows of the shard to leave out.

    Raises:
        DataError: As `list_hub_set`.
    """
    data = _streamed(text).shard(num_shards, shard)
    column: str | None = None
    for number, values in enumerate(_reported(data.skip(start), text), start=start):
        if column is None:
            column = _named_image_column(values, columns, text)
        where = f"{text}, shard {shard}, row {number}"
        held = hold(values.pop(column), text, where)
        light = {name: value for name, value in values.items() if not isinstance(value, bytes)}
        yield make_row(light, where, columns, held, f"{shard:05d}-{number:08d}")


def _reported(rows: Iterable[dict[str, Any]], text: str) -> Iterator[dict[str, Any]]:
    """Rows whose errors say of which dataset they are."""
    try:
        yield from rows
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{text}: cannot be read ({error})") from error


def count_shards(text: str) -> int:
    """Of how many files a dataset is made.

    Raises:
        DataError: `datasets` is absent, or there is no such dataset or split.
    """
    return int(_streamed(text).num_shards)


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


def _undecoded(data: Any) -> Any:
    import datasets

    for name, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    return data


def _image_column(data: Any, columns: Columns, text: str) -> str:
    column = bytes_column(data.features.arrow_schema, columns, Path(text))
    if column is None:
        raise DataError(f"{text}: no column holds images; it has {', '.join(data.column_names)}")
    return column


def _named_image_column(values: dict[str, Any], columns: Columns, text: str) -> str:
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


def _row(values: dict[str, Any], text: str, number: int, columns: Columns) -> Row:
    return make_row(values, f"{text}, row {number}", columns, Held(text, b""), f"{number:08d}")
