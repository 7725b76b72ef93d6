"""The filter language."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlv.errors import ConfigError
from vlv.ui.filters import parse_filter


@dataclass(frozen=True)
class Image:
    path: str
    caption: str
    doubt: float | None = None

    def number(self, name: str) -> float | None:
        return {"tokens": float(len(self.caption.split()) + 2), "doubt": self.doubt}.get(name)


IMAGES = {
    "cat": Image("pets/cat.jpg", "a grey cat, sofa, indoors", 0.8),
    "dog": Image("pets/Dog (1).png", "A brown dog on a red sofa.", 0.1),
    "red": Image("red.webp", "Red cube left of a blue sphere"),
    "none": Image("empty/none.png", ""),
}


def passing(text: str) -> list[str]:
    wanted = parse_filter(text)
    return [name for name, image in IMAGES.items() if wanted is None or wanted(image)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ["cat", "dog", "red", "none"]),
        ("sofa", ["cat", "dog"]),
        ("SOFA red", ["dog"]),
        ("sofa and not red", ["cat"]),
        ("cat or sphere", ["cat", "red"]),
        ('"red sofa"', ["dog"]),
        ("caption:red", ["dog", "red"]),
        ("name:red", ["red"]),
        ("name:cat or path:empty", ["cat", "none"]),
        ("path:pets/*.jpg", ["cat"]),
        ("caption:r?d*sphere", ["red"]),
        ("tag:sofa", ["cat"]),
        ("tag:in*", ["cat"]),
        ("tags:3", ["cat"]),
        ("tags:=0", ["none"]),
        ("words:>5", ["dog", "red"]),
        ("Words:>=5 words:<7", ["cat"]),
        ("chars:=0", ["none"]),
        ("tokens:>8", ["dog", "red"]),
        ("doubt:>0.5", ["cat"]),
        ("not doubt:>0.5", ["dog", "red", "none"]),
        ("not not cat", ["cat"]),
        ("sofa and (cat or brown) not red", ["cat"]),
        ("cat or dog indoors", ["cat"]),
        ('"(1)"', ["dog"]),
        ('"or"', ["cat"]),
        ("AND", None),
        ("red and", None),
        ("or red", None),
        ("(red", None),
        ("red)", None),
        ("not", None),
        ('"red', None),
        ("words:many", None),
        ("colour:red", None),
        ("(" * 40 + "a" + ")" * 40, None),
        ("a " * 600, None),
    ],
)
def test_what_passes(text: str, names: list[str] | None) -> None:
    if names is None:
        with pytest.raises(ConfigError, match=r"^[^\n]{10,200}$"):
            parse_filter(text)
    else:
        assert passing(text) == names


@given(st.text(alphabet='ab ()"\\:*<>=andornotwordstag1.-', max_size=60))
def test_any_text_is_a_filter_or_one_sentence(text: str) -> None:
    try:
        wanted = parse_filter(text)
    except ConfigError:
        return
    assert wanted is None or all(wanted(image) in (True, False) for image in IMAGES.values())
