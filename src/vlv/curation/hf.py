"""Hugging Face datasets, saved in a folder or by their id on the hub, as rows with the bytes of an image."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlv.curation.places import Place, image_bytes
from vlv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "hf:"
"""Of the id of a dataset on the hub: hf:OWNER/NAME, or hf:OWNER/NAME@SPLIT."""


def is_saved(folder: Path) -> bool:
    """Whether a folder is what `save_to_disk` writes."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def parts(name: str) -> Iterator[tuple[str, int]]:
    """The splits of a dataset: a name for `rows` and `read_row`, and the number of rows.

    Raises:
        DataError: It cannot be opened.
    """
    folder = Path(name)
    if not name.startswith(PREFIX) and (folder / "dataset_dict.json").is_file():
        names = [str(path) for path in sorted(folder.iterdir()) if (path / "state.json").is_file()]
    elif name.startswith(PREFIX) and "@" not in name:
        names = [f"{name}@{split}" for split in _splits(name)]
    else:
        names = [name]
    for part in names:
        yield part, len(_open(part))


def rows(name: str, start: int, stop: int) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Rows of one split: where the image lies, and the other columns."""
    data = _open(name)
    column = _image_column(name)
    light = data.remove_columns([column])
    for number in range(start, stop):
        values = light[number] if light.column_names else {}
        yield Place("row", name, number, 0, column), values


def read_row(place: Place) -> bytes:
    """The bytes of the image in one row.

    Raises:
        DataError: The row holds none.
    """
    value = _open(place.path).select_columns([place.column])[place.first][place.column]
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
        return Path(value["path"]).read_bytes()
    return image_bytes(value, place)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            'Hugging Face datasets need the package datasets; pip install "vlv[data]"'
        ) from None
    return datasets


def _splits(name: str) -> list[str]:
    library = _datasets()
    try:
        return sorted(library.get_dataset_split_names(name.removeprefix(PREFIX)))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name}: the dataset cannot be had ({_first_line(error)}); check its name and the network"
        ) from error


@lru_cache(maxsize=2)
def _open(name: str) -> Any:
    """One split, its images as bytes that nobody has decoded."""
    library = _datasets()
    try:
        if name.startswith(PREFIX):
            repo, _, split = name.removeprefix(PREFIX).partition("@")
            data = library.load_dataset(repo, split=split)
        else:
            data = library.load_from_disk(name)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: the dataset cannot be opened ({_first_line(error)})") from error
    for column, feature in data.features.items():
        if isinstance(feature, library.Image):
            data = data.cast_column(column, library.Image(decode=False))
    return data


def _image_column(name: str) -> str:
    library, features = _datasets(), _open(name).features
    images = [column for column, feature in features.items() if isinstance(feature, library.Image)]
    names = images or [column for column, feature in features.items() if "binary" in str(feature)]
    if not names:
        raise DataError(
            f"{name}: no column holds images; its columns are {', '.join(sorted(features))}"
        )
    return str(names[0])


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
