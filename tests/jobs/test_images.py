"""What the mixing options mean."""

from __future__ import annotations

import pytest

from vlv.errors import ConfigError
from vlv.jobs.images import MixSettings


def test_the_ways_to_mix() -> None:
    assert MixSettings.parse(2, "20,12", None, None) == MixSettings("concat", keep=(20, 12))
    assert MixSettings.parse(2, None, ".25,.75", None) == MixSettings(
        "average", weights=(0.25, 0.75)
    )
    assert MixSettings.parse(2, None, ".25,.75", "slerp") == MixSettings(
        "slerp", weights=(0.25, 0.75)
    )
    assert MixSettings.parse(4, None, None, "average") == MixSettings("average")


@pytest.mark.parametrize(
    ("count", "keep", "weights", "mode", "message"),
    [
        (1, "20", None, None, "1 image cannot be mixed"),
        (2, "20,12,3", None, None, "3 numbers for 2 images"),
        (2, "20,x", None, None, "no list of numbers"),
        (2, None, "1", None, "1 numbers for 2 images"),
        (2, "20,12", ".5,.5", None, "--keep belongs to --mode concat"),
        (2, "20,12", None, "slerp", "--keep belongs to --mode concat"),
        (2, None, ".5,.5", "concat", "--weights belongs to"),
    ],
)
def test_contradictions_are_refused(
    count: int, keep: str, weights: str, mode: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        MixSettings.parse(count, keep, weights, mode)  # type: ignore[arg-type]
