"""One model on one set of scenes: every picture and every caption is made once, when a figure first asks for it.

Shapes: B batch, Q queries, L text positions, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlv.evaluation.pixels import psnr, squared_error
from vlv.evaluation.scenes import (
    Counts,
    Inspection,
    World,
    bar,
    claim_counts,
    held_out_pairs,
    inspect,
    shuffle_words,
)
from vlv.evaluation.shelf import Shelf
from vlv.models.arguments import present
from vlv.models.batching import side_by_side
from vlv.models.context import Context
from vlv.models.decoding import Caption
from vlv.models.diffusion import Sampler
from vlv.models.pipeline import VLVPipeline
from vlv.models.text_tower import tokenize
from vlv.toyworld.inspector import Inspector
from vlv.toyworld.language import parse

TIMESTEPS = (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)
"""Thousandths of the noise schedule at which the denoising loss is measured: an even grid for the mean over all."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How pictures and captions are made."""

    seed: int
    batch_size: int = 64
    steps: int = 20
    guidance: float = 2.0
    sampler: Sampler = "dpm"
    max_new_tokens: int = 160
    progress: bool = False


@dataclass(frozen=True, slots=True)
class Captions:
    """The captions of a model, counted."""

    captions: tuple[Caption, ...]
    counts: Counts
    """From `claim_counts`."""
    pairs: Counts
    """From `held_out_pairs`."""


