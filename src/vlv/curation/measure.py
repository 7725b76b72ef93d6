"""One part in, one table of measurements out: every record with its values, or the reason why it is dropped.

The cheapest look comes first: the table's columns, the file's header, its pixels, a model. A
record that one of them drops is not looked at further.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from vlv.curation import rules
from vlv.curation.inputs import SequentialReader, place_columns, shown
from vlv.curation.perceptual import contrast, grey_thumbnail, perceptual_hash
from vlv.curation.rules import Columns, Drop
from vlv.curation.settings import FilterConfig
from vlv.curation.tables import MEASURED, Row, write_table
from vlv.data.images import ImageLimits, load_image, read_header
from vlv.data.parts import Part, metadata
from vlv.data.records import UNREADABLE, Entry, Record
from vlv.errors import DataError

_TOGETHER = 16  # images that a model looks at


@dataclass(frozen=True)
class MeasureTask:
    """The work on one part of the inputs.

    Attributes:
        part: What to read.
        config: The rules.
        table: The Parquet file to write, columns `MEASURED`.
    """

    part: Part
    config: FilterConfig
    table: Path


def measure(task: MeasureTask) -> int:
    """Look at every record of a part and write what was found; returns the number of rows.

    Raises:
        DataError: A rule needs a column that no record has.
        OutputError: The table cannot be written.
    """
    rows = list(measure_part(task.part, task.config))
    write_table(task.table, MEASURED, rows)
    return len(rows)


def measure_part(part: Part, config: FilterConfig) -> Iterator[Row]:
    """The rows of one part in order.

    Raises:
        DataError: A rule needs a column that no record has.
    """
    columns = Columns(config)
    images = 0
    with SequentialReader(config.max_bytes) as reader:
        entries = part.entries("all")
        while some := list(islice(entries, _TOGETHER)):
            looks = [_Look(entry, config) for entry in some]
            for look in looks:
                look.at_table(columns)
                images += isinstance(look.entry, Record)
                look.at_file(reader)
            _ask_models(config, [look for look in looks if look.image is not None])
            yield from (look.row for look in looks)
    absent = columns.absent()
    if absent and images:
        raise DataError(rules.unknown_column(absent, columns.known, str(part)))


class _Look:
    """One record while it is looked at.

    Attributes:
        entry: The record, or what stands in its place.
        row: What is known, column to value.
        image: The pixels, where a rule wants them and nothing has dropped the record yet.
    """

    def __init__(self, entry: Entry, config: FilterConfig) -> None:
        self.entry = entry
        self.config = config
        self.image: Image.Image | None = None
        self.row: Row = {"id": entry.id, **place_columns(entry)}
        if isinstance(entry, Record):
            self._meta = metadata(entry.meta_json, entry.name)
            extras = {s: (span.offset, span.size) for s, span in (entry.extras or {}).items()}
            self.row |= {
                "reason": "",
                "detail": "",
                "is_image": True,
                "caption": entry.caption,
                "meta": json.dumps(self._meta, ensure_ascii=False) if self._meta else None,
                "extras": json.dumps(extras) if extras else None,
            }
        else:
            bad = {"reason": entry.kind, "detail": entry.reason, "is_image": not entry.is_file}
            self.row |= bad

    def at_table(self, columns: Columns) -> None:
        """What is known without reading the image."""
        if not isinstance(self.entry, Record):
            return
        values = columns.read(self._meta)
        self.row |= values
        self.drop(rules.check_known(self.config, values))

    def at_file(self, reader: SequentialReader) -> None:
        """The bytes, the header, and where a rule wants them the pixels."""
        if self.row["reason"] or not isinstance(self.entry, Record):
            return
        try:
            data = reader.read(self.entry.source)
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
        assert isinstance(self.entry, Record)
        place = shown(self.entry.source)
        return place if self.row["kind"] == "file" else f"{place} ({self.entry.id})"


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
    _ask_judge(config, [look for look in looks if not look.row["reason"]])
    looks = [look for look in looks if not look.row["reason"]]
    alike = config.embedding_duplicates
    if alike is not None and alike.backbone is not None and looks:
        from vlv.curation.vision import backbone

        encoder = backbone(alike.backbone, alike.revision)
        squares = [encoder.prepare(look.image) for look in looks if look.image is not None]
        for look, vector in zip(looks, encoder.embed(squares), strict=True):
            look.row["embedding"] = vector.tolist()


def _ask_judge(config: FilterConfig, looks: Sequence[_Look]) -> None:
    """The rule on captions."""
    if config.caption_score is None or not looks:
        return
    from vlv.curation.captions import recovered_shares

    told = [look for look in looks if (look.row["caption"] or "").strip()]
    images = [look.image for look in told if look.image is not None]
    captions = [look.row["caption"] for look in told]
    scores = recovered_shares(config.caption_score, images, captions) if told else []
    for look, score in zip(told, scores, strict=True):
        look.row[rules.CAPTION] = score
    for look in looks:
        look.drop(rules.check_caption(config, look.row.get(rules.CAPTION)))
