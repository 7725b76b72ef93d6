"""Figures on held-out data, handed to the loop as `evaluate`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from vlv.models.context import Context
from vlv.models.draws import randn_like
from vlv.training.objective import to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from vlv.models.diffusion import DiffusionDecoder
    from vlv.models.encoder import VLVEncoder
    from vlv.models.vision_encoder import VisionEncoder
    from vlv.training.objective import Batch, Objective

_GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True)
class DenoisingGap:
    """Held-out denoising losses under three contexts, with the same timesteps and noise."""

    from_z: float
    """From the encoder's z."""
    null: float
    """From the empty text."""
    true: float
    """From the true caption."""

    @property
    def share(self) -> float:
        """Share of the way from the empty to the true text: 0 knows nothing, 1 is as good as the true text."""
        return (self.null - self.from_z) / (self.null - self.true)

    def metrics(self) -> dict[str, float]:
        """The three losses and the share, by name."""
        return {
            "denoising_z": self.from_z,
            "denoising_null": self.null,
            "denoising_true": self.true,
            "share_null_to_true": self.share,
        }


@torch.no_grad()
def fixed_denoising_loss(
    decoder: DiffusionDecoder,
    latents: Tensor,
    c: Context,
    seeds: Sequence[int],
    *,
    batch_size: int = 64,
) -> float:
    """Denoising loss with timestep and noise fixed by each image's seed, whatever the batches are.

    Consecutive seeds spread the timesteps evenly over the schedule (golden-ratio sequence).

    Args:
        decoder: The frozen diffusion decoder.
        latents: Scaled latents, (N, 4, h, w).
        c: N contexts, or one for all.
        seeds: N seeds.
        batch_size: Images of one U-Net pass.

    Returns:
        Mean over the images.
    """
    positions = [(seed * _GOLDEN_RATIO) % 1 for seed in seeds]
    timesteps = torch.tensor([int(p * decoder.num_timesteps) for p in positions])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([randn_like(x, g) for x, g in zip(latents, generators, strict=True)])
    c = c.expand(len(latents))
    losses = [
        decoder.denoising_loss(
            latents[rows],
            c[rows],
            generators[0],
            timesteps=timesteps[rows],
            noise=noise[rows],
            reduction="none",
        )
        for rows in _chunks(len(latents), batch_size)
    ]
    return float(torch.cat(losses).double().mean())


def denoising_gap(
    decoder: DiffusionDecoder, latents: Tensor, c: Context, true_c: Context, seeds: Sequence[int]
) -> DenoisingGap:
    """How much of what the true caption tells the diffusion decoder is also told by c.

    Args:
        decoder: The frozen diffusion decoder.
        latents: Scaled latents of held-out images, (N, 4, h, w).
        c: N contexts from the encoder.
        true_c: Those of the true captions.
        seeds: N seeds, one per image; they fix timestep and noise.

    Returns:
        The three losses.
    """
    return DenoisingGap(
        from_z=fixed_denoising_loss(decoder, latents, c, seeds),
        null=fixed_denoising_loss(decoder, latents, decoder.null_context(), seeds),
        true=fixed_denoising_loss(decoder, latents, true_c, seeds),
    )


class DenoisingMeter:
    """`denoising_gap` on fixed held-out images; the losses of the two texts are computed once.

    Args:
        encoder: The encoder in training.
        decoder: The frozen diffusion decoder.
        pixels: Held-out images, (N, 3, H, W), float in [0, 1] or uint8.
        captions: Their true captions.
        batch_size: Images of one pass.
    """

    def __init__(
        self,
        encoder: VLVEncoder | VisionEncoder,
        decoder: DiffusionDecoder,
        pixels: Tensor,
        captions: Sequence[str],
        *,
        batch_size: int = 64,
    ) -> None:
        self.encoder, self.decoder = encoder, decoder
        self.pixels, self.captions, self.batch_size = pixels, list(captions), batch_size
        self._latents: Tensor | None = None
        self._null = self._true = math.nan

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        """The gap of the encoder as it is now."""
        device = self.encoder.queries.device
        chunks = [
            self.pixels[rows].to(device) for rows in _chunks(len(self.pixels), self.batch_size)
        ]
        if self._latents is None:
            self._latents = torch.cat([self.decoder.encode(chunk) for chunk in chunks])
            self._null = self._loss(self.decoder.null_context())
            self._true = self._loss(self.decoder.encode_text(self.captions).c)
        c = Context.cat([self.decoder.context(self.encoder(chunk)) for chunk in chunks])
        return DenoisingGap(self._loss(c), self._null, self._true).metrics()

    def _loss(self, c: Context) -> float:
        latents = cast("Tensor", self._latents)
        seeds = range(len(latents))
        return fixed_denoising_loss(self.decoder, latents, c, seeds, batch_size=self.batch_size)


class HeldOutLoss:
    """Mean of every part of an objective's loss over fixed held-out batches, with fixed random draws.

    Args:
        objective: The objective in training.
        batches: Held-out batches.
        seed: Of the draws; the same at every call.
    """

    def __init__(self, objective: Objective, batches: Sequence[Batch], *, seed: int = 0) -> None:
        self.objective, self.batches, self.seed = objective, list(batches), seed

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        """The means of the losses, by name with the prefix `held_out_`."""
        generator = torch.Generator().manual_seed(self.seed)
        device = next(self.objective.module.parameters()).device
        losses = [
            self.objective.loss(to_device(held_out, device) | {"step": step}, generator)
            for held_out in self.batches
        ]
        rows = [{"loss": loss.total, **loss.parts} for loss in losses]
        return {
            f"held_out_{name}": float(torch.stack([row[name].float() for row in rows]).mean())
            for name in rows[0]
            if not name.endswith("_share")  # what was cut and padded says nothing of the model
        }


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]
