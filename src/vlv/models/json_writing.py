"""Captions that are JSON of a schema: llguidance tells which tokens may follow (`pip install "vlv[json]"`).

Shapes: B captions, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import importlib
import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LogitsProcessor

from vlv.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_LONGEST_SCHEMA = 100_000
_COMPACT = {"whitespace_flexible": False}
"""Without it, a model may go on with spaces for ever."""


def checked_schema(given: object) -> str:
    """A JSON schema as a text.

    Args:
        given: The schema, or its text.

    Raises:
        ConfigError: It is no schema, asks for something that is not supported, or the package llguidance is missing.
    """
    try:
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        is_schema = len(text) <= _LONGEST_SCHEMA and isinstance(json.loads(text), dict)
    except (TypeError, ValueError, RecursionError):
        is_schema = False
    if not is_schema:
        raise ConfigError(f"schema is {given!r:.60}; give a JSON schema, which is an object")
    _grammar_of(text)
    return text


@lru_cache(maxsize=8)
def _grammar_of(schema: str) -> str:
    matcher = _load("llguidance").LLMatcher
    grammar = str(matcher.grammar_from_json_schema(schema, overrides=_COMPACT))
    if fault := " ".join(matcher.validate_grammar(grammar).split()):
        raise ConfigError(f"the schema cannot be followed: {fault:.200}")
    return grammar


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            'captions by a schema need the package llguidance: pip install "vlv[json]"'
        ) from None


class JsonWriting:
    """What turns captions into JSON, for one language model.

    Args:
        tokenizer: Of the language model.
        num_tokens: V, which may be more than the tokenizer has.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> None:
        self._tokenizer = _load("llguidance.hf").from_tokenizer(tokenizer, n_vocab=num_tokens)
        self._num_tokens = num_tokens

    def __deepcopy__(self, memo: object) -> JsonWriting:
        """A copy of the caption decoder has the same; nothing in it changes."""
        return self

    def processor(self, schema: str) -> LogitsProcessor:
        """The processor of logits for captions that are written together; `schema` as of `checked_schema`."""
        start = _load("llguidance").LLMatcher(self._tokenizer, _grammar_of(schema))
        return _JsonProcessor(start, self._num_tokens)


class _JsonProcessor(LogitsProcessor):
    """Forbids tokens behind which a caption could not become JSON of the schema."""

    def __init__(self, start: Any, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._known: dict[tuple[int, ...], Any] = {(): start}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, V) behind captions (B, T)."""
        rows = list(map(tuple, input_ids.tolist()))
        self._known = {row: self._behind(row) for row in rows}
        allowed = np.stack([self._allowed(self._known[row]) for row in rows])  # (B, V)
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -torch.inf)

    def _behind(self, row: tuple[int, ...]) -> Any:
        """The state behind a caption, whose beginning was there at the last call, perhaps of another beam."""
        before = self._known[row[:-1]]
        if not row or before.is_stopped():
            return before
        matcher = before.deep_copy()
        matcher.consume_token(row[-1])
        return matcher

    def _allowed(self, matcher: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """The end alone where the JSON is complete."""
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._num_tokens].astype(bool)
