"""Captions in figures: how long, how varied, how repetitive. Everything adds up, so that parts can be counted apart."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from vlv.errors import ConfigError
from vlv.storage import Json

PAPER_MEAN, PAPER_MEDIAN = 226.82, 226
"""Tokens of a caption in the paper (figure 8); its tokenizer is not stated."""
PAPER_RANGE = (170, 280)
"""Where most of the paper's captions lie (figure 8)."""

WORDS = "words"
SHIPPED = "vlv-tiny"
_NGRAM = 4
_OPENING_WORDS = 3
_WORD = re.compile(r"\w+(?:[-'\u2019]\w+)*")
_SENTENCE = re.compile(r"[^.!?]+")


def words_of(text: str) -> list[str]:
    """Words in small letters.

    >>> words_of("A well-lit room, isn't it?")
    ['a', 'well-lit', 'room', "isn't", 'it']
    """
    return _WORD.findall(text.lower())


def short_hash(text: str) -> int:
    """64 bits of a text: a million of them fit where few texts would."""
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def repeats_sentence(text: str) -> bool:
    """Whether a sentence of at least three words occurs twice."""
    sentences = [tuple(words_of(part)) for part in _SENTENCE.findall(text)]
    long = [sentence for sentence in sentences if len(sentence) >= _OPENING_WORDS]
    return len(set(long)) < len(long)


def repeated_ngrams(words: Sequence[str], size: int = _NGRAM) -> tuple[int, int]:
    """How many n-grams of a text have occurred in it before, and how many there are."""
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return len(grams) - len(set(grams)), len(grams)


@dataclass
class CaptionStats:
    """Sums over captions.

    Attributes:
        captions: Number of captions.
        without: Images without one.
        lengths: Tokenizer to length to number of captions.
        vocabulary: Word to number of occurrences.
        openings: The first three words to number of captions.
        repeating: Captions that say a sentence twice.
        ngrams_repeated: 4-grams that had occurred in the same caption before.
        ngrams: All 4-grams.
        hashes: 64-bit hashes of the captions (captions), to count those that occur again.
    """

    captions: int = 0
    without: int = 0
    lengths: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    vocabulary: Counter[str] = field(default_factory=Counter)
    openings: Counter[str] = field(default_factory=Counter)
    repeating: int = 0
    ngrams_repeated: int = 0
    ngrams: int = 0
    hashes: list[NDArray[np.uint64]] = field(default_factory=list)

    def add(self, texts: Sequence[str], tokenizers: Sequence[str]) -> None:
        """Count some captions."""
        self.captions += len(texts)
        for text in texts:
            words = words_of(text)
            self.vocabulary.update(words)
            self.openings[" ".join(words[:_OPENING_WORDS])] += 1
            self.repeating += repeats_sentence(text)
            repeated, ngrams = repeated_ngrams(words)
            self.ngrams_repeated += repeated
            self.ngrams += ngrams
        for name in tokenizers:
            self.lengths[name].update(counter_of(name)(list(texts)))
        self.hashes.append(np.array([short_hash(text) for text in texts], np.uint64))

    def to_dict(self, most: int = 20) -> Json:
        """As JSON values."""
        lengths = {name: length_figures(counts) for name, counts in self.lengths.items()}
        hashes = np.concatenate(self.hashes) if self.hashes else np.empty(0, np.uint64)
        return {
            "captions": self.captions,
            "images_without_caption": self.without,
            "lengths": lengths,
            "paper": {
                "mean": PAPER_MEAN,
                "median": PAPER_MEDIAN,
                "most_between": list(PAPER_RANGE),
                "tokenizer": "not stated",
            },
            "vocabulary": len(self.vocabulary),
            "words": self.vocabulary.total(),
            "words_seen_once": sum(count == 1 for count in self.vocabulary.values()),
            "commonest_words": _commonest(self.vocabulary, most),
            "openings": len(self.openings),
            "commonest_openings": _commonest(self.openings, most),
            "captions_that_occur_again": len(hashes) - len(np.unique(hashes)),
            "captions_that_repeat_a_sentence": self.repeating,
            "share_of_repeated_4grams": self.ngrams_repeated / max(self.ngrams, 1),
        }


def add_sums(mine: object, other: object) -> None:
    """Add the sums of another part, field by field: numbers, lists, counters and whatever holds these."""
    for name, value in vars(other).items():
        match value:
            case Counter():
                getattr(mine, name).update(value)
            case dict():
                for key, counts in value.items():
                    getattr(mine, name)[key].update(counts)
            case int() | list():
                setattr(mine, name, getattr(mine, name) + value)
            case _:
                add_sums(getattr(mine, name), value)


def _commonest(counts: Counter[str], most: int) -> dict[str, int]:
    """The most frequent, of equal ones the first in the alphabet."""
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most])


def length_figures(counts: Counter[int]) -> Json:
    """Mean, median and the share in the paper's range, from length to number of captions."""
    total = max(counts.total(), 1)
    lengths = np.array(sorted(counts))
    ends = np.cumsum([counts[length] for length in lengths.tolist()])

    def quantile(share: float) -> int:
        place = int(np.searchsorted(ends, share * total))
        return int(lengths[min(place, len(lengths) - 1)]) if len(lengths) else 0

    low, high = PAPER_RANGE
    inside = sum(count for length, count in counts.items() if low <= length <= high)
    return {
        "mean": sum(length * count for length, count in counts.items()) / total,
        "median": quantile(0.5),
        "p5": quantile(0.05),
        "p95": quantile(0.95),
        "min": min(counts, default=0),
        "max": max(counts, default=0),
        "share_170_to_280": inside / total,
        "histogram": {str(length): counts[length] for length in lengths.tolist()},
    }


@lru_cache(maxsize=8)
def counter_of(name: str) -> Callable[[list[str]], list[int]]:
    """The function that counts the tokens of texts, without special tokens.

    Args:
        name: "words", "vlv-tiny" (of its caption decoder), a folder, or an id on the hub.

    Raises:
        ConfigError: There is no such tokenizer.
    """
    if name == WORDS:
        return lambda texts: [len(words_of(text)) for text in texts]
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(_folder_of(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"the tokenizer {name} cannot be loaded ({line})") from error
    return lambda texts: [
        len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ]


def _folder_of(name: str) -> str:
    if name != SHIPPED:
        return name
    from vlv.models.folder import find_folder

    return str(find_folder(SHIPPED) / "caption_decoder" / "tokenizer")
