"""Files that `vlv embed` wrote: caption embeddings in the place of images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlv.data.foreign import open_regular, parse_object, read_file, unreadable
from vlv.data.parts import Detail, Part
from vlv.data.records import EmbeddingRow, Entry, Record
from vlv.errors import DataError
from vlv.storage import Json

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class EmbeddingFile(Part):
    """The rows of a file of embeddings, under the ids of their images."""

    source: Path

    def scan(self, detail: Detail) -> Iterator[Entry]:
        """The rows; what is known of each is its file name, its hash, and the hash of the weights that made it.

        Raises:
            DataError: The file is damaged, or was not written by `vlv embed`.
        """
        files = read_files(self.source)
        known = {"model_hash": hash} if (hash := _model_hash(self.source)) else {}
        for row, file in enumerate(files):
            meta = {**{name: value for name, value in file.items() if name != "id"}, **known}
            yield Record(
                str(file["id"]),
                EmbeddingRow(self.source, row),
                meta_json=json.dumps(meta, ensure_ascii=False),
            )


def read_files(path: Path) -> list[Json]:
    """What a file of embeddings says of the image of each row: id, file_name, sha256.

    Raises:
        DataError: The file is damaged, or was not written by `vlv embed`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(path).close()
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get("vlv")
            shape = file.get_slice("z").get_shape() if "z" in file.keys() else []  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error
    files = parse_object(header, path).get("files") if header is not None else None
    if not isinstance(files, list) or len(shape) != 3 or shape[0] != len(files):
        raise DataError(f"{path}: these are no embeddings that vlv embed wrote")
    return files


def _model_hash(path: Path) -> str | None:
    """The hash of the encoder's weights, which stands in the JSON file beside the embeddings."""
    try:
        text = read_file(path.with_suffix(".json")).decode()
        return str(parse_object(text, path)["model_hash"])
    except (DataError, UnicodeDecodeError, KeyError):
        return None
