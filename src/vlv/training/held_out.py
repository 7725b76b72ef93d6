"""What is seen of held-out data: figures, handed to the loop as `evaluate`, and samples, as `sample`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from PIL import ImageOps
from torch import Tensor

from vlv.data.images import to_pil
from vlv.data.records import Record
from vlv.models.context import Context
from vlv.models.decoding import GenerationOptions
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.draws import randn_like
from vlv.models.encoder import VLVEncoder
from vlv.models.pipeline import DrawingOptions, VLVPipeline
from vlv.models.vision_encoder import VisionEncoder
from vlv.pages import sheet
from vlv.storage import read_settings, replacing, write_json, write_text
from vlv.training.objective import Batch, Objective, to_device

_GOLDEN_RATIO = 0.6180339887498949
NUM_IMAGES = 8
CHOSEN = "images.json"
"""In the samples folder: ids of the images that a run watches."""
_CELL_PX = 128
"""Smaller images are enlarged by a whole number to at least this."""


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
    """The denoising losses given c, no text and the true caption, from which the recovered share follows.

    Args:
        decoder: The frozen diffusion decoder.
        latents: Scaled latents of held-out images, (N, 4, h, w).
        c: N contexts from the encoder.
        true_c: Those of the true captions.
        seeds: N seeds, one per image; they fix timestep and noise.
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
            self._null = self._loss(self._latents, self.decoder.null_context())
            self._true = self._loss(self._latents, self.decoder.encode_text(self.captions).c)
        c = Context.cat([self.decoder.context(self.encoder(chunk)) for chunk in chunks])
        return DenoisingGap(self._loss(self._latents, c), self._null, self._true).metrics()

    def _loss(self, latents: Tensor, c: Context) -> float:
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


class Samples:
    """Draws the reconstruction of each image below it, and writes captions as text; called with a step and a folder.

    The ids of the images are kept in the folder, so that a run that goes on shows the same ones, whatever was added to
    the held-out data since.

    Args:
        pipe: The parts in training.
        records: Held-out records; the first `NUM_IMAGES` are watched.
        load: Reads records into one batch with `ids` and `pixels`.
    """

    drawing: ClassVar[DrawingOptions] = {}
    generation: ClassVar[GenerationOptions] = {}

    def __init__(
        self,
        pipe: VLVPipeline,
        records: Sequence[Record],
        load: Callable[[Sequence[Record]], Batch],
    ) -> None:
        self.pipe, self.records, self._load = pipe, records, load
        self._batch: Batch | None = None

    def __call__(self, step: int, folder: Path) -> None:
        """Write `<step>.png` where the parts can draw, and `<step>.txt` where they can caption."""
        if self._batch is None:
            self._batch = self._load(choose(self.records, folder / CHOSEN))
        ids, pixels = self._batch["ids"], list(self._batch["pixels"])
        z = self.pipe.embed(pixels)
        if self.pipe.decoder.denoiser is not None:
            images = [*map(to_pil, pixels), *self.pipe.draw(self.pipe.context(z), **self.drawing)]
            factor = -(-_CELL_PX // images[0].width)
            enlarged = [ImageOps.scale(image, factor, resample=0) for image in images]
            with replacing(folder / f"{step:07d}.png") as temporary:
                sheet(enlarged, len(ids)).save(temporary, "PNG")
        if self.pipe.caption_decoder is not None:
            texts = zip(ids, self.pipe.caption(z=z, **self.generation), strict=True)
            lines = [f"{name}: {text}\n" for name, text in texts]
            write_text(folder / f"{step:07d}.txt", "".join(lines))


def choose(records: Sequence[Record], file: Path) -> list[Record]:
    """The records whose ids are in a file, or the first few, whose ids are then written to it."""
    by_id = {record.id: record for record in records}
    known = (read_settings(file) or {}).get("ids", [])
    if chosen := [by_id[name] for name in known if name in by_id]:
        return chosen
    chosen = list(records[:NUM_IMAGES])
    write_json(file, {"ids": [record.id for record in chosen]})
    return chosen


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]
