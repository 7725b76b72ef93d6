"""The growing table: killed, resumed, refused, repaired."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlv.errors import OutputError
from vlv.jobs.table import GrowingTable, Row, read_parquet

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
    rows = read_parquet(path) if path.suffix == ".parquet" else _lines(path)
    return [row["id"] for row in rows]


def _lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(params=["out.jsonl", "out.parquet"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


def test_interrupted_run_goes_on(path: Path) -> None:
    write(path, range(2), finish=False)
    table = open_table(path)
    assert set(table.done) == {("0", "0.png"), ("1", "1.png")}
    write(path, range(2, 4))
    assert ids(path) == ["0", "1", "2", "3"]
    assert set(open_table(path).done) == {(f"{n}", f"{n}.png") for n in range(4)}


def test_finished_output_has_only_the_settings_beside_it(path: Path) -> None:
    write(path, range(2))
    assert {p.name for p in path.parent.iterdir()} == {path.name, f"{path.name}.settings.json"}


def test_torn_last_line_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, range(2), finish=False)
    with path.open("ab") as file:
        file.write(b'{"id": "2", "file_na')
    assert len(open_table(path).done) == 2
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
    assert set(open_table(path).done) == {("0", "0.png"), ("2", "2.png")}
    write(path, range(1, 2))
    assert ids(path) == ["0", "2", "1"]


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
    assert open_table(path, {"seed": 7}).done


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
    assert set(open_table(path, other, "append").done) == {("0", "0.png")}
    write(path, range(1, 2), settings=other, mode="append")
    assert ids(path) == ["0", "1", "0", "1"]
    assert not open_table(path, other, "append").done, "a finished run is followed by a new one"


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
