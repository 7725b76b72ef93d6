"""What a caption earns in stage 3: rewards behind one function, exchangeable by name.

Shapes: B images, n captions of an image, K timesteps, Q positions, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlv.config import Stage3Config
from vlv.models.arguments import present
from vlv.models.captioner import CaptionDecoder
from vlv.models.context import Context
from vlv.models.decoding import Generation
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.draws import mixed_seed
from vlv.models.encoder import ImageEncoder
from vlv.models.scoring import Scoring, score_captions

_GUIDANCE = 2.0
"""Of drawn images, as `vlv generate` has it by default."""


@dataclass(frozen=True)
class Judges:
    """The parts that rewards ask; none of them learns from it."""

    encoder: ImageEncoder
    decoder: DiffusionDecoder
    captioner: CaptionDecoder
    config: Stage3Config


@dataclass(frozen=True)
class Seen:
    """What the model knows of some images."""

    latents: Tensor
    """On the denoiser's scale, (B, k, h, w)."""
    features: Tensor
    """Tokens of the vision tower, (B, positions, width)."""
    z: Tensor
    """Caption embeddings, (B, Q, D)."""
    c: Context
    """Their contexts, B rows."""


@dataclass(frozen=True)
class Rollout:
    """Captions of some images."""

    images: Seen
    """B of them."""
    captions: Sequence[Sequence[str]]
    """Texts of each image, none of them empty."""
    seed: int
    """Of the noise that all captions of an image share."""

    def rows(self) -> list[int]:
        """The image of each caption, one caption after the other."""
        return [image for image, texts in enumerate(self.captions) for _ in texts]

    def texts(self) -> list[str]:
        """All captions."""
        return [text for texts in self.captions for text in texts]


Reward = Callable[[Judges, Rollout], Tensor]
"""One number for each caption, in the order of `Rollout.texts`."""


def denoising(judges: Judges, rollout: Rollout) -> Tensor:
    """Denoising loss of the original image given the caption (`vlv.models.scoring`); nothing is drawn.

    In units of what the image's own z explains beyond no text: 0 explains nothing, 1 as much as z. It ends at -1 and 2,
    or images that no words explain would outweigh all others.
    """
    how = Scoring(timesteps=judges.config.score_timesteps, seed=rollout.seed)
    images = rollout.images
    scores = score_captions(judges.decoder, images.latents, rollout.captions, how, c=images.c)
    found = []
    for of_image in scores:
        null, of_z = of_image.null.mean(), present(of_image.z, "z").mean()
        unit = (null - of_z).abs().clamp(min=1e-12)
        found.append((null - of_image.losses.mean(1)) / unit)
    return torch.cat(found).clamp(-1.0, 2.0)


def drawing(judges: Judges, rollout: Rollout) -> Tensor:
    """Likeness of the original and an image drawn from the caption, in the vision tower's tokens (CycleCap, 2603.18282)."""
    drawn = judges.encoder.image_features(_drawn(judges, rollout))
    return F.cosine_similarity(drawn.flatten(1), rollout.images.features[rollout.rows()].flatten(1))


def redrawing(judges: Judges, rollout: Rollout) -> Tensor:
    """Squared distance of z and the caption embedding of an image drawn from the caption, in units of z, negative."""
    drawn: Tensor = judges.encoder(_drawn(judges, rollout)).flatten(1)
    z = rollout.images.z[rollout.rows()].flatten(1)
    distance: Tensor = (drawn - z).square().sum(1) / z.square().sum(1)
    return -distance


def context(judges: Judges, rollout: Rollout) -> Tensor:
    """Likeness of T(caption) and c = T(z), each averaged over its positions."""
    own = judges.decoder.encode_text(rollout.texts()).c.sequence.mean(1)
    return F.cosine_similarity(own, rollout.images.c.sequence.mean(1)[rollout.rows()])


def log_prob(judges: Judges, rollout: Rollout) -> Tensor:
    """Log-probability of a token on average, by the captioner itself: the control, which asks no judge."""
    tokens = judges.captioner.token_rows(rollout.texts())
    c = rollout.images.c.sequence[rollout.rows()]
    sums = judges.captioner.log_probs_of_tokens(c, [[row] for row in tokens])[:, 0]
    return sums / torch.tensor([len(row) for row in tokens], device=sums.device)


def answers(judges: Judges, rollout: Rollout) -> Tensor:
    """Log-probability of a token of the answers that the image gets, when the caption alone is asked `stage3.questions`.

    The captioner answers them itself, from c of the image and then from T(caption) in its place: a caption earns by what can be
    told from it.
    """
    captioner, images = judges.captioner, rollout.images.c.sequence
    told, rows = judges.decoder.encode_text(rollout.texts()).c.sequence, rollout.rows()
    found = []
    for question in judges.config.questions:
        how = Generation(prompt=[question] * len(images), tidy=False)
        tokens = captioner.token_rows([x.text for x in captioner.write(images, how)])
        asked = captioner.instruction_rows([question] * len(rows))
        right = [[tokens[row]] for row in rows]
        sums = captioner.log_probs_of_tokens(told, right, instructions=asked)[:, 0]
        found.append(sums / torch.tensor([len(x[0]) for x in right], device=sums.device))
    return torch.stack(found).mean(0)


REWARDS: dict[str, Reward] = {
    reward.__name__: reward
    for reward in (denoising, drawing, redrawing, context, answers, log_prob)
}
"""By the name that `stage3.reward` has."""


PASSES: dict[str, Callable[[Stage3Config], int]] = {
    "denoising": lambda config: config.score_timesteps,
    "drawing": lambda config: 2 * config.drawing_steps,  # guidance asks twice
    "redrawing": lambda config: 2 * config.drawing_steps,
    "context": lambda _: 0,
    "answers": lambda _: 0,
    "log_prob": lambda _: 0,
}
"""Passes of the denoiser for each caption."""


def _drawn(judges: Judges, rollout: Rollout) -> Tensor:
    """An image for each caption, (captions, 3, H, W) in [0, 1]; those of one original start from the same noise."""
    factor = judges.decoder.downscale_factor
    height, width = (side * factor for side in rollout.images.latents.shape[-2:])
    return judges.decoder.sample(
        judges.decoder.encode_text(rollout.texts()).c,
        seeds=[mixed_seed(rollout.seed, "drawing", row) for row in rollout.rows()],
        steps=judges.config.drawing_steps,
        guidance=_GUIDANCE,
        height=height,
        width=width,
    )
