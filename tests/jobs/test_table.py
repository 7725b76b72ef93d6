"""The growing table: killed, resumed, refused, repaired."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from vlv.errors import OutputError
from vlv.jobs.formats import Row, read_rows
from vlv.jobs.table import GrowingTable

COLUMNS: dict[str, type] = {"id": str, "file_name": str, "n": int, "error": str}
SETTINGS = {"seed": 0}


def row(number: int, error: str | None = None) -> Row:
    return {"id": f"{number}", "file_name": f"{number}.png", "n": number, "error": error}


def open_table(path: Path, settings: dict[str, int] = SETTINGS, mode: str = "skip") -> GrowingTable:
    return GrowingTable(path, COLUMNS, settings, mode)  # type: ignore[arg-type]


def write(path: Path, numbers: range, *, finish: bool = True, **options: object) -> None:
    table = open_table(path, **options)  # type: ignore[arg-type]
    table.start()
    for number in numbers:
        table.append([row(number)])
    if finish:
        table.finish()
    table.close()


def ids(path: Path) -> list[str]:
    return [row["id"] for row in read_rows(path, COLUMNS)]


def done(table: GrowingTable, upto: int = 10) -> set[int]:
    found = {n for n in range(upto) if (f"{n}", f"{n}.png") in table}
    assert len(found) == len(table)
    return found


@pytest.fixture(params=["out.jsonl", "out.parquet", "out.csv"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


def test_interrupted_run_goes_on(path: Path) -> None:
    write(path, range(2), finish=False)
    table = open_table(path)
    assert done(table) == {0, 1}
    assert table.get(("1", "1.png")) == row(1)
    assert table.get(("2", "2.png")) is None
    write(path, range(2, 4))
    assert ids(path) == ["0", "1", "2", "3"]
    again = open_table(path)
    assert done(again) == {0, 1, 2, 3}
    assert [again.get((f"{n}", f"{n}.png")) for n in range(4)] == [row(n) for n in range(4)]


def test_finished_output_has_only_the_settings_beside_it(path: Path) -> None:
    write(path, range(2))
    assert {p.name for p in path.parent.iterdir()} == {path.name, f"{path.name}.settings.json"}


def test_torn_last_line_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, range(2), finish=False)
    with path.open("ab") as file:
        file.write(b'{"id": "2", "file_na')
    assert done(open_table(path)) == {0, 1}
    write(path, range(2, 3))
    assert ids(path) == ["0", "1", "2"]


def test_complete_last_line_without_its_line_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, range(2))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    write(path, range(2, 3))
    assert ids(path) == ["0", "1", "2"]


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, range(2))
    path.write_text("not json\n" + path.read_text())
    with pytest.raises(OutputError, match=r"line 1 of .* is damaged"):
        open_table(path)


def test_failed_rows_are_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    table = open_table(path)
    table.start()
    table.append([row(0), row(1, "broken"), row(2)])
    table.finish()
    assert done(open_table(path)) == {0, 2}
    write(path, range(1, 2))
    assert ids(path) == ["0", "2", "1"]


def test_a_row_that_fails_in_the_same_words_is_not_written_again(path: Path) -> None:
    for _ in range(3):
        table = open_table(path)
        table.start()
        table.append([row(0)] if ("0", "0.png") not in table else [])
        table.append([row(1, "broken")])
        table.finish()
        assert list(read_rows(path, COLUMNS)) == [row(0), row(1, "broken")]


def test_a_new_row_replaces_the_old_one(path: Path) -> None:
    write(path, range(3))
    table = open_table(path)
    table.start()
    table.append([{**row(1), "n": 100}])
    assert table.get(("1", "1.png")) == {**row(1), "n": 100}
    table.finish()
    assert [r["n"] for r in read_rows(path, COLUMNS)] == [0, 2, 100]
    assert done(open_table(path)) == {0, 1, 2}


def test_a_killed_replacement_counts_once(path: Path) -> None:
    write(path, range(3))
    table = open_table(path)
    table.start()
    table.append([{**row(1), "n": 100}])
    table.close()
    write(path, range(3, 4))
    assert [r["n"] for r in read_rows(path, COLUMNS)] == [0, 2, 100, 3]


def test_a_resumed_run_appends_and_rewrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, range(3), finish=False)
    inode, before = path.stat().st_ino, path.read_bytes()
    write(path, range(3, 5))
    assert path.stat().st_ino == inode
    assert path.read_bytes().startswith(before)


@pytest.mark.slow
def test_a_long_table_is_an_index_in_memory(tmp_path: Path) -> None:
    path, number = tmp_path / "out.jsonl", 20_000
    table = open_table(path)
    table.start()
    long = "x" * 1000
    for start in range(0, number, 1000):
        table.append([{**row(n), "text": long} for n in range(start, start + 1000)])
    table.finish()
    tracemalloc.start()
    table = open_table(path)
    assert len(table) == number
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 250 * number, "bytes for a row of more than a thousand"


def test_other_settings_are_refused_and_named(path: Path) -> None:
    write(path, range(1))
    before = path.read_bytes()
    with pytest.raises(OutputError, match="seed was 0, now 7"):
        open_table(path, {"seed": 7})
    assert path.read_bytes() == before


def test_overwrite_begins_anew(path: Path) -> None:
    write(path, range(3))
    write(path, range(5, 6), settings={"seed": 7}, mode="overwrite")
    assert ids(path) == ["5"]
    assert done(open_table(path, {"seed": 7})) == {5}


def test_overwrite_spares_files_that_are_not_ours(path: Path) -> None:
    path.write_text('{"image": "precious.png"}\n')
    for mode in ("overwrite", "skip", "append"):
        with pytest.raises(OutputError):
            open_table(path, mode=mode)
    assert "precious" in path.read_text()


def test_error_refuses_any_existing_file(path: Path) -> None:
    write(path, range(1))
    with pytest.raises(OutputError, match="exists"):
        open_table(path, mode="error")


def test_append_adds_a_second_run_and_goes_on_with_it(path: Path) -> None:
    write(path, range(2))
    other = {"seed": 1}
    write(path, range(1), settings=other, mode="append", finish=False)
    assert done(open_table(path, other, "append")) == {0}
    write(path, range(1, 2), settings=other, mode="append")
    assert ids(path) == ["0", "1", "0", "1"]
    assert not done(open_table(path, other, "append")), "a finished run is followed by a new one"


def test_reading_writes_nothing(path: Path) -> None:
    open_table(path)
    assert list(path.parent.iterdir()) == []


def test_two_writers_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first, second = open_table(path), open_table(path)
    first.start()
    first.append([row(0)])
    second.start()
    second.append([row(1), row(2)])
    with pytest.raises(OutputError, match="another process"):
        first.append([row(3)])
    first.close()
    second.close()


def test_parquet_column_types(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "out.parquet"
    write(path, range(2))
    assert [str(kind) for kind in parquet.read_schema(path).types] == [
        "string",
        "string",
        "int64",
        "string",
    ]


@pytest.mark.parametrize("header", ["", "{}", '{"runs": []}', '{"runs": [{"what": 1}]}'])
def test_damaged_header_is_refused(tmp_path: Path, header: str) -> None:
    path = tmp_path / "out.jsonl"
    write(path, range(1))
    path.with_name("out.jsonl.settings.json").write_text(header)
    with pytest.raises(OutputError, match=r"settings\.json"):
        open_table(path)


def test_a_csv_row_with_more_cells_than_the_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id,file_name\na,b,c\n")
    with pytest.raises(OutputError, match="a row has more cells than the header"):
        list(read_rows(tmp_path / "x.csv"))
