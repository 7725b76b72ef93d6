"""Parquet files are read within limits of memory, whatever their footers and pages claim."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.memory import IS_MEASURED, peak_growth
from vlv.curation.settings import FilterConfig
from vlv.curation.table_filter import TableTask, filter_table
from vlv.data import parquet, parquet_costs
from vlv.data.parquet import Cells, Parquet, cells_of
from vlv.data.parquet_costs import largest_page, read_footer
from vlv.data.records import BadRecord, Columns, Record
from vlv.data.source import Source, find_records
from vlv.data.tables import ParquetRows
from vlv.errors import DataError

MANY = 1000
COPIES = 40


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    limit = 2**16
    monkeypatch.setattr(parquet_costs, "MAX_BYTES", limit)
    monkeypatch.setattr(parquet, "MAX_BYTES", limit)
    return limit


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_pages_are_measured_by_their_headers(
    tmp_path: Path, version: str, dictionary: bool
) -> None:
    images = [noise(1000 * n, n) for n in range(1, 30)]
    cells = [{"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(images)]
    lists = [["a", "b"]] * len(images)
    options = {"data_page_version": version, "use_dictionary": dictionary, "row_group_size": 20}
    path = write(tmp_path / "x.parquet", {"image": cells, "a.b": lists}, **options)
    groups, lists = read_footer(path), [False, False, True]
    metadata = pq.read_metadata(path)
    for number, group in enumerate(groups):
        for column, chunk in enumerate(group):
            known = metadata.row_group(number).column(column)
            start = known.dictionary_page_offset or known.data_page_offset
            assert (chunk.name, chunk.stored) == (known.path_in_schema, known.total_compressed_size)
            assert chunk.start == start
    first = sum(len(data) + 4 for data in images[:20])
    image = largest_page(path, groups[0], ["image"], lists)
    assert 0 <= image - first < 100
    assert largest_page(path, groups[0], ["image", "a.b"], lists) == image
    assert 0 < largest_page(path, groups[1], ["a.b"], lists) < 250


def test_a_page_that_is_only_large_when_it_is_unpacked_is_refused(
    tmp_path: Path, small_limit: int
) -> None:
    bomb = write(tmp_path / "bomb.parquet", {"jpg": [bytes(4 * small_limit)]}, compression="zstd")
    honest = write(tmp_path / "honest.parquet", {"jpg": [noise(4 * small_limit)]})
    assert bomb.stat().st_size < 2000
    (listed,), (streamed,) = find_records([honest]), Source([honest]).stream()
    assert isinstance(streamed, Record)
    assert listed.source.read() == streamed.source.read() == noise(4 * small_limit)  # type: ignore[union-attr]
    reason = (
        r"bomb.parquet: cannot be read as Parquet \(jpg has a page of 262148 bytes, above the limit"
    )
    (listed,), (refused,) = find_records([bomb]), Source([bomb]).stream()
    with pytest.raises(DataError, match=reason):
        listed.open()
    assert isinstance(refused, BadRecord)
    assert re.search(reason, refused.reason)


@pytest.mark.slow
@pytest.mark.skipif(not IS_MEASURED, reason="the system does not say how much memory is used")
def test_one_large_cell_many_times_is_never_there_many_times(tmp_path: Path) -> None:
    """8 MB on the disk that stand for 320."""
    path = write(tmp_path / "x.parquet", {"jpg": [noise(2**23)] * COPIES})
    assert path.stat().st_size < 2**24
    with peak_growth() as growth:
        streamed = sum(len(r.source.read()) for r in Source([path]).stream())  # type: ignore[union-attr]
        records = find_records([path])
        some = [len(record.source.read()) for record in records[::17]]
        del records
    assert (streamed, set(some)) == (COPIES * 2**23, {2**23})
    assert growth[0] < 300 * 2**20


def test_texts_that_are_only_large_when_they_are_unpacked_are_refused(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(MANY)]
    ordinary = {"file_name": names, "caption": ["a picture of a cat on a mat"] * MANY}
    assert len(find_records([write(tmp_path / "y.parquet", ordinary)])) == MANY
    bomb = write(tmp_path / "x.parquet", {"file_name": names, "caption": ["a" * 10**5] * MANY})
    with pytest.raises(DataError, match="the texts of row group 0 are too large"):
        find_records([bomb])


def test_a_file_that_claims_more_than_it_has_bytes_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"file_name": ["a.png"] * 20_000})
    with pytest.raises(DataError, match=r"it claims 20000 rows, more than \d+ bytes can hold"):
        find_records([path])
    data = write(tmp_path / "y.parquet", {"jpg": [noise(5000)]}).read_bytes()
    (tmp_path / "z.parquet").write_bytes(data[:4] + data[1000:])
    with pytest.raises(DataError, match="it claims more data than it holds"):
        find_records([tmp_path / "z.parquet"])


def test_a_footer_that_contradicts_itself_is_no_end_of_the_process(tmp_path: Path) -> None:
    """Statistics of more levels than the schema has: pyarrow's reader of a column's metadata would abort."""
    path = write(tmp_path / "x.parquet", {"s": ["a", "b"], "file_name": ["1.png", "2.png"]})
    data = path.read_bytes()
    optional, required = (b"\x15\x0c\x25" + kind + b"\x18\x01s" for kind in (b"\x02", b"\x00"))
    assert data.count(optional) == 1
    path.write_bytes(data.replace(optional, required))
    assert [chunk.name for chunk in read_footer(path)[0]] == ["s", "file_name"]
    with suppress(DataError):  # its values may be read as others
        assert len(find_records([path])) == 2
    assert len(list(Source([path]).stream())) in (1, 2)


def test_lists_of_millions_of_nothing_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_costs, "MAX_LISTED", MANY)
    columns = {
        "file_name": ["a.png"],
        "tags": pa.array([[None] * (MANY + 1)], pa.list_(pa.string())),
    }
    with pytest.raises(DataError, match=r"tags.list.element has lists of more than 1000 values"):
        find_records([write(tmp_path / "x.parquet", columns)])


def test_too_many_pages_and_damaged_headers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {"jpg": [noise(100, n) for n in range(50)]}
    path = write(
        tmp_path / "x.parquet", columns, use_dictionary=False, data_page_size=1, write_batch_size=1
    )
    assert len(find_records([path])) == 50
    monkeypatch.setattr(parquet_costs, "MAX_PAGES", 49)
    with pytest.raises(DataError, match="jpg is in more than 49 pages"):
        find_records([path])[0].source.read()  # type: ignore[union-attr]
    data = bytearray(path.read_bytes())
    data[4:10] = b"\xff" * 6
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="its pages cannot be read"):
        Cells(path, 0, "jpg").at(0)


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[bytes]]]:
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 20_000)
    images = [noise(500, n) for n in range(200)]
    cells_of.cache_clear()
    yield write(tmp_path / "x.parquet", {"jpg": images}, row_group_size=120), images
    cells_of.cache_clear()


def test_cells_are_read_in_any_order(cells: tuple[Path, list[bytes]]) -> None:
    path, images = cells
    column = Cells(path, 0, "jpg")
    order = [*range(120), *np.random.default_rng(0).permutation(120).tolist()]
    assert [column.at(row) for row in order] == [images[row] for row in order]
    with pytest.raises(DataError, match=r"x.parquet: row group 0 has no row 120"):
        column.at(120)


def test_cells_are_read_by_several_threads(cells: tuple[Path, list[bytes]]) -> None:
    path, images = cells
    wrong: list[int] = []

    def work(seed: int) -> None:
        for row in np.random.default_rng(seed).integers(0, 200, 60).tolist():
            group, inside = divmod(row, 120)
            if cells_of(path, group, "jpg").at(inside) != images[row]:
                wrong.append(row)

    threads = [Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_damage_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"jpg": [noise(3000)]}), buffer)
    (tmp_path / "x.parquet").write_bytes(buffer.getvalue()[:-1])
    with pytest.raises(DataError, match=r"x.parquet: cannot be read as Parquet"):
        Parquet(tmp_path / "x.parquet")
    path = write(tmp_path / "y.parquet", {"jpg": [noise(30)]})
    with pytest.raises(DataError, match="there is no column picture; it has jpg"):
        find_records([path], columns=Columns(image="picture"))


def test_texts_that_are_no_unicode_are_named(tmp_path: Path) -> None:
    texts = pa.array([b"\xe2("], pa.binary()).view(pa.string())
    path = write(tmp_path / "x.parquet", {"jpg": [noise(300)], "caption": texts, "LANGUAGE": texts})
    reason = r"x.parquet: cannot be read as Parquet \('utf-8' codec"
    with pytest.raises(DataError, match=reason):
        find_records([path])
    (bad,) = Source([path]).stream()
    assert isinstance(bad, BadRecord)
    assert re.search(reason, bad.reason)
    rules = FilterConfig(languages=("en",))
    (part,) = Source([path]).parts()
    assert isinstance(part, ParquetRows)
    with pytest.raises(DataError, match="the column LANGUAGE holds a text that is no UTF-8"):
        filter_table(TableTask(part, rules, *(tmp_path / f"{n}.parquet" for n in ("a", "b", "c"))))
