from __future__ import annotations

import pytest

from vlv.evaluation.metrics.answers import (
    exact_match,
    normalise_answer,
    strip_punctuation,
    vqa_accuracy,
)

HARD_CASES = {
    "Yes": "yes",
    "the dog": "dog",
    "A man and the woman": "man and woman",
    "none": "0",
    "Ten": "10",
    "eleven": "eleven",
    "t-shirt": "t shirt",
    "t - shirt": "t shirt",  # beside a space the hyphen goes, and the double space with it
    "black/white": "black white",
    "black / white": "black white",
    "1,000": "1000",
    "1, 2": "1 2",
    "red, white and blue": "red white and blue",
    "3.5": "3.5",
    "p.m.": "pm",
    "10 a.m": "10 am",
    "no.": "no",
    "dont know": "don't know",
    "don't know": "don't know",
    "its": "its",
    "it's": "it's",
    "wouldntve": "wouldntve",  # only one of its two apostrophes may be missing
    "wouldnt've": "wouldn't've",
    "wouldn'tve": "wouldn't've",
    "yall": "y'all",
    "yalldve": "yalldve",
    "y'alld've": "y'all'd've",
    "somebody'd": "somebodyd",
    "let's go": "let's go",
    "who's": "who's",
    "whos": "who's",
    "oclock": "o'clock",
    "what?!": "what",
    'the "stop" sign': "stop sign",
    "(left)": "left",
    "a\tb\nthe c": "b c",
    "$5": "$5",
    "50%": "50%",
    "a:b": "a:b",  # a colon is no punctuation to the official code
    "": "",
}


@pytest.mark.parametrize(("given", "expected"), HARD_CASES.items())
def test_normalisation_is_the_official_one(given: str, expected: str) -> None:
    """Each worked out by hand from processPunctuation and processDigitArticle of vqaEval.py."""
    assert normalise_answer(given) == expected


def test_only_so_many_full_stops_go() -> None:
    assert strip_punctuation("." * 40) == "." * 8


@pytest.mark.parametrize(
    ("agreeing", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_accuracy_of_ten_annotators(agreeing: int, accuracy: float) -> None:
    annotations = ["red"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert vqa_accuracy("Red", annotations) == pytest.approx(accuracy)


def test_annotations_keep_what_the_official_code_leaves() -> None:
    """They lose punctuation where they differ, but neither articles nor number words."""
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 9 + ["shirt"]) == 1
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 10) == 0
    assert vqa_accuracy("two", ["two"] * 10) == 0
    assert vqa_accuracy("two", ["2"] * 10) == 1


def test_exact_match_takes_the_most_frequent_answer() -> None:
    assert exact_match("The Dog.", ["dog"] * 6 + ["puppy"] * 4)
    assert not exact_match("puppy", ["dog"] * 6 + ["puppy"] * 4)
    assert exact_match("two", ["2", "two", "3"])


def test_annotations_are_needed() -> None:
    with pytest.raises(ValueError, match="two or more"):
        vqa_accuracy("yes", ["yes"])
    with pytest.raises(ValueError, match="ground truth"):
        exact_match("yes", [])
