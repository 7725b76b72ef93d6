"""Hugging Face datasets as rows with a place for each image; opened by `vlv.data.hub_sets`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlv.curation.places import Place, image_bytes
from vlv.data.hub_sets import is_hub_set, is_saved_set, open_hub_set
from vlv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["is_hub_set", "is_saved_set", "parts", "read_row", "rows"]


def parts(name: str) -> Iterator[tuple[str, int]]:
    """The splits of a dataset: a name for `rows` and `read_row`, and the number of rows.

    Args:
        name: hf:OWNER/NAME[:SPLIT] (train by default), or a saved folder (all its splits).

    Raises:
        DataError: It cannot be opened.
    """
    if is_hub_set(name):
        names = [name]
    elif (Path(name) / "dataset_dict.json").is_file():
        folders = sorted(path.name for path in Path(name).iterdir() if is_saved_set(path))
        names = [f"hf:{name}:{split}" for split in folders]
    else:
        names = [f"hf:{name}"]
    for part in names:
        yield part, len(open_hub_set(part))


def rows(name: str, start: int, stop: int) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Rows of one split: where the image lies, and the other columns."""
    data = open_hub_set(name)
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
    value = open_hub_set(place.path).select_columns([place.column])[place.first][place.column]
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
        return Path(value["path"]).read_bytes()
    return image_bytes(value, place)


def _image_column(name: str) -> str:
    import datasets

    features = open_hub_set(name).features
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    names = images or [column for column, feature in features.items() if "binary" in str(feature)]
    if not names:
        raise DataError(
            f"{name}: no column holds images; its columns are {', '.join(sorted(features))}"
        )
    return str(names[0])
