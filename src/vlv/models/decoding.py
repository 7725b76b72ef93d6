"""Greedy search with the step of one token recorded: on a GPU one launch per token in place of a thousand.

The kernels of a step are the same for each token, as the cache of keys and values has its full length from the start and
what is not written yet is masked. `transformers` writes the same tokens, but has to start each kernel anew.
Shapes: B captions, Q positions of the prefix, T tokens at most, E width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LogitsProcessor,
    PreTrainedModel,
    StaticCache,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from vlv.errors import ConfigError
from vlv.models.arguments import MAX_SEED, finite, whole_number
from vlv.models.compilation import is_compiled
from vlv.models.draws import mixed_seed
from vlv.models.json_writing import checked_schema
from vlv.models.words import check_agreement, checked_words


@dataclass(frozen=True)
class Check:
    """What the frozen decoder says of a caption that it has verified."""

    score: float
    """Recovered share: 0 explains the image no better than no text, 1 as well as the best at hand."""
    margin: float | None
    """By how much the caption led the next candidate; None where there was no other."""
    num_candidates: int
    """Captions written, duplicates included."""


_MOST_TOKENS = 2**16
_MOST_BEAMS = 1000
MOST_WORDS = 1000
"""Longest caption that can be asked for, in words."""


@dataclass(frozen=True)
class Caption:
    """One generated caption."""

    text: str
    num_tokens: int
    """Generated tokens, without the end token."""
    finished: bool
    """Whether the model ended it, rather than being stopped at ``max_new_tokens``."""
    ids: tuple[int, ...] = field(default=(), compare=False, repr=False)
    """The generated tokens."""
    check: Check | None = None
    """Of a verified caption."""
    missing: tuple[str, ...] = ()
    """Included words that it does not have."""
    include_bias: float = 0.0
    """What was added to the logits of included words; 0 where the model wrote them by itself."""


@dataclass(frozen=True)
class Generation:
    """How captions are written.

    Raises:
        ConfigError: The fields contradict each other, or one is out of its range.
    """

    max_new_tokens: int | None = None
    """Longest caption; None is 300, or as many as the model has positions for."""
    num_beams: int = 1
    """1 is greedy search (or plain sampling)."""
    do_sample: bool = False
    """Sample tokens instead of taking the likeliest."""
    temperature: float = 1.0
    """Of sampling; without `do_sample` it must stay 1."""
    top_p: float = 1.0
    """Nucleus of sampling; without `do_sample` it must stay 1."""
    repetition_penalty: float = 1.0
    """1 is none."""
    early_stopping: bool = False
    """End the beam search as soon as enough beams have ended, however bad they are: a short improbable caption can then
    win over the right one that is still being written. The VLV authors do."""
    end_token: str | None = None
    """A token that ends the caption in place of the tokenizer's, such as "."."""
    tidy: bool | None = None
    """Drop unfinished and repeated sentences, see `tidy_caption`; None does where the model was not taught to end."""
    seed: int | Sequence[int] = 0
    """Of sampling: one for all captions, each of which then has draws of its own, or one per caption. So a sampled caption
    does not depend on its batch, and the global generator is left as it was."""
    style: str | None = None
    """Name of a style that the model was taught; None is the plain caption."""
    prompt: str | Sequence[str | None] | None = None
    """Instead of a style, the instruction in your own words: one for all captions, or one per image, None for a plain one."""
    words: int | None = None
    """Length in words, for a model that was taught lengths; None leaves it to the model."""
    known: str | Sequence[str | None] | None = None
    """What is known about the images, such as tags or a name, for a model that was taught to use it: one text for all, or one
    per image, None for one of which nothing is known."""
    schema: str | Mapping[str, Any] | None = None
    """JSON schema, or its text, that captions follow; of a caption that is cut off, a beginning of it."""
    include: str | Sequence[str] = ()
    """Words that captions should have: one that lacks a word is written again with the word made more likely."""
    exclude: str | Sequence[str] = ()
    """Words that captions must not have, as whole words in capitals or not; a plural is another word."""

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            whole_number("max_new_tokens", self.max_new_tokens, 1, _MOST_TOKENS)
        whole_number("num_beams", self.num_beams, 1, _MOST_BEAMS)
        for name in ("do_sample", "early_stopping", "tidy"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (value is not None or name != "tidy"):
                raise ConfigError(f"{name} is {value!r:.40}; give True or False")
        for seed in self.seed if isinstance(self.seed, list | tuple) else [self.seed]:
            whole_number("seed", seed, 0, MAX_SEED)
        for name in ("temperature", "top_p", "repetition_penalty"):
            if finite(name, getattr(self, name)) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; choose more than 0")
        if self.top_p > 1:
            raise ConfigError(f"top_p is {self.top_p}; choose at most 1")
        if not self.do_sample and (self.temperature != 1.0 or self.top_p != 1.0):
            raise ConfigError("temperature and top_p have no effect without do_sample; set it")
        if self.early_stopping and self.num_beams == 1:
            raise ConfigError("early_stopping has no effect on one beam; raise num_beams")
        self._check_instruction()
        self._check_words()

    def _check_instruction(self) -> None:
        if self.style is not None and self.prompt is not None:
            raise ConfigError("style and prompt are two ways to say what is wanted; leave one out")
        each: dict[str, Sequence[object]] = {"style": [self.style]}
        for name in ("prompt", "known"):
            value = getattr(self, name)
            each[name] = value if isinstance(value, list | tuple) else [value]
        for name, given in each.items():
            if not all(text is None or (isinstance(text, str) and text.strip()) for text in given):
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r:.40}; give a text, not only spaces"
                )

    def _check_words(self) -> None:
        if self.words is not None:
            whole_number("words", self.words, 1, MOST_WORDS)
        for name in ("include", "exclude"):
            object.__setattr__(self, name, checked_words(name, getattr(self, name)))
        check_agreement(self.include, self.exclude)
        if self.schema is None:
            return
        object.__setattr__(self, "schema", checked_schema(self.schema))
        if self.include or self.exclude or self.tidy or self.end_token is not None:
            raise ConfigError(
                "a caption by a schema is JSON; leave include, exclude, tidy and end_token out, or the schema"
            )

    @property
    def is_plain(self) -> bool:
        """Whether plain captions are wanted: nothing is asked for, of none of the images."""
        each: list[object] = [self.style, self.words, self.schema]
        for given in (self.prompt, self.known):
            each += given if isinstance(given, list | tuple) else [given]
        return all(one is None for one in each)

    def prompts(self, count: int) -> list[str | None]:
        """The prompt of each of `count` images.

        Raises:
            ConfigError: As many prompts were not given.
        """
        return _for_each(self.prompt, count, "prompts")

    def known_of(self, count: int) -> list[str | None]:
        """What is known about each of `count` images.

        Raises:
            ConfigError: As many texts were not given.
        """
        return _for_each(self.known, count, "texts of what is known")

    def seeds(self, count: int) -> list[int]:
        """The seed of each of `count` captions.

        Raises:
            ConfigError: As many seeds were not given.
        """
        if not isinstance(self.seed, Sequence):
            return [mixed_seed(int(self.seed), row) for row in range(count)]
        if len(self.seed) != count:
            raise ConfigError(f"{count} captions need as many seeds, got {len(self.seed)}")
        return list(self.seed)


