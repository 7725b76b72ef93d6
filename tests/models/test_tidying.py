from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlv.models.tidying import tidy_caption

RECORDED = json.loads(
    (Path(__file__).parents[1] / "official" / "preprocess_reference.json").read_text()
)["process_caption"]


@pytest.mark.parametrize(("text", "expected"), RECORDED)
def test_captions_are_tidied_as_the_authors_do(text: str, expected: str) -> None:
    assert tidy_caption(text) == expected
