"""Captions against reference captions by their words: BLEU, ROUGE-L and CIDEr-D, in [0, 1] but for CIDEr-D, in [0, 10].

Words are cut in the manner of the Penn Treebank, lower-cased and without punctuation, as the COCO caption evaluation does
(Chen et al. 2015). The tokeniser is our own: figures of the two differ where theirs cuts an unusual word otherwise.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MAX_N = 4
_CIDER_SIGMA = 6.0
_ROUGE_BETA = 1.2

_WORD = re.compile(
    r"n['\u2019]t\b|['\u2019](?:s|re|ve|ll|d|m)\b"  # what `_CLITIC` has cut off
    r"|\d+(?:[.,:/]\d+)*"  # 1,000 and 3.5 and 10:30
    r"|(?:[^\W\d_]\.){2,}"  # p.m. and u.s.
    r"|\w+(?:-\w+)*"  # words, also joined by hyphens
)
_CLITIC = re.compile(r"(?<=\w)(n['\u2019]t|['\u2019](?:s|re|ve|ll|d|m))\b")


def words(text: str) -> list[str]:
    """Cut a caption into words.

    >>> words("A man's dog doesn't sit on the well-known couch, at 3.5 m.")
    ['a', 'man', "'s", 'dog', 'does', "n't", 'sit', 'on', 'the', 'well-known', 'couch', 'at', '3.5', 'm']
    """
    return _WORD.findall(_CLITIC.sub(r" \1", text.lower()).replace("\u2019", "'"))


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


# --- BLEU --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BleuCounts:
    """What one caption adds to BLEU; the sums over captions give that of the corpus."""

    matches: tuple[int, ...]
    """n-grams that some reference has, each at most as often as there; for n from 1 to 4."""
    totals: tuple[int, ...]
    """n-grams of the caption."""
    length: int
    closest: int
    """Length of the reference whose length is nearest, the shorter of two as near."""

    @property
    def columns(self) -> tuple[int, ...]:
        """All ten numbers, for a table with a row per caption."""
        return (*self.matches, *self.totals, self.length, self.closest)


def bleu_counts(caption: str, references: Sequence[str]) -> BleuCounts:
    """The counts of one caption.

    Raises:
        ValueError: There is no reference.
    """
    _check_references(references)
    said, known = words(caption), [words(text) for text in references]
    matches, totals = [], []
    for n in range(1, MAX_N + 1):
        mine = _ngrams(said, n)
        most: Counter[tuple[str, ...]] = Counter()
        for tokens in known:
            most |= _ngrams(tokens, n)
        matches.append((mine & most).total())
        totals.append(mine.total())
    closest = min((abs(len(tokens) - len(said)), len(tokens)) for tokens in known)[1]
    return BleuCounts(tuple(matches), tuple(totals), len(said), closest)


def bleu(columns: np.ndarray, n: int = MAX_N) -> np.ndarray:
    """BLEU of a corpus (Papineni et al. 2002): brevity penalty times the geometric mean of the n-gram precisions.

    min(1, exp(1 - r / c)) * (prod_k matches_k / totals_k)^(1/n), with c and r the summed lengths of captions and closest
    references. There is no smoothing: 0 where no n-gram of some order matches.

    Args:
        columns: (..., 10), sums or means of `BleuCounts.columns` over captions, as `estimate` hands them.
        n: Longest n-gram.

    Returns:
        In [0, 1], (...).
    """
    matches, totals = columns[..., :n], columns[..., MAX_N : MAX_N + n]
    length, closest = columns[..., 2 * MAX_N], columns[..., 2 * MAX_N + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.exp(np.log(matches / totals).mean(-1))
        brevity = np.minimum(1.0, np.exp(1 - closest / length))
    return np.asarray(np.nan_to_num(precision * brevity))


# --- ROUGE-L -----------------------------------------------------------------------------------------


def rouge_l(caption: str, references: Sequence[str], beta: float = _ROUGE_BETA) -> float:
    """F measure of the longest common subsequence of words (Lin 2004), as in the COCO caption evaluation.

    (1 + b^2) P R / (R + b^2 P), with P the greatest share of the caption and R the greatest share of a reference that the
    subsequence covers, over references.

    Raises:
        ValueError: There is no reference.

    >>> rouge_l("police kill the gunman", ["police killed the gunman"], beta=1)  # Lin (2004), section 3.1
    0.75
    >>> rouge_l("the gunman kill police", ["police killed the gunman"], beta=1)
    0.5
    """
    _check_references(references)
    said, known = words(caption), [words(text) for text in references]
    if not said or not any(known):
        return 0.0
    common = [(_longest_common(said, tokens), len(tokens)) for tokens in known if tokens]
    precision = max(length / len(said) for length, _ in common)
    recall = max(length / size for length, size in common)
    if not precision:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for j, other in enumerate(b, start=1):
            row.append(before[j - 1] + 1 if word == other else max(before[j], row[-1]))
    return row[-1]


# --- CIDEr-D -----------------------------------------------------------------------------------------


def cider_d(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    corpus: Sequence[Sequence[str]] | None = None,
) -> list[float]:
    """CIDEr-D of every caption (Vedantam et al. 2015, equations 2 to 5); their mean is that of the corpus.

    10 times the mean over n from 1 to 4 and over references of exp(-(l_c - l_r)^2 / 2 sigma^2) times the clipped cosine
    min(g_c, g_r) . g_r / |g_c||g_r| of the n-gram counts, weighted by log(N / images whose references have the n-gram);
    sigma is 6. As in the published code, an n-gram that no reference has counts as one that one image has, and lengths are
    counted in bigrams. Of a single image every weight, and so every score, is 0.

    Args:
        captions: One per image.
        references: One or more captions of each image.
        corpus: The references of all N images, from which the weights come; None takes `references`. With it, captions of
            some of the images are weighed as those of all.

    Returns:
        Each in [0, 10].

    Raises:
        ValueError: The numbers differ, or an image has no reference.
    """
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions for {len(references)} images")
    for texts in references:
        _check_references(texts)
    known = [[_counts(text) for text in texts] for texts in references]
    everything = known if corpus is None else [[_counts(t) for t in texts] for texts in corpus]
    having: Counter[tuple[str, ...]] = Counter()
    for image in everything:
        having.update({gram for counts in image for gram in counts})
    log_n = math.log(len(everything)) if everything else 0.0

    def weigh(counts: Counter[tuple[str, ...]]) -> _Vectors:
        return _Vectors.of(
            counts, {gram: log_n - math.log(max(1, having[gram])) for gram in counts}
        )

    return [
        _cider(weigh(_counts(caption)), [weigh(counts) for counts in image])
        for caption, image in zip(captions, known, strict=True)
    ]


def _counts(text: str) -> Counter[tuple[str, ...]]:
    tokens = words(text)
    counts: Counter[tuple[str, ...]] = Counter()
    for n in range(1, MAX_N + 1):
        counts.update(_ngrams(tokens, n))
    return counts


@dataclass(frozen=True, slots=True)
class _Vectors:
    """Weighted n-gram counts of one text, one vector for each n."""

    by_n: tuple[dict[tuple[str, ...], float], ...]
    norms: tuple[float, ...]
    bigrams: int

    @classmethod
    def of(
        cls, counts: Counter[tuple[str, ...]], weights: dict[tuple[str, ...], float]
    ) -> _Vectors:
        by_n: tuple[dict[tuple[str, ...], float], ...] = tuple({} for _ in range(MAX_N))
        for gram, count in counts.items():
            by_n[len(gram) - 1][gram] = count * weights[gram]
        norms = tuple(math.sqrt(sum(v * v for v in vector.values())) for vector in by_n)
        return cls(by_n, norms, sum(count for gram, count in counts.items() if len(gram) == 2))


def _cider(said: _Vectors, known: Iterable[_Vectors]) -> float:
    scores = []
    for reference in known:
        penalty = math.exp(-((said.bigrams - reference.bigrams) ** 2) / (2 * _CIDER_SIGMA**2))
        cosines = []
        for n in range(MAX_N):
            mine, theirs = said.by_n[n], reference.by_n[n]
            dot = sum(min(mine[g], theirs[g]) * theirs[g] for g in mine.keys() & theirs.keys())
            norm = said.norms[n] * reference.norms[n]
            cosines.append(dot / norm if norm else 0.0)
        scores.append(penalty * sum(cosines) / MAX_N)
    return 10 * sum(scores) / len(scores)


def _check_references(references: Sequence[str]) -> None:
    if not references:
        raise ValueError("a caption is compared with one or more references, got none")
