"""Answers to questions about images: the official normalisation and accuracy of VQAv2, and exact match.

The rules are those of `vqaEval.py` of the VQA challenge (Goyal et al. 2017), followed to its quirks, because published
figures contain them: the right answers lose punctuation only, and only where annotators disagree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = (*';/[]"{}()=+', "\\", *"_-><@`,?!")
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA = re.compile(r"\d,\d")
_MAX_PERIODS = 32
"""The official code hands `re.UNICODE` to `sub` as the number of replacements."""

_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")

_ONCE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's
how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've
o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll
someone's something'd something'll that's there'd there're there's they'd they'll they're
they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd
you'll you're you've
"""
_TWICE = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've
someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll
you'd've
"""
_CONTRACTIONS = (
    {word.replace("'", ""): word for word in _ONCE.split()}
    | {word.replace("'", "", 1): word for word in _TWICE.split()}
    | {"'".join(word.rsplit("'", 1)[:1]) + word.rsplit("'", 1)[1]: word for word in _TWICE.split()}
    | dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    | dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    | {"somebody'd": "somebodyd"}  # the official table has this one the wrong way round
)


def strip_punctuation(text: str) -> str:
    """`processPunctuation` of the official code: punctuation goes, or becomes a space inside a word.

    >>> strip_punctuation("t-shirt"), strip_punctuation("1,000"), strip_punctuation("no. 3.5 p.m.")
    ('t shirt', '1000', 'no 3.5 pm')
    """
    stripped = text
    for mark in _PUNCTUATION:
        alone = f"{mark} " in text or f" {mark}" in text or _COMMA.search(text) is not None
        stripped = stripped.replace(mark, "" if alone else " ")
    return _PERIOD.sub("", stripped, count=_MAX_PERIODS)


def normalise_words(text: str) -> str:
    """`processDigitArticle` of the official code: lower case, number words, no articles, apostrophes put back.

    >>> normalise_words("The two dogs dont")
    "2 dogs don't"
    """
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalise_answer(text: str) -> str:
    """An answer as the official code compares it.

    >>> normalise_answer("  The Frisbee! ")
    'frisbee'
    """
    return normalise_words(strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def vqa_accuracy(answer: str, annotations: Sequence[str]) -> float:
    """Official accuracy of one answer: min(n / 3, 1), n annotators agreeing, averaged over all but one of them.

    With ten annotators of whom n agree this is 0, 0.3, 0.6, 0.9, 1 for n = 0, 1, 2, 3, 4 and more (Antol et al. 2015).

    Args:
        answer: As the model gave it; it is normalised here.
        annotations: The answers of all annotators as the data set has them, two at least.

    Returns:
        In [0, 1].

    Raises:
        ValueError: There are fewer than two annotations.

    >>> round(vqa_accuracy("Two.", ["2", "2", "3", "3", "3", "3", "3", "3", "3", "3"]), 6)
    0.6
    """
    if len(annotations) < 2:
        raise ValueError(
            f"the official accuracy needs two or more annotators, got {len(annotations)}"
        )
    given = normalise_answer(answer)
    right = _as_compared(annotations)
    agree = [text == given for text in right]
    total = sum(agree)
    return sum(min((total - own) / 3, 1.0) for own in agree) / len(agree)


def exact_match(answer: str, annotations: Sequence[str]) -> bool:
    """The paper's criterion (section 4.2.3): the answer is right only if it equals the ground truth.

    The paper does not say which of the annotators' answers is the ground truth, nor how they are normalised. Here it is the
    most frequent one, the first of those with the same frequency, and both sides are normalised in full.

    Raises:
        ValueError: There is no annotation.

    >>> exact_match("a dog", ["dog", "dog", "cat"]), exact_match("cat", ["dog", "dog", "cat"])
    (True, False)
    """
    if not annotations:
        raise ValueError("an exact match needs a ground truth")
    right = [normalise_answer(text) for text in annotations]
    return normalise_answer(answer) == max(right, key=right.count)


def _as_compared(annotations: Sequence[str]) -> list[str]:
    if len(set(annotations)) == 1:
        return list(annotations)
    return [strip_punctuation(text) for text in annotations]
