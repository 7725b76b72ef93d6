from __future__ import annotations

import math

import numpy as np
import pytest

from vlv.evaluation.metrics.sentences import bleu, bleu_counts, cider_d, rouge_l, words

# Papineni et al. (2002), examples 1 and 2.
FIRST = "It is a guide to action which ensures that the military always obeys the commands of the party."
SECOND = "It is to insure the troops forever hearing the activity guidebook that party direct."
REFERENCES = [
    "It is a guide to action that ensures that the military will forever heed Party commands.",
    "It is the guiding principle which guarantees the military forces always being under the command of the Party.",
    "It is the practical guide for the army always to heed the directions of the party.",
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop!", ["do", "n't", "stop"]),
        ("It's 10:30, isn't it?", ["it", "'s", "10:30", "is", "n't", "it"]),
        ("The dogs\u2019 bowl -- they\u2019re empty...", ["the", "dogs", "bowl", "they", "'re", "empty"]),
        ("1,000 red/blue (big) t-shirts", ["1,000", "red", "blue", "big", "t-shirts"]),
        ("", []),
    ],
)  # fmt: skip
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_modified_precisions_of_the_paper() -> None:
    first, second = (bleu_counts(text, REFERENCES) for text in (FIRST, SECOND))
    assert list(zip(first.matches, first.totals, strict=True))[:2] == [(17, 18), (10, 17)]
    assert list(zip(second.matches, second.totals, strict=True))[:2] == [(8, 14), (1, 13)]
    stuttered = bleu_counts(
        "the the the the the the the",
        ["The cat is on the mat.", "There is a cat on the mat."],
    )
    assert (stuttered.matches[0], stuttered.totals[0]) == (2, 7)


def test_bleu_of_the_first_example() -> None:
    """As NLTK's documentation gives it."""
    columns = np.array(bleu_counts(FIRST, REFERENCES).columns, float)
    assert bleu(columns) == pytest.approx(0.5045666840058485)


def test_bleu_of_a_corpus_sums_counts_and_penalises_brevity() -> None:
    rows = np.array(
        [bleu_counts("a b", ["a b c d"]).columns, bleu_counts("e f", ["e f"]).columns], float
    )
    assert bleu(rows.sum(0), n=1) == pytest.approx(math.exp(1 - 6 / 4))
    assert bleu(rows.mean(0), n=1) == pytest.approx(math.exp(1 - 6 / 4))
    assert bleu(rows.sum(0), n=4) == 0
    assert bleu(np.zeros(10)) == 0


def test_the_nearest_reference_counts() -> None:
    counts = bleu_counts("a b c", ["a b", "a b c d", "a b c d e"])
    assert (counts.length, counts.closest) == (3, 2)


def test_rouge_takes_the_best_of_each_share() -> None:
    """COCO: the greatest precision and the greatest recall may come from two references."""
    found = rouge_l("a b c d", ["a b", "a b c x y z u v"])
    precision, recall = 3 / 4, 1.0
    assert found == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))
    assert rouge_l("a", ["b"]) == 0
    assert rouge_l("", ["b"]) == 0


def test_cider_of_perfect_captions_is_ten() -> None:
    texts = ["a red cube on grass", "two dogs run very fast", "one cone stands at night"]
    assert cider_d(texts, [[text] for text in texts]) == pytest.approx([10, 10, 10])
    assert cider_d(texts[1:] + texts[:1], [[text] for text in texts]) == pytest.approx([0, 0, 0])
    assert cider_d(texts[:1], [texts[:1]]) == [0]


def test_cider_by_hand() -> None:
    """Captions of two words: unigrams and bigrams only, two of the four orders are empty."""
    found = cider_d(["a b", "c d"], [["a c"], ["c d"]])
    w, once = math.log(2), 0.0  # a: 1 of 2 images; c: both
    said = np.array([w, w])  # a, b (b is in no reference: as if in one)
    known = np.array([w, once])  # a, c
    unigram = w * w / (np.linalg.norm(said) * np.linalg.norm(known))
    assert found[0] == pytest.approx(10 * unigram / 4)
    assert found[1] == pytest.approx(10 * (1 + 1) / 4)


def test_cider_penalises_length_and_repetition() -> None:
    references = [["a b c d e"], ["p q r s t"]]
    plain, _ = cider_d(["a b c d e", "p q r s t"], references)
    doubled, _ = cider_d(["a b c d e a b c d e", "p q r s t"], references)
    assert plain == pytest.approx(10)
    unigrams = 5 / math.sqrt(20 * 5)  # min(2, 1) * 1 over five words, norms sqrt(5 * 4) and sqrt(5)
    assert doubled < 10 * math.exp(-25 / 72)
    assert unigrams == pytest.approx(0.5)


def test_references_are_needed() -> None:
    with pytest.raises(ValueError, match="got none"):
        rouge_l("a", [])
    with pytest.raises(ValueError, match="2 captions for 1"):
        cider_d(["a", "b"], [["a"]])


def test_cider_of_some_images_is_weighed_as_that_of_all() -> None:
    captions = ["a red cube", "a blue cone on grass", "a dog"]
    known = [["the red cube", "a red block"], ["a cone on grass"], ["one red dog", "a dog"]]
    everything = cider_d(captions, known)
    assert cider_d(captions[:2], known[:2], known) == pytest.approx(everything[:2])
    assert cider_d(captions[:2], known[:2]) != pytest.approx(everything[:2])
