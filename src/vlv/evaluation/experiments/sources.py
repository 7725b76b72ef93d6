"""Who writes the captions: a file, a VLV model, an endpoint, the truth, or the truth spoilt as a control.

A source is written ``NAME=KIND`` or ``NAME=KIND:VALUE``:

| kind | captions |
|---|---|
| ``true`` | the first reference of each sample |
| ``other`` | that of the next sample: the floor of everything that compares pairs |
| ``words`` | the words of the first reference in random order |
| ``again`` | in the toy world, the whole truth in other words: what a right caption scores against a reference |
| ``file:PATH`` | JSON lines with ``id`` (or ``file_name``) and ``caption``, as ``vlv caption`` writes them |
| ``model:MODEL`` | a VLV model |
| ``florence:MODEL`` | the detailed captions of a Florence-2, from which encoders are made: a rival of their captions |
| ``endpoint:MODEL@URL`` | a vision model behind an OpenAI-compatible address |
| ``z:MODEL`` | none: images are reconstructed from the caption embedding itself |
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlv.endpoint import Answer, ChatRequest, Client, run, split_spec, user
from vlv.errors import ConfigError, DataError, RequestError, VLVError
from vlv.evaluation.experiments.run import Emit, batches
from vlv.evaluation.experiments.samples import Sample, read_rows
from vlv.jobs.caption_files import names_of
from vlv.jobs.table import Row
from vlv.models.pixels import as_batch
from vlv.toyworld.writing import describe

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

    from vlv.models.encoder import VLVEncoder
    from vlv.models.pipeline import VLVPipeline

CAPTION_KEY = ("id", "source")
OF_REFERENCES = ("true", "other", "words", "again")
KINDS = (*OF_REFERENCES, "file", "model", "florence", "endpoint", "z")

CAPTION_PROMPT = (
    "Describe this picture in one paragraph, for a reader who has to draw it without having seen it. Say what kind of picture "
    "it is, what is in it, how many of each, their colours, sizes and materials, and where they are, to the left and right, in "
    "front and behind; then light and background. State only what can be seen."
)
"""What an endpoint is asked for, in our own words; the paper's prompts for its baselines are not known."""

MAX_CAPTION_TOKENS = 400


@dataclass(frozen=True, slots=True)
class Source:
    """One writer of captions, or of caption embeddings."""

    name: str
    kind: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}" if self.value else self.kind


def parse_source(text: str) -> Source:
    """Read ``NAME=KIND:VALUE``; without a name it is called by its kind.

    Raises:
        ConfigError: The kind is unknown, or its value is missing.

    >>> parse_source("ours=model:vlv-tiny")
    Source(name='ours', kind='model', value='vlv-tiny')
    """
    name, equals, spec = text.partition("=")
    name, spec = (name, spec) if equals else ("", text)
    kind, _, value = spec.partition(":")
    if kind not in KINDS:
        raise ConfigError(f'"{text}" is no source; write NAME=KIND with one of {", ".join(KINDS)}')
    if (kind in OF_REFERENCES) == bool(value):
        needs = "takes no value" if value else f"needs a value, as {kind}:VALUE"
        raise ConfigError(f'the source "{text}" {needs}')
    if kind == "endpoint":
        split_spec(value)  # complain now, before anything is written
    name = name or kind
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ConfigError(f'"{name}" is no name for a source; use letters, digits and hyphens')
    return Source(name, kind, value)


def parse_sources(texts: Sequence[str]) -> list[Source]:
    """Read several, each with a name of its own.

    Raises:
        ConfigError: One is wrong, or two have the same name.
    """
    sources = [parse_source(text) for text in texts]
    names = [source.name for source in sources]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two sources are called {min(doubled)}; give each its NAME=")
    if not sources:
        raise ConfigError("there is no source; name one or more with --from NAME=KIND:VALUE")
    return sources


