"""Captions that the decoder has checked: several are written of each image, and the best explained image decides.

Shapes: B images, N candidates of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from vlv.errors import ConfigError
from vlv.models.arguments import finite, whole_number
from vlv.models.decoding import Caption, Check, Generation
from vlv.models.draws import mixed_seed
from vlv.models.scoring import Scores, Scoring, score_captions

if TYPE_CHECKING:
    from torch import Tensor

    from vlv.models.captioner import CaptionDecoder
    from vlv.models.context import Context
    from vlv.models.diffusion import DiffusionDecoder

_FIRST_ROUND = 4
"""Candidates of every image before any is settled; each further round doubles them."""
_MOST_CANDIDATES = 1000


@dataclass(frozen=True)
class Verification:
    """How captions are verified.

    Raises:
        ConfigError: A field is out of its range.
    """

    candidates: int = 8
    """N at most: the caption that would be written without verification, and samples."""
    temperature: float = 0.7
    """Of the samples: at 1 more of them are worse than what greedy search writes."""
    enough: float | None = None
    """Write no more for an image whose best caption explains this share of what its own embedding z explains; None always
    writes N."""
    scoring: Scoring = field(default_factory=lambda: Scoring(timesteps=1))
    """One timestep orders candidates as well as several, at a share of the cost (docs/decisions.md)."""

    def __post_init__(self) -> None:
        whole_number("candidates", self.candidates, 2, _MOST_CANDIDATES)
        if finite("temperature", self.temperature) <= 0:
            raise ConfigError(f"temperature is {self.temperature}; choose more than 0")
        if self.enough is not None:
            finite("enough", self.enough)

    def rounds(self) -> list[int]:
        """How many candidates an image has after each round.

        >>> Verification(12, enough=1.0).rounds(), Verification(12).rounds()
        ([4, 8, 12], [12])
        """
        if self.enough is None:
            return [self.candidates]
        sizes, size = [], _FIRST_ROUND
        while size < self.candidates:
            sizes.append(size)
            size *= 2
        return [*sizes, self.candidates]


def verified_captions(
    captioner: CaptionDecoder,
    decoder: DiffusionDecoder,
    latents: Tensor,
    c: Context,
    generation: Generation,
    how: Verification,
) -> list[Caption]:
    """Write several captions of each image and keep the one that explains it best.

    Args:
        captioner: Writes the candidates.
        decoder: Judges them.
        latents: Of the images, (B, k, h, w).
        c: Contexts of the images' caption embeddings, B rows.
        generation: How the first candidate is written; its seeds are those of the samples.
        how: How many, and how they are scored.

    Returns:
        B captions, each with its `Check`.
    """
    seeds = generation.seeds(len(c))
    written: list[dict[str, Caption]] = [{} for _ in range(len(c))]  # duplicates are scored once
    scores: list[Scores | None] = [None] * len(c)
    counts = [0] * len(c)
    open_rows = list(range(len(c)))
    for size in how.rounds():
        index = torch.tensor(open_rows, device=latents.device)
        numbers = range(counts[open_rows[0]], size)
        own = [seeds[row] for row in open_rows]
        candidates = write_candidates(captioner, c.sequence[index], own, numbers, generation, how)
        fresh: dict[int, dict[str, Caption]] = {}
        for row, captions in zip(open_rows, candidates, strict=True):
            counts[row] = size
            fresh[row] = {
                text: x for text, x in first_of_equals(captions).items() if text not in written[row]
            }
            written[row] |= fresh[row]
        found = score_captions(
            decoder,
            latents[index],
            [list(fresh[row]) for row in open_rows],
            how.scoring,
            c=c.select(index),
        )
        for row, new in zip(open_rows, found, strict=True):
            scores[row] = new if (old := scores[row]) is None else old.joined(new)
        open_rows = [row for row in open_rows if not _is_settled(scores[row], how.enough)]
        if not open_rows:
            break
    return [
        _kept(texts, found, count)
        for texts, found, count in zip(written, scores, counts, strict=True)
        if found is not None
    ]


def write_candidates(
    captioner: CaptionDecoder,
    c: Tensor,
    seeds: Sequence[int],
    numbers: range,
    generation: Generation,
    how: Verification,
) -> list[list[Caption]]:
    """The candidates with some numbers: number 0 is written as `generation` says, the others are samples.

    Args:
        captioner: Writes them.
        c: Contexts, (B, Q, D).
        seeds: Of the images, B of them; a candidate has a seed of its own.
        numbers: Of the candidates.
        generation: How the first is written.
        how: The temperature of the others.

    Returns:
        B lists, in the order of the numbers.
    """
    written: list[list[Caption]] = [[] for _ in seeds]
    if 0 in numbers:
        written = [[x] for x in captioner.write(c, replace(generation, seed=list(seeds)))]
    samples = [number for number in numbers if number > 0]
    plan = replace(
        generation,
        seed=[mixed_seed(seed, "candidate", number) for seed in seeds for number in samples],
        do_sample=True,
        num_beams=1,
        early_stopping=False,
        temperature=how.temperature,
    )
    if samples:
        found = captioner.write(c, plan, copies=len(samples))
        for row, captions in enumerate(written):
            captions += found[row * len(samples) : (row + 1) * len(samples)]
    return written


def first_of_equals(captions: Sequence[Caption]) -> dict[str, Caption]:
    """Captions by their texts, in their order; an empty one is no candidate."""
    found: dict[str, Caption] = {}
    for caption in captions:
        if caption.text.strip():
            found.setdefault(caption.text, caption)
    return found


def _is_settled(scores: Scores | None, enough: float | None) -> bool:
    if enough is None or scores is None or scores.z is None or not scores.captions:
        return False
    null, of_z = float(scores.null.mean()), float(scores.z.mean())
    best = float(scores.losses.mean(1).min())
    return of_z < null and (null - best) / (null - of_z) >= enough


def _kept(texts: dict[str, Caption], scores: Scores, count: int) -> Caption:
    """The best of the candidates; an empty caption where all were empty."""
    if not scores.captions:
        return Caption("", 0, finished=True, check=Check(0.0, None, count))
    best = scores.best
    check = Check(scores.recovered[best], scores.margin, count)
    return replace(texts[scores.captions[best]], check=check)
