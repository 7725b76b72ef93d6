"""What the demo shows: images run through a model in every direction.

Shapes: B images, Q queries, D text width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image

from vlv.data.framing import frame
from vlv.jobs.inputs import open_record
from vlv.models.context import Context
from vlv.toyworld.claims import find_grammar
from vlv.toyworld.render import render
from vlv.toyworld.scene import Scene, sample_scene

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from vlv.data.records import Record
    from vlv.models.decoding import Caption
    from vlv.models.doubts import Verdict
    from vlv.models.pipeline import VLVPipeline

SPLITS = (0.75, 0.5, 0.25)
"""Shares of the first image's leading tokens in the mixes."""


@dataclass(frozen=True, slots=True)
class Subject:
    """An image to show."""

    name: str
    image: Image.Image
    scene: Scene | None = None
    """What is in it, where that is known."""


@dataclass(frozen=True, slots=True)
class Case:
    """One image and what the model makes of it."""

    subject: Subject
    """Brought to the model's size."""
    reconstruction: Image.Image
    """Generated from the caption embedding."""
    caption: Caption
    regenerated: Image.Image
    """Generated from the caption, as text."""
    cut: bool
    """Whether the caption is longer than the text tower, which then reads its beginning only."""
    verdict: Verdict | None = None
    """What the frozen decoder says of the caption; None where the model was not calibrated, or the caption is empty."""


@dataclass(frozen=True, slots=True)
class Mix:
    """Two embeddings made one."""

    label: str
    image: Image.Image
    caption: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How images are generated."""

    seed: int = 0
    steps: int = 20
    guidance: float = 2.0
    max_new_tokens: int | None = None
    """Longest caption; None is 300 tokens, or as many as the model has."""


@dataclass(frozen=True, slots=True)
class Demo:
    """Everything on the page."""

    cases: tuple[Case, ...]
    mixes: tuple[Mix, ...]
    """Of the first two cases; none where there is one case."""
    shape: tuple[int, int]
    """(Q, D) of a caption embedding."""


def held_out_subjects(num: int, seed: int) -> list[Subject]:
    """Render `num` scenes of the split "test", which no training sees."""
    scenes = [sample_scene(seed, index, "test") for index in range(num)]
    return [
        Subject(f"test-{index:07d}", Image.fromarray(render(scene).image), scene)
        for index, scene in enumerate(scenes)
    ]


def own_subjects(records: Sequence[Record]) -> tuple[list[Subject], list[str]]:
    """Open files; return the good ones, and for each bad one what is wrong with it."""
    opened = [open_record(record) for record in records]
    subjects = [Subject(item.record.name, item.image) for item in opened if item.image is not None]
    return subjects, [item.error for item in opened if item.error is not None]


def run(
    pipe: VLVPipeline, subjects: Sequence[Subject], sampling: Sampling, *, progress: bool = False
) -> Demo:
    """Take images through the model: to the embedding, back, to words, and from the words back.

    Args:
        pipe: A model that captions and reconstructs.
        subjects: One or more.
        sampling: How images are generated.
        progress: Show bars on stderr.

    Returns:
        What the page shows.
    """
    subjects = [
        Subject(p.name, frame(p.image, pipe.image_size, pipe.framing), p.scene) for p in subjects
    ]
    z = pipe.embed([p.image for p in subjects], progress=progress)  # (B, Q, D)
    captions = pipe.describe(z=z, max_new_tokens=sampling.max_new_tokens, progress=progress)
    reconstruction = _sample(pipe, pipe.context(z), sampling, progress=progress)
    texts = [pipe.decoder.encode_text([caption.text]) for caption in captions]
    regenerated = _sample(
        pipe, Context.cat([text.c for text in texts]), sampling, progress=progress
    )
    cases = [
        Case(subject, image, caption, again, bool(text.num_truncated), verdict)
        for subject, image, caption, again, text, verdict in zip(
            subjects,
            reconstruction,
            captions,
            regenerated,
            texts,
            _verdicts(pipe, subjects, captions),
            strict=True,
        )
    ]
    mixes = make_mixes(pipe, z[0], z[1], sampling, progress=progress) if len(z) > 1 else []
    return Demo(tuple(cases), tuple(mixes), (z.shape[1], z.shape[2]))


def _verdicts(
    pipe: VLVPipeline, subjects: Sequence[Subject], captions: Sequence[Caption]
) -> list[Verdict | None]:
    """The decoder's word on each caption."""
    if pipe.calibration is None:
        return [None] * len(subjects)
    read_claims = find_grammar(pipe.calibration.claims)
    return [
        pipe.verify(subject.image, caption.text, read_claims=read_claims)
        if caption.text.strip()
        else None
        for subject, caption in zip(subjects, captions, strict=True)
    ]


def make_mixes(
    pipe: VLVPipeline, first: Tensor, second: Tensor, sampling: Sampling, *, progress: bool = False
) -> list[Mix]:
    """Join the leading tokens of two embeddings (Q, D) at each of `SPLITS` (paper, section 4.4.2), and average them."""
    length = len(first)
    keeps = [(round(length * share), length - round(length * share)) for share in SPLITS]
    labels = [f"{a} + {b} tokens" for a, b in keeps]
    zs = [pipe.mix([first, second], keep=keep) for keep in keeps]
    z = torch.stack([*zs, pipe.mix([first, second], mode="average")])
    captions = pipe.describe(z=z, max_new_tokens=sampling.max_new_tokens, progress=progress)
    images = _sample(pipe, pipe.context(z), sampling, progress=progress)
    return [
        Mix(label, image, caption.text)
        for label, image, caption in zip([*labels, "average"], images, captions, strict=True)
    ]


def _sample(
    pipe: VLVPipeline, c: Context, sampling: Sampling, *, progress: bool
) -> list[Image.Image]:
    return pipe.draw(
        c,
        seed=sampling.seed,
        steps=sampling.steps,
        guidance=sampling.guidance,
        progress=progress,
    )
