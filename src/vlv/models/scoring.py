"""How well captions explain their image: the denoising loss of the frozen decoder, paired.

Equation 1 of the paper asks how much a context tells the denoiser about an image. With T(caption) in place of T(z) it
judges the caption: nothing is drawn, no label and no teacher is needed. All captions of an image meet the same
timesteps and the same noise, so their differences vary far less than the losses themselves.

Shapes: B images, N captions of an image, K timesteps, k h w latents.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from vlv.errors import ConfigError, DataError
from vlv.models.arguments import MAX_SEED, finite, present, whole_number
from vlv.models.context import Context
from vlv.models.draws import mixed_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vlv.models.diffusion import DiffusionDecoder

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
"""What stands between two sentences."""
_MOST_TIMESTEPS = 1000
"""As many as the schedules of the models that are known."""


@dataclass(frozen=True)
class Scoring:
    """At which noise captions are scored.

    Raises:
        ConfigError: A field is out of its range.
    """

    timesteps: int = 3
    """K, evenly spaced; each costs one pass of the denoiser for each caption."""
    lowest: float = 0.3
    """First timestep, as a share of the noise schedule."""
    highest: float = 0.7
    """Last timestep, as a share of the noise schedule."""
    seed: int = 0
    """Of the noise, which all images share."""
    batch_size: int = 64
    """Passes of the denoiser that are computed together."""

    def __post_init__(self) -> None:
        whole_number("timesteps", self.timesteps, 1, _MOST_TIMESTEPS)
        whole_number("seed", self.seed, 0, MAX_SEED)
        whole_number("batch_size", self.batch_size, 1)
        low, high = finite("lowest", self.lowest), finite("highest", self.highest)
        if not 0 <= low <= high < 1:
            raise ConfigError(
                f"timesteps from {low} to {high} of the schedule: choose 0 <= lowest <= highest < 1"
            )

    def places(self, num_timesteps: int) -> Tensor:
        """The timesteps of a schedule of that length, (K,); a single one is in the middle."""
        if self.timesteps == 1:
            return torch.tensor([int((self.lowest + self.highest) / 2 * num_timesteps)])
        shares = torch.linspace(self.lowest, self.highest, self.timesteps, dtype=torch.float64)
        return (shares * num_timesteps).long()

    def noise(self, like: Tensor) -> Tensor:
        """The noise of each timestep for latents (B, k, h, w): (K, k, h, w), the same for every image."""
        rows = []
        for index in range(self.timesteps):
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, "score", index))
            rows.append(torch.randn(like.shape[1:], generator=generator))
        return torch.stack(rows).to(like.device, like.dtype)


class ScoringOptions(TypedDict, total=False):
    """The fields of `Scoring` as keywords."""

    timesteps: int
    lowest: float
    highest: float
    seed: int
    batch_size: int


@dataclass(frozen=True, eq=False)
class Scores:
    """What the decoder says of the captions of one image."""

    captions: tuple[str, ...]
    """N texts."""
    losses: Tensor
    """Denoising loss of the image given each caption, at each timestep, (N, K)."""
    null: Tensor
    """The same given the empty text, (K,)."""
    z: Tensor | None
    """The same given the image's own caption embedding, (K,), where there is one."""
    num_chunks: tuple[int, ...]
    """Pieces that each caption was read in, 1 where the text tower holds it whole; a caption's loss is their mean."""

    @property
    def recovered(self) -> tuple[float, ...]:
        """Recovered share of each caption: 0 explains no more than the empty text, 1 as much as the best at hand.

        The best is the lowest loss of all captions and of z. All shares are 0 where nothing explains more than no text.
        """
        null, losses = float(self.null.mean()), self.losses.mean(1)
        known = losses if self.z is None else torch.cat([losses, self.z.mean()[None]])
        gain = null - float(known.min())
        return tuple((null - loss) / gain if gain > 0 else 0.0 for loss in losses.tolist())

    @property
    def best(self) -> int:
        """The caption with the lowest loss; the first of equals."""
        return int(self.losses.mean(1).argmin())

    @property
    def margin(self) -> float | None:
        """Recovered share by which the best caption leads the next one; None where it has no rival."""
        shares = sorted(self.recovered, reverse=True)
        return shares[0] - shares[1] if len(shares) > 1 else None

    def of(self, caption: str) -> Scores:
        """Those of one caption alone."""
        row = self.captions.index(caption)
        return replace(
            self,
            captions=(caption,),
            losses=self.losses[row : row + 1],
            num_chunks=self.num_chunks[row : row + 1],
        )

    def joined(self, more: Scores) -> Scores:
        """With further captions of the same image, scored in the same way."""
        return replace(
            self,
            captions=self.captions + more.captions,
            losses=torch.cat([self.losses, more.losses]),
            num_chunks=self.num_chunks + more.num_chunks,
        )