def _for_each(given: str | Sequence[str | None] | None, count: int, name: str) -> list[str | None]:
    if given is None or isinstance(given, str):
        return [given] * count
    if len(given) != count:
        raise ConfigError(f"{count} images need as many {name}, got {len(given)}")
    return list(given)


class GenerationOptions(TypedDict, total=False):
    """The fields of `Generation` as keywords."""

    max_new_tokens: int | None
    num_beams: int
    do_sample: bool
    temperature: float
    top_p: float
    repetition_penalty: float
    early_stopping: bool
    end_token: str | None
    tidy: bool | None
    seed: int | Sequence[int]
    style: str | None
    prompt: str | Sequence[str | None] | None
    words: int | None
    known: str | Sequence[str | None] | None
    schema: str | Mapping[str, Any] | None
    include: str | Sequence[str]
    exclude: str | Sequence[str]


class RowSampling(LogitsProcessor):
    """Sampling whose draws belong to a row, whatever batch the row lies in.

    The likeliest token after Gumbel noise is a sample of the softmax (Gumbel 1954), so the search itself stays greedy.

    Args:
        seeds: Of each row.
        temperature: Of the logits.
        top_p: Share of the probability that the tokens to choose from hold.
        device: Of the logits.
    """

    def __init__(
        self, seeds: Sequence[int], temperature: float, top_p: float, device: torch.device
    ) -> None:
        self._rows = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(temperature))]
        if top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, V) with the noise of the next token."""
        for warp in self._warpers:
            scores = warp(input_ids, scores)
        noise = [
            torch.empty(scores.shape[1:], device=scores.device).exponential_(generator=row)
            for row in self._rows
        ]
        return scores.float() - torch.stack(noise).log()


_LOOK_EVERY = 16
"""Tokens after which it is asked whether all captions have ended, which waits for the GPU."""
_ALIGNED = 8
"""The length of the cache is a multiple, which fused attention wants of a mask."""


def can_record(llm: PreTrainedModel) -> bool:
    """Whether the step of this language model can be recorded: on a GPU, plain weights, rotary positions, full attention.

    Whatever is sharded, quantised, compiled or under autocast is left to transformers.
    """
    if not is_steady(llm) or torch.is_autocast_enabled("cuda"):
        return False
    devices = {parameter.device for parameter in llm.parameters()}
    return len(devices) == 1 and devices.pop().type == "cuda"


def can_share(llm: PreTrainedModel) -> bool:
    """Whether several captions of a prefix can go on from one reading of it: every layer attends to all positions."""
    config = llm.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and bool(llm._supports_attention_backend)


def read_once(llm: PreTrainedModel, prefix: Tensor, copies: int) -> DynamicCache:
    """Keys and values of all positions of a prefix (B, Q, E) but the last, for B N captions that go on from there."""
    cache = DynamicCache(config=llm.config)
    if prefix.shape[1] > 1:
        body: Any = llm.base_model
        body(inputs_embeds=prefix[:, :-1], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(copies)
    return cache


def is_steady(llm: PreTrainedModel) -> bool:
    """Whether each step of this language model does the same, wherever it is."""
    config = llm.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    plain = all(type(p) is nn.Parameter and p.is_floating_point() for p in llm.parameters())
    return (
        bool(llm._can_compile_fullgraph)
        and config._attn_implementation == "sdpa"
        and rope.get("rope_type") == "default"
        and kinds == {"full_attention"}
        and plain
        and not is_compiled(llm)
    )


@torch.no_grad()
def greedy_search(
    llm: PreTrainedModel, prefix: Tensor, *, max_new_tokens: int, end: int, pad: int
) -> Tensor:
    """The likeliest token after the other, as ``llm.generate`` without sampling and beams.

    On a GPU the step is recorded, elsewhere it is repeated.

    Args:
        llm: A causal language model that `is_steady`, in evaluation mode.
        prefix: (B, Q, E), on its device.
        max_new_tokens: T.
        end: Id of the token that ends a caption.
        pad: Id of what follows it.

    Returns:
        Ids, (B, T), ``pad`` after the end; where all end early, the last columns are ``pad``.
    """
    search = _Search(llm, prefix, max_new_tokens, end, pad)
    remaining = max_new_tokens - 1
    if remaining and prefix.is_cuda:
        advance = search.record()
        remaining -= 1
    else:
        advance = search.advance
    for count in range(remaining):
        if count % _LOOK_EVERY == 0 and bool(search.ended.all()):
            break
        advance()
    return search.ids


class _Search:
    """The captions so far; what a step reads and writes stays in the same places.

    Args: as of `greedy_search`.
    """

    def __init__(
        self, llm: PreTrainedModel, prefix: Tensor, max_new_tokens: int, end: int, pad: int
    ) -> None:
        batch_size, num_prefix, _ = prefix.shape
        device = prefix.device
        length = num_prefix + max_new_tokens - 1
        length += -length % _ALIGNED
        self._llm: Any = llm
        self._end, self._pad = end, pad
        self._cache = StaticCache(config=llm.config, max_cache_len=length)
        self._places = torch.arange(length, device=device)
        self._place = torch.tensor([num_prefix], device=device)  # of the token that is read next
        self._count = torch.zeros(1, dtype=torch.long, device=device)  # tokens so far
        self._last = torch.empty(batch_size, 1, dtype=torch.long, device=device)
        self.ids = torch.full((batch_size, max_new_tokens), pad, device=device)
        self.ended = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self._take(self._read(inputs_embeds=prefix))

    def advance(self) -> None:
        """One token more."""
        seen = self._places <= self._place  # (Q + T,)
        logits = self._read(
            input_ids=self._last,
            position_ids=self._place[None],
            attention_mask=seen[None, None, None],
        )
        self._place += 1
        self._take(logits)

    def record(self) -> Callable[[], None]:
        """One token more, and the function that writes each further one."""
        device = self.ids.device
        with torch.cuda.device(device):
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(here)
            with torch.cuda.stream(aside):  # kernels load and choose themselves with the first call
                self.advance()
            here.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Another thread may pin memory for the next batch meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.advance()
        return graph.replay

    def _read(self, **inputs: Tensor) -> Tensor:
        """Logits of the last position, (B, V)."""
        found = self._llm(past_key_values=self._cache, use_cache=True, logits_to_keep=1, **inputs)
        logits: Tensor = found.logits[:, -1]
        return logits

    def _take(self, logits: Tensor) -> None:
        """Write down the likeliest token, (B, V)."""
        token = logits.argmax(-1).masked_fill(self.ended, self._pad)  # (B,)
        self._last.copy_(token[:, None])
        self.ids.index_copy_(1, self._count, token[:, None])
        self._count += 1
        self.ended |= token == self._end


_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+")


def tidy_caption(text: str) -> str:
    """Cut a caption after its last period and drop sentences that stood there before.

    The VLV authors' post-processing: their language model is not taught an end token and goes on,
    repeating itself, until it is stopped. A caption without a period stays as it is.

    >>> tidy_caption("A cat. A dog. A cat. An unfinished sen")
    'A cat. A dog.'
    """
    head, period, _ = text.rpartition(".")
    sentences = _BETWEEN_SENTENCES.split((head + period or text).strip())
    return " ".join(dict.fromkeys(sentences))
