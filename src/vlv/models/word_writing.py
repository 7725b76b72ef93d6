"""Writes captions without excluded words and with included ones.

An excluded word is kept out while a caption is written, however the tokenizer may spell it. `NoBadWordsLogitsProcessor` of
transformers knows single sequences of tokens: it would let the word through in other pieces, and stop longer words that end in
its pieces. An included word is made more likely by transformers' `SequenceBiasLogitsProcessor` until it stands there; constrained
beam search is no part of transformers any more.

Shapes: B prefixes, N captions of each, Q positions, E language-model width, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor, SequenceBiasLogitsProcessor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from vlv.errors import ConfigError
from vlv.models.words import has_bounds, missing_words, pattern_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from vlv.models.decoding import Caption, Generation

    Write = Callable[[Tensor, Generation, int, Sequence[LogitsProcessor]], list[Caption]]
    """Writes N captions behind each prefix (B, Q, E), with some processors of logits."""

BIASES = (1.0, 2.0, 4.0, 6.0, 8.0)
"""What is added to the logits of included words, until a caption has them; more gives sentences that are none."""
_MOST_RETREATS = 8
"""Times that a caption is written again because it began an excluded word."""
_LETTER = re.compile(r"\w")
_PROBE = "A red cube, “caf\u00e9” \u732b.\n"

Forbidden = Mapping[tuple[int, ...], set[int]]
"""Tokens that must not follow the tokens so far."""


class TokenTexts:
    """What each token of a language model adds to a text, in bytes.

    Args:
        tokenizer: Byte-level, or SentencePiece with bytes for what it does not know.

    Raises:
        ConfigError: It is of another kind.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._completing: dict[tuple[str, ...], dict[tuple[str, bytes], list[int]]] = {}
        added = tokenizer.added_tokens_decoder
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        codes = {char: byte for byte, char in bytes_to_unicode().items()}
        plain = {id: token for id, token in enumerate(tokens) if token and id not in added}
        is_byte_level = all(char in codes for token in plain.values() for char in token)
        self._bytes = [b""] * len(tokens)  # special tokens add nothing
        for id, token in plain.items():
            self._bytes[id] = bytes(codes[x] for x in token) if is_byte_level else _piece(token)
        for id, one in added.items():
            if id < len(tokens) and not one.special:
                self._bytes[id] = one.content.encode()
        ids = tokenizer(_PROBE, add_special_tokens=False).input_ids
        if self.text(ids).strip() != _PROBE.strip():
            raise ConfigError(
                "words can be included or excluded where tokens spell a text byte by byte, and this language model's do not"
            )

    def text(self, ids: Sequence[int]) -> str:
        """The text of some tokens; what is no whole character yet is a replacement character."""
        return self.raw(ids).decode("utf-8", "replace")

    def raw(self, ids: Sequence[int]) -> bytes:
        """The bytes of some tokens."""
        known = len(self._bytes)  # models may have more tokens than their tokenizers
        return b"".join(self._bytes[id] for id in ids if id < known)

    def completing(self, words: tuple[str, ...], text: str, rest: bytes) -> list[int]:
        """The tokens behind which one of some words would stand in a text.

        Args:
            words: The words; what was found for the last ones is remembered.
            text: The text, without such a word.
            rest: Bytes at its end that are no whole character yet.
        """
        if words not in self._completing:
            self._completing = {words: {}}
        known = self._completing[words]
        if (text, rest) not in known:
            search = pattern_of(words).search
            each = ((rest + raw).decode("utf-8", "replace") for raw in self._bytes)
            known[text, rest] = [id for id, more in enumerate(each) if search(text + more)]
        return known[text, rest]

    def ids(self, word: str) -> list[int]:
        """The tokens of a word that stands behind another one."""
        before, both = self._tokenizer(["x", f"x {word}"], add_special_tokens=False).input_ids
        return list(both[len(before) :])


def _piece(token: str) -> bytes:
    """What a piece of SentencePiece stands for."""
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return bytes.fromhex(byte[1])
    return token.replace("\u2581", " ").encode()


