"""Doubts: which sentences and claims of a caption the frozen decoder does not believe.

True words help the denoiser; without them the loss of the image rises. Wrong words mislead it: the loss falls when they are
left out, and more so when the right ones take their place. So every claim that a sentence is known to make is exchanged for
each of its alternatives; where none is known, every word is left out once. All meet the same timesteps and the same noise.
The change log(loss of the caption / loss of the changed caption) is above 0 where the decoder prefers the change.

Shapes: B images, k h w latents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlv.models.scoring import SENTENCE_END, Scores, Scoring, score_captions, split_text

if TYPE_CHECKING:
    from torch import Tensor

    from vlv.models.calibration import Calibration
    from vlv.models.context import Context
    from vlv.models.diffusion import DiffusionDecoder

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


@dataclass(frozen=True)
class Claim:
    """A stretch of a caption that states a fact."""

    start: int
    end: int
    name: str
    """Of the fact, such as colour."""
    alternatives: tuple[str, ...]
    """Words that state another value, one text for each."""


ReadClaims = Callable[[str], Sequence[Claim]]
"""Finds the claims of a caption, in the order of the text."""


def no_claims(caption: str) -> Sequence[Claim]:
    """Reads nothing: of captions whose grammar is not known."""
    return ()


# What the decoder says ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ClaimEvidence:
    """What exchanging a claim changes."""

    claim: Claim
    changes: tuple[float, ...]
    """Of each alternative."""

    @property
    def best(self) -> float:
        """Change by the best alternative."""
        return max(self.changes)

    @property
    def instead(self) -> str:
        """The best alternative."""
        return self.claim.alternatives[self.changes.index(self.best)]


@dataclass(frozen=True)
class SentenceEvidence:
    """What changing a sentence changes."""

    start: int
    end: int
    omission: float
    """Change by leaving out the sentence."""
    word: float | None
    """Change by leaving out its most misleading word; None where there are claims to exchange."""
    claims: tuple[ClaimEvidence, ...]

    @property
    def exchange(self) -> float | None:
        """Change by the best exchange of a claim; None without claims."""
        return max((claim.best for claim in self.claims), default=None)

    @property
    def features(self) -> tuple[float, float]:
        """What its probability of being wrong depends on: the best exchange or the most misleading word, and the omission."""
        best = self.word if self.exchange is None else self.exchange
        return self.omission if best is None else best, self.omission


@dataclass(frozen=True)
class Evidence:
    """What the decoder says of one caption of an image."""

    caption: str
    score: float
    """Recovered share of the whole caption, see `Scores`."""
    num_chunks: int
    """Pieces that it was read in."""
    sentences: tuple[SentenceEvidence, ...]


@dataclass(frozen=True)
class _Sentence:
    """The texts that are scored for one sentence."""

    start: int
    end: int
    whole: str
    """The piece of the caption that it stands in."""
    without: str
    """That piece without the sentence."""
    words: tuple[str, ...]
    """Without each of its words; where claims are known, none."""
    claims: tuple[tuple[Claim, tuple[str, ...]], ...]
    """With each alternative of each claim."""

    def texts(self) -> Iterator[str]:
        """All of them, none empty."""
        changed = (text for _, texts in self.claims for text in texts)
        yield from (text for text in (self.whole, self.without, *self.words, *changed) if text)


def gather_evidence(
    decoder: DiffusionDecoder,
    latents: Tensor,
    captions: Sequence[str],
    how: Scoring,
    *,
    read_claims: ReadClaims = no_claims,
    c: Context | None = None,
) -> list[Evidence]:
    """Ask the decoder about every sentence, word and claim of captions.

    Args:
        decoder: The frozen text-to-image model.
        latents: Of the images, on the denoiser's scale, (B, k, h, w).
        captions: One of each image. A text longer than the text tower is judged in pieces of whole sentences.
        how: Timesteps, noise and batch size.
        read_claims: Finds the claims of a caption.
        c: Contexts of the images' caption embeddings, B rows, which the score compares with.

    Raises:
        ConfigError: Images and captions do not match, or the loss is not finite.
        DataError: A caption is empty.
    """
    plans = [list(_plan(decoder, caption, read_claims(caption))) for caption in captions]
    texts = [
        list(dict.fromkeys([caption, *(text for sentence in plan for text in sentence.texts())]))
        for caption, plan in zip(captions, plans, strict=True)
    ]
    scores = score_captions(decoder, latents, texts, how, c=c)
    return [
        _weigh(caption, plan, found)
        for caption, plan, found in zip(captions, plans, scores, strict=True)
    ]


def _plan(decoder: DiffusionDecoder, caption: str, claims: Sequence[Claim]) -> Iterator[_Sentence]:
    """Every sentence with the texts to score; one longer than the text tower counts as several."""
    for first, last in _places(caption, split_text(decoder, caption)):
        piece = caption[first:last]
        for start, end in _sentences(piece, first):
            inside = [x for x in claims if start <= x.start and x.end <= end and x.alternatives]
            exchanged = tuple((x, tuple(_exchanged(caption, x, first, last))) for x in inside)
            words = (
                () if inside else [match.span() for match in _WORD.finditer(caption, start, end)]
            )
            gaps = [_without(piece, x - first, y - first) for x, y in ((start, end), *words)]
            yield _Sentence(start, end, piece, gaps[0], tuple(gaps[1:]), exchanged)


def _exchanged(caption: str, claim: Claim, first: int, last: int) -> Iterator[str]:
    """A piece of a caption with each alternative of a claim."""
    for other in claim.alternatives:
        yield caption[first : claim.start] + other + caption[claim.end : last]


def _without(text: str, start: int, end: int) -> str:
    """A text without a stretch, and without the comma or blank before it."""
    before, after = text[:start].rstrip(" ,;"), text[end:]
    return f"{before} {after.lstrip()}".strip() if after[:1].isspace() else before + after


def _places(caption: str, pieces: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Where pieces stand in the text that they were split from, whose white space they do not keep."""
    end = 0
    for piece in pieces:
        pattern = re.compile(r"\s+".join(map(re.escape, piece.split())))
        match = pattern.search(caption, end)
        assert match is not None, "pieces come from the caption"
        end = match.end()
        yield match.span()


