"""One chunk in, one table of measurements out: every record with its values, or the reason why it is dropped.

The cheapest look comes first: the table's columns, the file's header, its pixels, a model. A
record that one of them drops is not looked at further.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from vlv.curation import rules
from vlv.curation.items import UNREADABLE, read_items
from vlv.curation.perceptual import contrast, grey_thumbnail, perceptual_hash
from vlv.curation.places import PlaceReader
from vlv.curation.rules import Columns, Drop
from vlv.curation.tables import MEASURED, write_table
from vlv.data.images import ImageLimits, load_image, read_header
from vlv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from PIL import Image

    from vlv.curation.chunks import Chunk
    from vlv.curation.items import Item
    from vlv.curation.settings import FilterConfig
    from vlv.curation.tables import Row

_TOGETHER = 16  # images that a model looks at


@dataclass(frozen=True)
class MeasureTask:
    """The work on one chunk.

    Attributes:
        chunk: What to read.
        config: The rules.
        table: The Parquet file to write, columns `MEASURED`.
    """

    chunk: Chunk
    config: FilterConfig
    table: Path


def measure(task: MeasureTask) -> int:
    """Look at every record of a chunk and write what was found; returns the number of rows.

    Raises:
        DataError: A rule needs a column that no record has.
        OutputError: The table cannot be written.
    """
    rows = list(measure_chunk(task.chunk, task.config))
    write_table(task.table, MEASURED, rows)
    return len(rows)


def measure_chunk(chunk: Chunk, config: FilterConfig) -> Iterator[Row]:
    """The rows of one chunk in order.

    Raises:
        DataError: A rule needs a column that no record has.
    """
    columns = Columns(config)
    images = 0
    with PlaceReader(config.max_bytes) as reader:
        items = read_items(chunk)
        while some := list(islice(items, _TOGETHER)):
            looks = [_Look(item, config) for item in some]
            for look in looks:
                look.at_table(columns)
                images += not look.item.fault
                look.at_file(reader)
            _ask_models(config, [look for look in looks if look.image is not None])
            yield from (look.row for look in looks)
    absent = columns.absent()
    if absent and images:
        raise DataError(rules.unknown_column(absent, columns.known, chunk.path))


class _Look:
    """One record while it is looked at.

    Attributes:
        item: The record.
        row: What is known, column to value.
        image: The pixels, where a rule wants them and nothing has dropped the record yet.
    """

    def __init__(self, item: Item, config: FilterConfig) -> None:
        self.item = item
        self.config = config
        self.image: Image.Image | None = None
        self.row: Row = {
            "id": item.id,
            "reason": item.fault,
            "detail": item.detail,
            "is_image": item.is_image,
            **item.place._asdict(),
            "caption": item.caption,
            "meta": json.dumps(item.meta, ensure_ascii=False, default=str) if item.meta else None,
            "extras": json.dumps(item.extras) if item.extras else None,
        }

    def at_table(self, columns: Columns) -> None:
        """What is known without reading the image."""
        if self.item.fault:
            return
        values = columns.read(self.item.meta)
        self.row |= values
        self.drop(rules.check_known(self.config, values))

    def at_file(self, reader: PlaceReader) -> None:
        """The bytes, the header, and where a rule wants them the pixels."""
        if self.row["reason"]:
            return
        try:
            data = reader.read(self.item.place)
            self._at_header(data)
            if not self.row["reason"] and self.config.needs_pixels:
                self._at_pixels(data)
        except DataError as error:
            self.drop(Drop(UNREADABLE, "", str(error)))

    def _at_header(self, data: bytes) -> None:
        header = read_header(data, limits=self._limits, name=self._name)
        self.row |= {
            "num_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "format": header.format,
            "width": header.width,
            "height": header.height,
            "bytes_per_pixel": len(data) / (header.width * header.height),
        }
        self.drop(rules.check_header(self.config, header, len(data)))

    def _at_pixels(self, data: bytes) -> None:
        image = load_image(data, limits=self._limits, name=self._name)
        self.row["contrast"] = contrast(image)
        self.drop(rules.check_contrast(self.config, self.row["contrast"]))
        if not self.row["reason"]:
            self.row["phash"] = perceptual_hash(grey_thumbnail(image))
            self.image = image

    def drop(self, drop: Drop | None) -> None:
        """Note the first reason."""
        if drop is not None and not self.row["reason"]:
            self.row |= drop._asdict()

    @property
    def _limits(self) -> ImageLimits:
        return ImageLimits(max_bytes=self.config.max_bytes)

    @property
    def _name(self) -> str:
        return (
            f"{self.item.place} ({self.item.id})"
            if self.item.place.kind != "file"
            else str(self.item.place)
        )


def _ask_models(config: FilterConfig, looks: Sequence[_Look]) -> None:
    """The rules for which a model has to look."""
    for name, rule in config.scores.items():
        looks = [look for look in looks if not look.row["reason"]]
        if rule.model is None or not looks:
            continue
        from vlv.curation.vision import classifier

        model = classifier(rule.model, rule.revision, rule.label or "")
        squares = [model.prepare(look.image) for look in looks if look.image is not None]
        for look, score in zip(looks, model.scores(squares), strict=True):
            look.row[name] = score
            look.drop(rules.check_score(config, name, score))
    looks = [look for look in looks if not look.row["reason"]]
    alike = config.embedding_duplicates
    if alike is not None and alike.backbone is not None and looks:
        from vlv.curation.vision import backbone

        encoder = backbone(alike.backbone, alike.revision)
        squares = [encoder.prepare(look.image) for look in looks if look.image is not None]
        for look, vector in zip(looks, encoder.embed(squares), strict=True):
            look.row["embedding"] = vector.tolist()


def count_reasons(rows: Sequence[dict[str, Any]]) -> Counter[str]:
    """How many images each reason took."""
    return Counter(row["reason"] for row in rows if row["is_image"])
