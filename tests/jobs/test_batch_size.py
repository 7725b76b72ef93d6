"""How the automatic batch size grows, and when it stops."""

from __future__ import annotations

import pytest

from vlv.errors import ConfigError
from vlv.jobs.inputs import BatchSize


def grown(seconds_of: dict[int, float], batches: int = 20) -> int:
    """The size in the end, where a batch of so many images takes so long."""
    size = BatchSize("auto")
    for _ in range(batches):
        size.measured(size.now, seconds_of.get(size.now, 1e9))
    return size.now


def test_it_doubles_while_that_is_faster() -> None:
    assert grown({8: 1.0, 16: 1.1, 32: 1.3, 64: 2.6}) == 32
    assert grown({8: 1.0, 16: 2.0}) == 8
    assert grown({8 * 2**n: 1.0 for n in range(10)}) == 512


def test_the_first_batch_of_a_size_may_be_slow() -> None:
    size = BatchSize("auto")
    for seconds in (100.0, 1.0):  # the kernels are chosen in the first
        size.measured(8, seconds)
    assert size.now == 16
    for seconds in (100.0, 1.0):
        size.measured(16, seconds)
    assert size.now == 32


def test_a_number_stays() -> None:
    size = BatchSize.parse("12")
    for _ in range(4):
        size.measured(12, 0.1)
    assert size.now == 12
    with pytest.raises(ConfigError, match="must be auto, or a number"):
        BatchSize.parse("-3")