class ExcludedWords(LogitsProcessor):
    """Forbids each token with which an excluded word would stand at the end of a caption, or within it.

    Args:
        words: Excluded ones.
        texts: Of the tokens.
        forbidden: Of each row, what else must not follow.

    Attributes:
        stuck: Of each row, the beginnings of excluded words that the model would have completed: the tokens before, and
            the token with which the word began.
    """

    def __init__(
        self, words: tuple[str, ...], texts: TokenTexts, forbidden: Sequence[Forbidden] = ()
    ) -> None:
        self._words, self._texts, self._forbidden = words, texts, forbidden
        self._longest = max(map(len, words))
        self.stuck: dict[int, list[tuple[tuple[int, ...], int]]] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B N, V) behind captions (B N, T)."""
        wanted = scores.argmax(1).tolist()
        scores = scores.clone()
        for row, ids in enumerate(input_ids.tolist()):
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            text = decoder.decode(self._texts.raw(ids))
            end = self._open_end(re.sub(r"\s+", " ", text))
            completing = self._texts.completing(self._words, end, bytes(decoder.getstate()[0]))
            scores[row, completing] = -torch.inf
            if self._forbidden and (more := self._forbidden[row].get(tuple(ids))):
                scores[row, list(more)] = -torch.inf
            if wanted[row] in completing and self._goes_on(end, wanted[row]):
                self._remember(row, ids, len(end))
        return scores

    def _open_end(self, text: str) -> str:
        """What of a text an excluded word may begin with; else a letter for the word it ends in, if it does.

        What a token completes depends on nothing else, so that few beginnings have to be looked up.
        """
        for start in range(max(0, len(text) - self._longest), len(text)):
            is_inside = start > 0 and has_bounds(text[start]) and _LETTER.match(text[start - 1])
            end = text[start:].lower()
            if not is_inside and any(word.lower().startswith(end) for word in self._words):
                return text[start:]
        return "x" if _LETTER.match(text[-1:]) else ""

    def _goes_on(self, end: str, id: int) -> bool:
        """Whether a token goes on with the word that a text ends in."""
        return bool(_LETTER.match(end[-1:]) and _LETTER.match(self._texts.text([id])))

    def _remember(self, row: int, ids: Sequence[int], length: int) -> None:
        count, left = len(ids), length
        while count > 0 and left > 0:
            count -= 1
            left -= len(self._texts.text(ids[count : count + 1]).lstrip())
        self.stuck.setdefault(row, []).append((tuple(ids[:count]), ids[count]))


class IncludedWords(LogitsProcessor):
    """Makes words more likely, each until a caption has it.

    Args:
        words: Included ones.
        texts: Of the tokens.
        bias: Added to the logits of tokens with which a word begins or goes on.
    """

    def __init__(self, words: Sequence[str], texts: TokenTexts, bias: float) -> None:
        self._texts = texts
        self._biased = {word: _biased(word, texts, bias) for word in words}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B N, V) behind captions (B N, T)."""
        scores = scores.clone()
        written = [self._texts.text(ids) for ids in input_ids.tolist()]
        for word, biased in self._biased.items():
            rows = [row for row, text in enumerate(written) if missing_words([word], text)]
            if rows:
                scores[rows] = biased(input_ids[rows], scores[rows])
        return scores


def _biased(word: str, texts: TokenTexts, bias: float) -> SequenceBiasLogitsProcessor:
    """A bias on each token of a word, once the tokens before it are there; within a sentence and at its beginning."""
    forms = [texts.ids(form) for form in (word, word[0].upper() + word[1:])]
    parts = {tuple(ids[:end]) for ids in forms for end in range(1, len(ids) + 1)}
    return SequenceBiasLogitsProcessor([[list(part), bias] for part in sorted(parts)])


def write_with_words(
    write: Write, e: Tensor, how: Generation, copies: int, texts: TokenTexts
) -> list[Caption]:
    """Write captions without the excluded words, and as far as possible with the included ones.

    A caption that lacks a word is written again, with the words made more likely from one time to the next. Where none has
    them all, the one that has most is kept and says what it lacks.

    Args:
        write: Writes captions.
        e: Prefixes, (B, Q, E).
        how: With the words.
        copies: N captions behind each prefix.
        texts: Of the tokens.

    Returns:
        B N captions.
    """
    include = tuple(how.include)

    def written(
        e: Tensor, how: Generation, copies: int, more: Sequence[LogitsProcessor], bias: float
    ) -> list[Caption]:
        found = _write_without(write, e, how, copies, texts, more)
        return [
            replace(x, missing=missing_words(include, x.text), include_bias=bias) for x in found
        ]

    kept = written(e, how, copies, (), 0.0)
    for bias in BIASES:
        rows = [row for row, x in enumerate(kept) if x.missing]
        if not rows:
            break
        more = [IncludedWords(include, texts, bias)]
        again = written(*_only(rows, e, how, copies), more, bias)
        for row, new in zip(rows, again, strict=True):
            if len(new.missing) < len(kept[row].missing):
                kept[row] = new
    return kept


def _write_without(
    write: Write,
    e: Tensor,
    how: Generation,
    copies: int,
    texts: TokenTexts,
    more: Sequence[LogitsProcessor],
) -> list[Caption]:
    """Write captions without the excluded words.

    One that began such a word, in a token that others begin with too, is written again and takes another token there; beams
    turn away from it by themselves.
    """
    if not how.exclude:
        return write(e, how, copies, more)
    words = tuple(how.exclude)
    guard = ExcludedWords(words, texts)
    kept = write(e, how, copies, [*more, guard])
    forbidden: list[dict[tuple[int, ...], set[int]]] = [{} for _ in kept]
    rows = list(range(len(kept)))
    for _ in range(_MOST_RETREATS if how.num_beams == 1 else 0):
        stuck = {rows[place]: found for place, found in guard.stuck.items()}
        rows = []
        for row, found in stuck.items():
            on_path = [x for x in found if kept[row].ids[: len(x[0]) + 1] == (*x[0], x[1])]
            for before, token in on_path[:1]:  # what follows will be another text
                forbidden[row].setdefault(before, set()).add(token)
                rows.append(row)
        if not rows:
            break
        guard = ExcludedWords(words, texts, [forbidden[row] for row in rows])
        again = write(*_only(rows, e, how, copies), [*more, guard])
        for row, new in zip(rows, again, strict=True):
            kept[row] = new
    return kept


def _only(
    rows: Sequence[int], e: Tensor, how: Generation, copies: int
) -> tuple[Tensor, Generation, int]:
    """What writes some of B N captions again, each with its own seed."""
    seeds = how.seeds(len(e) * copies)
    own = replace(how, seed=[seeds[row] for row in rows], prompt=None, known=None)
    return e[[row // copies for row in rows]], own, 1
