"""Find and replace."""

from __future__ import annotations

import pytest

from vlv.errors import ConfigError
from vlv.ui.replace import Replacement


@pytest.mark.parametrize(
    ("how", "after"),
    [
        (Replacement("cube", "box"), "A red box. boxs are boxs."),
        (Replacement("cube", "box", whole_words=True), "A red box. Cubes are cubes."),
        (Replacement("Cube", "box", match_case=True), "A red cube. boxs are cubes."),
        (Replacement("red ", ""), "A cube. Cubes are cubes."),
        (Replacement(".", r"\1!"), r"A red cube\1! Cubes are cubes\1!"),
        (Replacement(r"(red) (cube)", r"\2, \1", is_pattern=True), "A cube, red. Cubes are cubes."),
    ],
)
def test_what_it_makes_of_a_caption(how: Replacement, after: str) -> None:
    before = "A red cube. Cubes are cubes."
    assert how.apply(before) == after
    pieces = list(how.pieces(before))
    assert "".join(text for kind, text in pieces if kind != "added") == before
    assert "".join(text for kind, text in pieces if kind != "removed") == after


@pytest.mark.parametrize(
    ("find", "to"), [("", "x"), ("(", "x"), ("(a", ""), ("a", r"\2"), ("a", r"\g<no>"), ("[", "")]
)
def test_what_makes_no_sense_is_one_sentence(find: str, to: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]+$"):
        Replacement(find, to, is_pattern=True)
