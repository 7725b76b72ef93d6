"""A table of addresses, filtered by its columns: what the rules on images would say, without the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlv.curation import rules
from vlv.curation.engine import LocalEngine
from vlv.curation.settings import load_filter
from vlv.curation.summary import Summary
from vlv.curation.table_filter import TableJob
from vlv.data import tables
from vlv.errors import ConfigError, DataError, OutputError

PAPER = load_filter("paper", ["aesthetic.at_least=5", "languages=[en]"])


def write_laion(path: Path, count: int = 3000) -> dict[str, list[Any]]:
    """A table in LAION's columns, some numbers unknown."""
    rng = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {
        "URL": [f"http://x/{number}" for number in range(count)],
        "TEXT": ["words"] * count,
        "WIDTH": rng.integers(300, 2000, count).tolist(),
        "HEIGHT": rng.integers(300, 2000, count).tolist(),
        "pwatermark": [None if x > 0.95 else x for x in rng.random(count).tolist()],
        "AESTHETIC_SCORE": (10 * rng.random(count)).tolist(),
        "LANGUAGE": rng.choice(["en", "de"], count).tolist(),
    }
    pq.write_table(pa.table(columns), path, row_group_size=500)
    return columns


def run(inputs: Path, output: Path, config: Any = PAPER, workers: int = 1) -> Summary:
    with LocalEngine(workers) as engine:
        return TableJob([str(inputs)], output, config).run(engine)


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob(name)) for row in pq.read_table(path).to_pylist()]


@pytest.mark.slow
def test_same_verdicts_as_the_rules_on_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RECORDS", 1000)
    columns = write_laion(tmp_path / "laion.parquet")
    summary = run(tmp_path / "laion.parquet", tmp_path / "out")
    expected: dict[str, str] = {}
    for number, url in enumerate(columns["URL"]):
        row = {name: values[number] for name, values in columns.items()}
        drop = rules.check_known(PAPER, rules.Columns(PAPER).read(row))
        drop = drop or rules.check_size(PAPER, row["WIDTH"], row["HEIGHT"])
        expected[url] = drop.reason if drop else ""
    assert {row["URL"]: row["reason"] for row in read(tmp_path / "out", "dropped-*")} == {
        url: reason for url, reason in expected.items() if reason
    }
    kept = read(tmp_path / "out", "part-*")
    assert [row["URL"] for row in kept] == [url for url, reason in expected.items() if not reason]
    assert list(kept[0]) == list(columns), "all columns, for img2dataset"
    assert len(list((tmp_path / "out").glob("part-*"))) == summary.shards == 3
    assert (summary.images, summary.kept, summary.exit_code) == (3000, len(kept), 0)
    assert set(summary.dropped) == {
        "watermark",
        "aesthetic",
        "language",
        "short_side",
        "aspect_ratio",
    }
    assert run(tmp_path / "laion.parquet", tmp_path / "out") == summary
    assert run(tmp_path / "laion.parquet", tmp_path / "two", workers=2) == summary


def test_unknown_columns_and_unfit_rules(tmp_path: Path) -> None:
    pq.write_table(pa.table({"URL": ["u"], "w": [600], "h": [600]}), tmp_path / "t.parquet")
    rename = ["watermark.unknown=keep", "width_column=W", "height_column=H"]
    assert run(tmp_path / "t.parquet", tmp_path / "out", load_filter("paper", rename)).kept == 1
    for change, error, message in (
        ([], DataError, "watermark needs the column pwatermark"),
        (
            ["watermark=null"],
            DataError,
            r"no column WIDTH \(columns: URL, h, w\); .*width_column=NAME",
        ),
        (["watermark.column=URL"], DataError, "the column URL holds no numbers"),
        (["decode=true"], ConfigError, "decode needs the images"),
    ):
        config = load_filter("paper", [*(rename[1:] if "=URL" in str(change) else []), *change])
        with pytest.raises(error, match=message):
            run(tmp_path / "t.parquet", tmp_path / f"x{len(message)}", config)
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="Parquet tables alone"):
        run(tmp_path / "a.jsonl", tmp_path / "y")
    with pytest.raises(OutputError, match="made with other settings"):
        run(tmp_path / "t.parquet", tmp_path / "out", load_filter("paper"))


def test_damaged_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_laion(tmp_path / "in" / "a.parquet", 10)
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1")
    summary = run(tmp_path / "in", tmp_path / "out")
    assert (summary.images, summary.damaged_files, summary.exit_code) == (10, 1, 2)