class Study:
    """What a model makes of a world.

    Args:
        pipe: The model; a property that needs a part it lacks raises MissingPartError.
        inspector: The instrument, on the same device.
        world: The scenes.
        settings: How pictures are drawn.
        name: For the progress bar.
        shelf: Keeps finished batches; None keeps nothing.
    """

    def __init__(
        self,
        pipe: VLVPipeline,
        inspector: Inspector,
        world: World,
        settings: Settings,
        name: str = "",
        shelf: Shelf | None = None,
    ) -> None:
        self.pipe, self.inspector, self.world = pipe, inspector, world
        self.settings, self.name = settings, name
        self.shelf = shelf or Shelf(None, {})
        self.decoder = pipe.decoder

    def _batches(self, what: str) -> Iterator[slice]:
        size, total = self.settings.batch_size, len(self.world.scenes)
        rows = range(0, total, size)
        for start in bar(rows, f"{what} {self.name}".strip(), self.settings.progress):
            yield slice(start, min(total, start + size))

    @property
    def workers(self) -> int:
        """Batches that are computed side by side."""
        return torch.get_num_threads() if self.pipe.device.type == "cpu" else 1

    # --- pictures --------------------------------------------------------------------------------

    @cached_property
    def originals(self) -> Inspection:
        """The renders themselves: the inspector's own accuracy."""
        pictures = (self.world.floats(rows) for rows in self._batches("inspecting"))
        return inspect(self.inspector, pictures, self.world.scenes)

    @cached_property
    def from_true_text(self) -> Inspection:
        """Drawn from the true captions."""
        return self._draw("from true text", lambda rows: self.encode(self.world.captions[rows]))

    @cached_property
    def from_shuffled_words(self) -> Inspection:
        """Drawn from the words of the true captions in random order."""
        texts = shuffle_words(self.world.captions, self.settings.seed)
        return self._draw("from shuffled words", lambda rows: self.encode(texts[rows]))

    @cached_property
    def from_z(self) -> Inspection:
        """Rebuilt from the caption embedding."""
        return self._draw("from z", lambda rows: self.pipe.context(self.embed(rows)))

    @cached_property
    def from_captions(self) -> Inspection:
        """Drawn from the model's own captions."""
        texts = self.texts
        return self._draw("from captions", lambda rows: self.encode(texts[rows]))

    def _draw(self, what: str, context: Callable[[slice], Context]) -> Inspection:
        null = self.decoder.null_context()

        def sample(rows: slice, c: Context) -> NDArray[np.uint8]:
            pictures = self.decoder.sample(
                c,
                seeds=self.world.seeds[rows],
                steps=self.settings.steps,
                guidance=self.settings.guidance,
                sampler=self.settings.sampler,
                height=self.pipe.image_size,
                width=self.pipe.image_size,
                null=null,
            )
            return np.asarray((pictures * 255).round().to(torch.uint8).cpu().numpy())

        def draw(batch: tuple[slice, Context]) -> Tensor:
            rows, c = batch
            kept = self.shelf.get(f"{what} {rows.start}", c.tensors(), lambda: sample(rows, c))
            return torch.from_numpy(kept).float() / 255

        batches = ((rows, context(rows)) for rows in self._batches(what))
        pictures = side_by_side(draw, batches, self.workers)
        return inspect(self.inspector, pictures, self.world.scenes)

    def embed(self, rows: slice) -> Tensor:
        """Caption embedding z of a batch of renders, (B, Q, D)."""
        return self.pipe.embed(list(self.world.floats(rows)), batch_size=self.settings.batch_size)

    def encode(self, texts: Sequence[str]) -> Context:
        """Context of texts."""
        return self.decoder.encode_text(texts).c

    # --- the VAE ---------------------------------------------------------------------------------

    @cached_property
    @torch.no_grad()
    def vae_errors(self) -> Counts:
        """What the VAE (posterior mean) makes of every render, (N, 4).

        PSNR in dB of the whole picture, PSNR inside the objects, and the mean squared errors of both.
        """
        rows_of = []
        for rows in self._batches("VAE"):
            pixels, mask = self.world.floats(rows), self.world.objects[rows]
            decoded = self.decoder.decode(self.decoder.encode(pixels)).cpu()
            measures = (f(pixels, decoded, m) for f in (psnr, squared_error) for m in (None, mask))
            rows_of.append(torch.stack(list(measures), 1).numpy())
        return np.concatenate(rows_of)

    # --- captions --------------------------------------------------------------------------------

    @cached_property
    def captions(self) -> Captions:
        """The model's captions of the renders, greedy."""
        written: list[Caption] = []
        for rows in self._batches("captioning"):
            written += self.pipe.describe(
                list(self.world.floats(rows)),
                batch_size=self.settings.batch_size,
                max_new_tokens=self.settings.max_new_tokens,
            )
        claims = [parse(caption.text) for caption in written]
        return Captions(
            captions=tuple(written),
            counts=claim_counts(claims, self.world.scenes),
            pairs=held_out_pairs(claims, self.world.scenes),
        )

    @property
    def texts(self) -> list[str]:
        """The model's captions as texts."""
        return [caption.text for caption in self.captions.captions]

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Which texts lose tokens on their way into the text tower, (N,)."""
        tokenizer = present(self.pipe.tokenizer, "tokenizer")
        _, cut = tokenize(tokenizer, self.decoder.text_encoder, list(texts))
        return np.asarray(cut.numpy(), np.bool_)

    # --- denoising loss --------------------------------------------------------------------------

    @cached_property
    def timesteps(self) -> list[int]:
        """`TIMESTEPS` on this model's schedule."""
        return [t * self.decoder.num_timesteps // 1000 for t in TIMESTEPS]

    @cached_property
    def denoising_losses(self) -> Counts:
        """Denoising loss of every render by context and timestep, (N, 4, timesteps).

        The contexts are no text, the true caption, z, and the caption of another scene. All four see the same latents (posterior mean), timesteps and noise.
        """

        def losses(batch: tuple[slice, tuple[Context, ...]]) -> Counts:
            rows, contexts = batch
            name = f"denoising {rows.start}"
            tensors = [x for c in contexts for x in c.tensors()]
            return self.shelf.get(name, tensors, lambda: self._losses(rows, contexts))

        batches = ((rows, self._contexts(rows)) for rows in self._batches("denoising loss"))
        return np.concatenate(list(side_by_side(losses, batches, self.workers)))

    @torch.no_grad()
    def _contexts(self, rows: slice) -> tuple[Context, ...]:
        captions = self.world.captions
        others = [*captions[1:], captions[0]][rows]
        return (
            self.decoder.null_context(len(others)),
            self.encode(captions[rows]),
            self.pipe.context(self.embed(rows)),
            self.encode(others),
        )

    @torch.no_grad()
    def _losses(self, rows: slice, contexts: tuple[Context, ...]) -> Counts:
        latents = self.decoder.encode(self.world.floats(rows))
        noises = [self._noise(rows, k, latents) for k in range(len(self.timesteps))]
        losses = [
            [
                self._loss(latents, c, t, noise)
                for t, noise in zip(self.timesteps, noises, strict=True)
            ]
            for c in contexts
        ]
        return np.moveaxis(np.array(losses, np.float64), -1, 0)

    def _loss(
        self, latents: Tensor, c: Context, timestep: int, noise: Tensor
    ) -> NDArray[np.float32]:
        loss = self.decoder.denoising_loss(
            latents,
            c,
            torch.Generator(),  # nothing is drawn: timesteps and noise are given
            timesteps=torch.full((len(latents),), timestep),
            noise=noise,
            reduction="none",
        )
        return np.asarray(loss.cpu().numpy())

    def _noise(self, rows: slice, number: int, like: Tensor) -> Tensor:
        """Noise of each scene's own seed, whatever the batch: (B, k, h, w)."""
        draws = [
            torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(seed + 1 + number))
            for seed in self.world.seeds[rows]
        ]
        return torch.stack(draws).to(like)