def _sentences(piece: str, offset: int) -> Iterator[tuple[int, int]]:
    start = 0
    for stop in [*SENTENCE_END.finditer(piece), None]:
        end = len(piece) if stop is None else stop.start()
        if piece[start:end].strip():
            yield offset + start, offset + end
        start = end if stop is None else stop.end()


def _weigh(caption: str, plan: Sequence[_Sentence], scores: Scores) -> Evidence:
    losses = dict(zip(scores.captions, scores.losses.mean(1).tolist(), strict=True))
    losses[""] = float(scores.null.mean())

    def change(whole: str, other: str) -> float:
        return math.log(losses[whole] / losses[other])

    def weighed(x: _Sentence) -> SentenceEvidence:
        words = [change(x.whole, text) for text in x.words]
        claims = tuple(
            ClaimEvidence(claim, tuple(change(x.whole, text) for text in texts))
            for claim, texts in x.claims
        )
        omission = change(x.whole, x.without)
        word = None if claims else max(words, default=omission)
        return SentenceEvidence(x.start, x.end, omission, word, claims)

    sentences = tuple(map(weighed, plan))
    known = scores if scores.z is None else scores.of(caption)
    row = known.captions.index(caption)
    return Evidence(caption, known.recovered[row], known.num_chunks[row], sentences)


# What follows from it ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Doubt:
    """A stretch of a caption and how probably it is wrong."""

    start: int
    end: int
    text: str
    probability: float


@dataclass(frozen=True)
class ClaimDoubt(Doubt):
    """A claim and how probably it is wrong."""

    name: str
    """Of the fact."""
    instead: str
    """What explains the image best in its place."""
    change: float
    """By which it does; not above 0 where the claim itself is best."""


@dataclass(frozen=True)
class SentenceDoubt(Doubt):
    """A sentence and how probably something in it is wrong."""

    claims: tuple[ClaimDoubt, ...]


@dataclass(frozen=True)
class Verdict:
    """What the frozen decoder says of a caption."""

    caption: str
    score: float
    """Recovered share: 0 explains the image no better than no text, 1 as well as its own caption embedding (or, where the
    model has no encoder, as the best text that was scored)."""
    num_chunks: int
    """Pieces that the caption was read in; 1 where the text tower holds it whole."""
    sentences: tuple[SentenceDoubt, ...]
    threshold: float
    """Probability from which a stretch is doubtful."""

    @property
    def doubt(self) -> float:
        """That of the most doubtful sentence."""
        return max(sentence.probability for sentence in self.sentences)

    @property
    def claims(self) -> list[ClaimDoubt]:
        """Of all sentences."""
        return [claim for sentence in self.sentences for claim in sentence.claims]

    @property
    def fixed(self) -> str:
        """The caption, each doubtful sentence with its best exchange, or left out where no exchange explains the image better.

        Empty where nothing remains.
        """
        text, end = "", 0
        for x in self.sentences:
            gap, end = self.caption[end : x.start], x.end
            if x.probability < self.threshold:
                text += gap + x.text
                continue
            claim = max(x.claims, key=lambda claim: claim.change, default=None)
            if claim is not None and claim.change > 0:
                text += gap + self.caption[x.start : claim.start] + claim.instead
                text += self.caption[claim.end : x.end]
        return (text + self.caption[end:]).strip()


def judge(evidence: Evidence, calibration: Calibration) -> Verdict:
    """Turn evidence into probabilities."""
    return Verdict(
        evidence.caption,
        evidence.score,
        evidence.num_chunks,
        tuple(_sentence(evidence.caption, x, calibration) for x in evidence.sentences),
        calibration.threshold,
    )


def _sentence(caption: str, x: SentenceEvidence, how: Calibration) -> SentenceDoubt:
    text = caption[x.start : x.end]
    model = how.plain if x.exchange is None else how.sentence
    probability = model.probability(x.features, how.scale)
    claims = tuple(_claim(caption, claim, how) for claim in x.claims)
    return SentenceDoubt(x.start, x.end, text, probability, claims)


def _claim(caption: str, x: ClaimEvidence, how: Calibration) -> ClaimDoubt:
    start, end = x.claim.start, x.claim.end
    probability = how.claim.probability((x.best,), how.scale)
    return ClaimDoubt(start, end, caption[start:end], probability, x.claim.name, x.instead, x.best)
