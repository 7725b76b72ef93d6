import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlv.data.ahead import Ahead
from vlv.data.batches import BatchLoader
from vlv.data.records import Record
from vlv.errors import DataError


def loader(bad: bool = False, **options: Any) -> BatchLoader:
    records = [
        Record(f"{i}", Path(f"{i}.png"), meta_json="{" if bad and i % 5 == 2 else None)
        for i in range(23)
    ]
    return BatchLoader(records, 4, None, **{"seed": 0, "max_bad_share": 1, **options})


def take(batches: Any, count: int) -> list[list[str]]:
    return [next(batches)["ids"] for _ in range(count)]


@settings(max_examples=20, deadline=None)
@given(steps=st.integers(0, 9), depth=st.integers(1, 4), workers=st.sampled_from([0, 2]))
def test_the_position_is_that_of_the_user(steps, depth, workers):
    plain = loader(bad=True)
    with Ahead(loader(bad=True, num_workers=workers), depth, pin=False) as ahead:
        assert ahead.state_dict() == plain.state_dict()
        assert take(ahead, steps) == take(plain, steps)
        state = json.loads(json.dumps(ahead.state_dict()))
        assert state == plain.state_dict()
        expected = take(plain, 6)
        assert take(ahead, 6) == expected
        ahead.load_state_dict(state)  # back, with batches in the making
        assert ahead.state_dict() == state
        assert take(ahead, 6) == expected


def test_an_error_comes_where_its_batch_is_asked_for():
    broken = loader(bad=True, max_bad_share=0.1, min_checked=9)
    good = take(loader(bad=True), 5)
    with Ahead(broken, 3, pin=False) as ahead:
        seen: list[list[str]] = []
        with pytest.raises(DataError, match="cannot be read, more than the allowed share"):
            seen.extend(batch["ids"] for batch in ahead)
    assert seen == good[: len(seen)]
    assert seen
    assert not [t for t in threading.enumerate() if t.name.startswith("vlv-decode")]


def test_the_end_of_the_loader_is_the_end():
    inner = loader()
    with Ahead(inner, 1, pin=False) as ahead:
        next(ahead)
        inner.close()
        with pytest.raises(StopIteration):
            take(ahead, 5)
