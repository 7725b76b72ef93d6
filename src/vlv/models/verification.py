"""Captions that the decoder has checked: several are written of each image, and the best explained image decides.

Shapes: B images, N candidates of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

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


@dataclass(frozen=True)
class Verification:
    """How captions are verified.

    Raises:
        ConfigError: A field is out of its range.
    """

    candidates: int = 8
    """N at most: the caption that would be written without verification, and samples."""
    temperature: float = 1.0
    """Of the samples."""
    enough: float | None = None
    """Write no more for an image whose best caption explains this share of what its own embedding z explains; None always
    writes N."""
    scoring: Scoring = field(default_factory=Scoring)

    def __post_init__(self) -> None:
        whole_number("candidates", self.candidates, 2)
        finite("temperature", self.temperature)
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
        fresh = _candidates(captioner, c, open_rows, seeds, counts[open_rows[0]], size, generation, how)  # fmt: skip
        for row in open_rows:
            counts[row] = size
            fresh[row] = {text: x for text, x in fresh[row].items() if text not in written[row]}
            written[row] |= fresh[row]
        index = torch.tensor(open_rows, device=latents.device)
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


def _candidates(
    captioner: CaptionDecoder,
    c: Context,
    rows: Sequence[int],
    seeds: Sequence[int],
    start: int,
    stop: int,
    generation: Generation,
    how: Verification,
) -> dict[int, dict[str, Caption]]:
    """The candidates with the numbers `start` to `stop` of some images, by their texts; empty ones are no candidates."""
    index = torch.tensor(list(rows), device=c.sequence.device)
    sequence = c.sequence[index]
    written: list[list[Caption]] = [[] for _ in rows]
    if start == 0:
        first = replace(generation, seed=[seeds[row] for row in rows])
        written = [[caption] for caption in captioner.write(sequence, first)]
    numbers = range(max(start, 1), stop)
    plan = replace(
        generation,
        seed=[mixed_seed(seeds[row], "candidate", number) for row in rows for number in numbers],
        do_sample=True,
        num_beams=1,
        early_stopping=False,
        temperature=how.temperature,
    )
    samples = captioner.write(sequence.repeat_interleave(len(numbers), 0), plan)
    for place, captions in enumerate(written):
        captions += samples[place * len(numbers) : (place + 1) * len(numbers)]
    found: dict[int, dict[str, Caption]] = {}
    for row, captions in zip(rows, written, strict=True):
        found[row] = {}
        for caption in captions:
            if caption.text.strip():
                found[row].setdefault(caption.text, caption)
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