@torch.no_grad()
def score_captions(
    decoder: DiffusionDecoder,
    latents: Tensor,
    captions: Sequence[Sequence[str]],
    how: Scoring = Scoring(),
    *,
    c: Context | None = None,
) -> list[Scores]:
    """Score the captions of images by the denoising loss.

    Args:
        decoder: The frozen text-to-image model: Stable Diffusion 1 or 2, SDXL, Stable Diffusion 3.
        latents: Of the images, on the denoiser's scale, (B, k, h, w).
        captions: Those of each image, B lists; a text that several images have is encoded once.
        how: Timesteps, noise and batch size.
        c: Contexts of the images' caption embeddings, B rows, to compare with.

    Returns:
        One `Scores` per image.

    Raises:
        ConfigError: Images and captions do not match, or the loss is not finite.
        DataError: A caption is empty.
    """
    if len(captions) != len(latents):
        raise ConfigError(
            f"{len(latents)} images need as many lists of captions, got {len(captions)}"
        )
    split = {text: split_text(decoder, text) for texts in captions for text in texts}
    rows = {"": 0}
    for text in (piece for pieces in split.values() for piece in pieces):
        rows.setdefault(text, len(rows))
    pairs = {(image, 0): image for image in range(len(latents))}  # of an image and a context
    for image, texts in enumerate(captions):
        for piece in (piece for text in texts for piece in split[text]):
            pairs.setdefault((image, rows[piece]), len(pairs))
    contexts = _encode(decoder, list(rows), how.batch_size)
    losses = _losses(decoder, latents, list(pairs), contexts, how)
    each = [(image, image) for image in range(len(latents))]
    own = None if c is None else _losses(decoder, latents, each, c, how)
    found = []
    for image, texts in enumerate(captions):
        pieces = [[losses[pairs[image, rows[x]]] for x in split[text]] for text in texts]
        means = [torch.stack(of_text).mean(0) for of_text in pieces]
        found.append(
            Scores(
                captions=tuple(texts),
                losses=torch.stack(means) if means else losses[:0],
                null=losses[pairs[image, 0]],
                z=None if own is None else own[image],
                num_chunks=tuple(map(len, pieces)),
            )
        )
    return found


def _encode(decoder: DiffusionDecoder, texts: Sequence[str], batch_size: int) -> Context:
    parts = [
        decoder.encode_text(texts[start : start + batch_size]).c
        for start in range(0, len(texts), batch_size)
    ]
    return Context.cat(parts)


def _losses(
    decoder: DiffusionDecoder,
    latents: Tensor,
    pairs: Sequence[tuple[int, int]],
    contexts: Context,
    how: Scoring,
) -> Tensor:
    """Losses (P, K) of P pairs of an image and a context, each given by its row."""
    images, texts = torch.tensor(pairs, device=latents.device).unbind(1)
    places = how.places(decoder.num_timesteps).to(latents.device)
    noise = how.noise(latents)
    generator = torch.Generator()  # draws nothing: timesteps and noise are given
    found = []
    total = len(images) * how.timesteps
    for start in range(0, total, how.batch_size):
        row = torch.arange(start, min(start + how.batch_size, total), device=latents.device)
        pair, step = row // how.timesteps, row % how.timesteps
        found.append(
            decoder.denoising_loss(
                latents[images[pair]],
                contexts.select(texts[pair]),
                generator,
                timesteps=places[step],
                noise=noise[step],
                reduction="none",
            )
        )
    losses = torch.cat(found).view(len(images), how.timesteps).cpu()
    if not losses.isfinite().all():
        raise ConfigError("the denoising loss is not finite; choose the dtype bfloat16 or float32")
    return losses


def split_text(decoder: DiffusionDecoder, text: str) -> list[str]:
    """A text in pieces of whole sentences that the text tower reads without cutting them.

    A sentence that alone is longer than the tower is divided between words.

    Raises:
        DataError: The text is empty.
    """
    tokenizer = present(decoder.tokenizer, "tokenizer")
    limit = decoder.num_positions
    if not text.strip():
        raise DataError("the caption is empty; leave it out, or write one")
    if _fits(tokenizer, limit, text):
        return [text]
    pieces: list[str] = []
    fits = partial(_fits, tokenizer, limit)
    for sentence in SENTENCE_END.split(text.strip()):
        words = [sentence] if fits(sentence) else sentence.split()
        for number, word in enumerate(words):
            joined = f"{pieces[-1]} {word}" if pieces else word
            # a divided sentence begins a piece of its own
            if pieces and fits(joined) and (len(words) == 1 or number > 0):
                pieces[-1] = joined
            else:
                pieces.append(word)
    return pieces


def _fits(tokenizer: PreTrainedTokenizerBase, limit: int, text: str) -> bool:
    """With begin and end of text."""
    return len(tokenizer(text, verbose=False)["input_ids"]) <= limit