def captions_only(texts: Sequence[str]) -> dict[str, str]:
    """Sources by name, as settings hold them, for an experiment that reads captions.

    Raises:
        ConfigError: One is wrong, or writes no captions.
    """
    sources = parse_sources(texts)
    if any(source.kind == "z" for source in sources):
        raise ConfigError("this experiment reads captions; a source z writes none")
    return {source.name: str(source) for source in sources}


Captioner = Callable[[Sequence[Sample], Emit], None]
"""Hands on rows with ``id``, ``caption``, and ``error`` where there is none."""


def true_captions(everything: Sequence[Sample], kind: str, seed: int) -> Captioner:
    """References as captions, in their places, one further on, or with their words shuffled; or the truth in other words.

    Args:
        everything: All samples of the run.
        kind: "true", "other", "words" or "again".
        seed: Of the shuffling, and of the other words.

    Raises:
        ConfigError: The truth of a sample that is to be told again is not known.
    """
    step = 1 if kind == "other" else 0
    texts = {
        sample.id: everything[(row + step) % len(everything)].references
        for row, sample in enumerate(everything)
    }
    if kind == "again":
        texts = {sample.id: (_told_again(sample, seed),) for sample in everything}

    def row(sample: Sample) -> Row:
        if not texts[sample.id]:
            return {"id": sample.id, "error": f"{sample.id} has no reference caption"}
        caption = texts[sample.id][0]
        if kind == "words":
            rng = np.random.default_rng([seed, sample.seed % 2**32, 2])
            caption = " ".join(rng.permutation(caption.split()))
        return {"id": sample.id, "caption": caption}

    return lambda samples, emit: emit([row(sample) for sample in samples])


def _told_again(sample: Sample, seed: int) -> str:
    rng = np.random.default_rng([seed, sample.seed % 2**32, 3])
    return describe(sample.known_scene, "detailed", rng)


def file_captions(path: Path, everything: Sequence[Sample]) -> Captioner:
    """Captions that somebody has written into JSON lines.

    Raises:
        DataError: The file cannot be read, or none of its captions belongs to a sample.
    """
    rows: dict[str, Row] = {}
    for row in read_rows(path):
        for name in (row.get("id"), row.get("file_name")):
            if name is not None and row.get("caption"):
                rows.update(dict.fromkeys(names_of(str(name)), row))

    def find(sample: Sample) -> Row | None:
        return next((rows[name] for name in names_of(sample.id) if name in rows), None)

    def caption(sample: Sample) -> Row:
        found = find(sample)
        if found is None:
            return {"id": sample.id, "error": f"{path} has no caption of {sample.id}"}
        kept: Row = {k: found[k] for k in ("n_tokens", "finish_reason", "model") if k in found}
        return {"id": sample.id, "caption": str(found["caption"]), **kept}

    if not any(find(sample) for sample in everything):
        first = next(iter(rows), "nothing")
        raise DataError(
            f"none of the captions in {path} (of {first} and others) belongs to a sample such as {everything[0].id}; "
            "the ids must be those of the images"
        )
    return lambda samples, emit: emit([caption(sample) for sample in samples])


def model_captions(
    pipe: VLVPipeline, batch_size: int, max_new_tokens: int | None = None
) -> Captioner:
    """Greedy captions of a VLV model."""

    def write(samples: Sequence[Sample], emit: Emit) -> None:
        for batch in batches(samples, batch_size):
            images, bad = open_images(batch)
            written = (
                pipe.describe(
                    list(images.values()), batch_size=batch_size, max_new_tokens=max_new_tokens
                )
                if images
                else []
            )
            rows = [
                {
                    "id": id,
                    "caption": caption.text,
                    "n_tokens": caption.num_tokens,
                    "finish_reason": "stop" if caption.finished else "length",
                }
                for id, caption in zip(images, written, strict=True)
            ]
            emit([*bad, *rows])

    return write


