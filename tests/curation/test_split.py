"""Splits by content: near duplicates never part, and nothing else decides."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.curation.files import index_of, jpeg, run, write_tar
from vlv.curation.decide import Split
from vlv.curation.job import ShardJob
from vlv.curation.settings import FilterConfig
from vlv.errors import ConfigError

SHARES = {"train": 0.5, "val": 0.25, "test": 0.25}


def split(inputs: Path, output: Path, seed: int = 0) -> dict[str, str]:
    """Id to folder."""
    job = ShardJob(
        [str(inputs)],
        output,
        "split",
        FilterConfig(near_duplicates=6),
        sorting=Split(SHARES, 6, seed),
        keep_duplicates=True,
    )
    summary = run(job)
    where = {row["id"]: name for name in SHARES for row in index_of(output / name)}
    assert summary.splits == {name: list(where.values()).count(name) for name in SHARES}
    return where


@pytest.mark.slow
def test_near_duplicates_stay_together(tmp_path: Path) -> None:
    members = []
    for seed in range(60):
        members += [(f"{seed:03d}-{side}.jpg", jpeg(seed, (side, side))) for side in (64, 80, 96)]
    write_tar(tmp_path / "a.tar", members)
    where = split(tmp_path / "a.tar", tmp_path / "out")
    assert len(where) == 180
    for seed in range(60):
        assert len({where[f"{seed:03d}-{side}"] for side in (64, 80, 96)}) == 1
    shares = [list(where.values()).count(name) / 180 for name in SHARES]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.15)
    write_tar(tmp_path / "b.tar", members[::-1][:90])
    again = split(tmp_path / "b.tar", tmp_path / "again")
    assert again == {name: where[name] for name in again}, "neither order nor the others matter"
    assert split(tmp_path / "a.tar", tmp_path / "other", seed=1) != where


def test_shares_add_up() -> None:
    with pytest.raises(
        ConfigError, match=r"train 0.5, val 0.2; they must be 0 or more and add up to 1"
    ):
        Split({"train": 0.5, "val": 0.2})
