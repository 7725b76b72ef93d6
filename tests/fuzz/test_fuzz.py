"""10,000 cases of every kind of file end well or in one sentence; and what the fuzzer would say otherwise."""

from __future__ import annotations

import json
import os
import signal
import tarfile
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.files import noise_png
from tests.fuzz import runner, targets
from tests.fuzz.runner import fuzz
from tests.fuzz.targets import TARGETS, Target
from vlv.data.records import Record
from vlv.data.source import Source, find_records
from vlv.errors import DataError, VLVError

CASES = int(os.environ.get("VLV_FUZZ_CASES", "10000"))
"""More by hand: `python -m tests.fuzz --cases 200000 --seed 1`."""
PARTS = 2  # for two workers of pytest


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_damaged_files_are_read_or_refused_in_one_sentence(tmp_path: Path, part: int) -> None:
    found = fuzz(CASES // PARTS, seed=part, folder=tmp_path)
    assert found.findings == []
    assert found.cases == CASES // PARTS
    assert 0.02 < found.refused / found.cases < 0.9
    assert found.peak < runner.MAX_GROWTH


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "component")) for n in TARGETS]
)
def test_good_files_are_read(name: str, tmp_path: Path) -> None:
    for number, seed in enumerate(TARGETS[name].seeds()):
        folder = tmp_path / str(number)
        folder.mkdir()
        refused = targets.run(name, seed, folder)
        assert not refused or name in ("image", "embeddings"), f"seed {number}"


def misbehave(data: bytes, folder: Path) -> None:
    match data[:1]:
        case b"r":
            raise VLVError("refused")
        case b"t":
            raise ZeroDivisionError("oops")
        case b"l":
            raise VLVError("two\nlines")
        case b"h":
            time.sleep(60)
        case b"c":
            os.kill(os.getpid(), signal.SIGKILL)
        case b"w":
            (folder.parent.parent / "elsewhere").write_text("x")
        case b"m":
            assert len(bytearray(b"x") * (runner.MAX_GROWTH + 2**24))


@pytest.mark.slow
def test_the_fuzzer_sees_what_goes_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each letter is a case, and what it does."""
    letters = "rtlhcwmr"
    monkeypatch.setitem(TARGETS, "bad", Target(lambda: [b"x"], misbehave))
    monkeypatch.setattr(runner, "HANG_SECONDS", 1.0)
    numbers = {str(n): letter for n, letter in enumerate(letters)}
    monkeypatch.setattr(runner, "mutate", lambda draws, seeds: numbers[draws.number].encode())

    class Numbered:
        def __init__(self, seed: str) -> None:
            self.number = seed.split()[1]

    monkeypatch.setattr(runner.random, "Random", Numbered)
    found = fuzz(len(letters), 0, tmp_path / "in", ["bad"])
    assert found.kinds == {
        "traceback": 2,
        "hang": 1,
        "crash": 1,
        "outside": 1,
        "memory": 1,
    }
    assert found.refused == 2
    assert found.peak > runner.MAX_GROWTH
    assert (tmp_path / "in" / "hang-3").read_bytes() == b"h"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)
objects = st.dictionaries(
    st.sampled_from(["caption", "text", "id", "key", "width", "sha256", "url", "status", "x"]),
    values,
    max_size=5,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(objects)
def test_any_metadata_is_read_alike_from_a_table_and_from_a_tar(
    tmp_path_factory: pytest.TempPathFactory, meta: dict[str, object]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    png, text = noise_png(0, 4), json.dumps(meta)
    (folder / "x.png").write_bytes(png)
    (folder / "x.jsonl").write_text(json.dumps({"file_name": "x.png", **meta}))
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, data in (("x.png", png), ("x.json", text.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    (listed,) = find_records([folder / "x.tar"])
    (passing,) = Source([folder / "x.tar"]).stream()
    assert isinstance(passing, Record)
    assert repr(listed.meta) == repr(passing.meta)
    json.dumps(listed.meta, ensure_ascii=False).encode()
    assert listed.caption == passing.caption
    with suppress(DataError):  # a path or id of its own that is refused
        (row,) = find_records([folder / "x.jsonl"])
        assert row.load().size == (4, 4)