def florence_captions(
    encoder: VLVEncoder, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Captioner:
    """Greedy captions of a Florence-2.

    Args:
        encoder: Made of it, with the prompt of the captions.
        tokenizer: Its own.
        batch_size: Images worked on together.
    """
    end, most = tokenizer.eos_token_id, min(MAX_CAPTION_TOKENS, encoder.longest_caption)

    def write(samples: Sequence[Sample], emit: Emit) -> None:
        for batch in batches(samples, batch_size):
            images, bad = open_images(batch)
            if images:
                pixels = as_batch(list(images.values()), encoder.config.image_size)
                ids = encoder.write(pixels.to(encoder.device), most).cpu()
                texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
                # the first token is the same, and the last one that there is room for is forced to be
                ended = (ids[:, 1:most] == end).any(1).tolist()
                bad += [
                    {
                        "id": id,
                        "caption": " ".join(text.split()),
                        "finish_reason": "stop" if is_whole else "length",
                    }
                    for id, text, is_whole in zip(images, texts, ended, strict=True)
                ]
            emit(bad)

    return write


def endpoint_captions(client: Client) -> Captioner:
    """Captions of a vision model behind an address, row by row as the answers come."""

    def write(samples: Sequence[Sample], emit: Emit) -> None:
        asked = ((({"id": sample.id}), sample, CAPTION_PROMPT) for sample in samples)
        ask_about(client, asked, MAX_CAPTION_TOKENS, _caption, emit)

    return write


def _caption(answer: Answer) -> Row:
    return {"caption": " ".join(answer.text.split()), "finish_reason": answer.finish_reason}


def ask_all(
    client: Client,
    requests: Iterator[tuple[Row, ChatRequest]],
    read: Callable[[Answer], Row],
    emit: Emit,
) -> None:
    """Ask an endpoint, many requests at a time, and hand on a row for each answer as it comes.

    Args:
        client: Not open yet.
        requests: The columns that tell a row apart, and what is asked for it.
        read: From an answer to the other columns; raises ValueError where the answer is none, which fails that row.
        emit: Receives the rows.

    Raises:
        EndpointError: The endpoint cannot be reached or refuses us, or the budget is used up. The rows so far are kept.
    """

    def on_answer(key: Row, answer: Answer | RequestError) -> None:
        emit([{**key, **_read_answer(answer, read)}])

    run(client, requests, on_answer)


def ask_about(
    client: Client,
    items: Iterable[tuple[Row, Sample, str]],
    max_tokens: int,
    read: Callable[[Answer], Row],
    emit: Emit,
) -> None:
    """Ask about images: as `ask_all`, for rows that each have a sample and a prompt; one that cannot be opened fails."""
    bad: list[Row] = []

    def requests() -> Iterator[tuple[Row, ChatRequest]]:
        for key, sample, prompt in items:
            images, failed = open_images([sample])
            bad.extend({**row, **key} for row in failed)
            for image in images.values():
                asked = user(prompt, png(image))
                yield key, ChatRequest([asked], max_tokens=max_tokens, temperature=0.0)

    ask_all(client, requests(), read, emit)
    if bad:
        emit(bad)


def _read_answer(answer: Answer | RequestError, read: Callable[[Answer], Row]) -> Row:
    if isinstance(answer, RequestError):
        return {"error": str(answer)}
    about = {"model": answer.model, "n_tokens": answer.completion_tokens, "usd": answer.usd}
    if answer.refusal or not answer.text.strip():
        reason = answer.refusal or answer.finish_reason
        return {**about, "error": f"the endpoint gave no text: {reason}"}
    try:
        return {**read(answer), **about}
    except ValueError as error:
        return {**about, "error": f"{error}: {' '.join(answer.text.split())[:200]!r}"}


def open_images(samples: Sequence[Sample]) -> tuple[dict[str, Image.Image], list[Row]]:
    """The images that can be opened, by id, and a row with the error of each of the others."""
    images: dict[str, Image.Image] = {}
    bad: list[Row] = []
    for sample in samples:
        try:
            images[sample.id] = sample.load()
        except VLVError as error:
            bad.append({"id": sample.id, "error": str(error)})
    return images, bad


def png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
