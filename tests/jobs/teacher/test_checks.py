"""What counts as a caption, and what prompts are made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlv.data.records import Record
from vlv.endpoint import Answer
from vlv.errors import ConfigError, DataError
from vlv.jobs.teacher.checks import FAULTS, REMINDERS, Wanted, is_loop, is_other_language
from vlv.jobs.teacher.prompts import PRESETS, Prompt, field_of, read_prompts

GOOD = (
    "A red cube stands to the left of a blue sphere on a grey floor. Evening light falls from the right and "
    "throws long shadows behind both, and the wall in the background is plain and pale."
)


def fault(
    text: str, finish: str = "stop", refusal: str | None = None, **wanted: object
) -> str | None:
    return Wanted(**wanted).fault(Answer(text, finish, "m", 1, 1, refusal))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "red cube, blue sphere, grey floor, low light",
        "I",
        "STOP",
        "A sign that reads “I'm sorry, we are closed” hangs on a door.",
        "Two, two, two cats sit side by side.",
        "A poster with the words “der die das und ist” in black letters, on the wall of an old house.",
    ],
)
def test_captions(text: str) -> None:
    assert fault(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty"),
        (" \n...", "empty"),
        ("I'm sorry, but I can't assist with that.", "refusal"),
        ("I\N{RIGHT SINGLE QUOTATION MARK}m unable to help.", "refusal"),
        ("I cannot identify people in images.", "refusal"),
        ("As an AI language model, I do not see.", "refusal"),
        ("A wall. " + "A red brick and " * 9, "repetition"),
        ("The red cube stands here. " * 3, "repetition"),
        ("so so so so so so so so so so", "repetition"),
        (
            "Auf dem Boden ist ein roter Würfel, und die Kugel liegt im Schatten mit der Wand.",
            "language",
        ),
        (
            "Un cube rouge est sur le sol avec une sphère, et les ombres sont dans le fond.",
            "language",
        ),
        ("一个红色的立方体在地板上。", "language"),
        ("Красный куб стоит на полу.", "language"),
    ],
)
def test_no_captions(text: str, expected: str) -> None:
    assert fault(text) == expected


def test_what_the_server_says_counts() -> None:
    assert fault(GOOD, "length") == "cut"
    assert fault("", "length") == "cut", "hidden reasoning used up the tokens"
    assert fault(GOOD, "content_filter") == "refusal"
    assert fault(GOOD, refusal="no") == "refusal"


def test_wanted_length_and_language() -> None:
    assert fault(GOOD, min_words=100) == "too short"
    assert fault(GOOD, max_words=10) == "too long"
    assert fault("Ein Würfel und eine Kugel sind auf dem Boden der Halle.", language="de") is None
    assert fault(GOOD, language="de") == "language"
    assert fault("一个红色的立方体", language="any") is None
    for values in ({"language": "tlh"}, {"min_words": 0}, {"min_words": 9, "max_words": 3}):
        with pytest.raises(ConfigError):
            Wanted(**values)  # type: ignore[arg-type]
    assert FAULTS.keys() == REMINDERS.keys()
    assert Wanted(max_words=40).reminder("cut") == (
        "Keep it short: at most 40 words, and end with a complete sentence."
    )


def test_loops_of_any_period() -> None:
    for period in (1, 2, 7, 25):
        unit = " ".join(f"w{n}" for n in range(period))
        assert is_loop("Some words before. " + f"{unit} " * 12)
    assert not is_loop(" ".join(f"w{n}" for n in range(300)))
    assert not is_other_language("", "en")


def test_presets_are_prompts() -> None:
    for name, text in PRESETS.items():
        assert Prompt(name, text).render(Record("a.png", Path("a.png"))) == text
    assert [prompt.name for prompt in read_prompts(["A cat?", "tags", "A dog?"])] == [
        "own",
        "tags",
        "own2",
    ]
    with pytest.raises(ConfigError, match="two prompts are called tags"):
        read_prompts(["tags", "tags"])


def test_fields() -> None:
    meta = {"tags": ["a", "b"], "score": 0.5, "long": "x" * 900, "lines": "one\ntwo", "none": None}
    record = Record("cats/a.png", Path("/data/cats/a.png"), "a cat", meta)
    assert field_of(record, "tags") == "a, b"
    assert field_of(record, "alt") == field_of(record, "caption") == "a cat"
    assert (field_of(record, "file_name"), field_of(record, "folder")) == ("a.png", "cats")
    assert (field_of(record, "score"), field_of(record, "lines")) == ("0.5", "one two")
    assert len(field_of(record, "long") or "") == 500
    assert field_of(record, "none") is None
    prompt = Prompt("p", "{alt}; {artist|unknown}; {tags}")
    assert prompt.render(record) == "a cat; unknown; a, b"
    assert prompt.required_fields == ["alt", "tags"]
    with pytest.raises(DataError, match="has no field 'artist'"):
        Prompt("p", "{artist}").render(record)


@pytest.mark.parametrize("text", ["", "{", "a } b", "{a b}", "{alt.x}", "{alt!r}", "{}"])
def test_braces_that_are_no_field(text: str) -> None:
    with pytest.raises(ConfigError):
        Prompt("p", text)
