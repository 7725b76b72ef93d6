"""The reader goes on where it is, within limits; places survive a table; tables of addresses are refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.curation.files import jpeg, write_shard
from vlv.curation.inputs import PLACE, SequentialReader, image_parts, place_columns, place_of
from vlv.curation.tables import read_table, write_table
from vlv.data.hub_sets import HubCell
from vlv.data.locations import Url
from vlv.data.records import ImagePlace, Record, Span
from vlv.data.source import find_records
from vlv.data.tables import Cell
from vlv.errors import DataError, ImageError


def test_the_reader_is_guarded(tmp_path: Path) -> None:
    tar = write_shard(tmp_path / "s.tar", range(2))
    first, second = (record.source for record in find_records([tar]))
    assert isinstance(second, Span)
    with (
        SequentialReader(100) as reader,
        pytest.raises(ImageError, match="larger than the limit of 100"),
    ):
        reader.read(first)
    tar.write_bytes(tar.read_bytes()[: second.offset + 10])
    with SequentialReader(10**6) as reader:
        assert reader.read(first) == jpeg(0)
        with pytest.raises(DataError, match="shorter than when it was listed"):
            reader.read(second)
        tar.unlink()
    with SequentialReader(10**6) as reader, pytest.raises(DataError, match="cannot be read"):
        reader.read(first)


def test_cells_in_any_order(tmp_path: Path) -> None:
    data = [jpeg(seed) for seed in range(40)]
    pq.write_table(pa.table({"image": data}), tmp_path / "x.parquet", row_group_size=33)
    records = find_records([tmp_path / "x.parquet"])
    with SequentialReader(10**6) as reader:
        for number in [*range(40), 3, 35, 2]:
            assert reader.read(records[number].source) == data[number]


def test_pixels_of_a_table_become_an_image_file(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 24, 24), np.uint8)
    pq.write_table(pa.table({"image": [pixels.tobytes()]}), tmp_path / "x.parquet")
    (record,) = find_records([tmp_path / "x.parquet"])
    with SequentialReader(10**6) as reader:
        png = reader.read(record.source)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))).transpose(2, 0, 1), pixels)


def test_places_survive_a_table(tmp_path: Path) -> None:
    places: list[ImagePlace] = [
        Path("/a/b.png"),
        Path("/a/b\udcff.png"),
        Span(Path("/a/s.tar"), 512, 7),
        Span(Url("memory://a/s.tar"), 512, 7),
        Cell(Path("/a/t.parquet"), "image", 3, 5),
        HubCell("hf:owner/name:train", "image", 9),
    ]
    rows = [place_columns(Record("x", place)) for place in places]
    write_table(tmp_path / "t.parquet", PLACE, rows)
    assert [place_of(row) for row in read_table(tmp_path / "t.parquet")] == places


def test_a_table_of_addresses_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"URL": ["http://x"], "WIDTH": [1]}), tmp_path / "laion.parquet")
    with pytest.raises(DataError, match=r"no column holds or names images; .*--table"):
        image_parts([str(tmp_path / "laion.parquet")])
