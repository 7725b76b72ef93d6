"""What is measured of a model in the toy world in a table of its own: what the VAE loses, the denoising loss, z as words, plain sentences.

Shapes: B batch, Q queries, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from vlv.evaluation.experiments.backends import Backends
from vlv.evaluation.experiments.generators import Job
from vlv.evaluation.experiments.run import Emit, Key, Report, Run, batches, by_id
from vlv.evaluation.experiments.samples import Sample
from vlv.evaluation.experiments.sources import open_images
from vlv.evaluation.metrics.claims import equal_tokens, facts_shown, relations_shown
from vlv.evaluation.metrics.features import stack
from vlv.evaluation.metrics.pixels import psnr, squared_error
from vlv.jobs.table import Row
from vlv.jobs.tally import Tally
from vlv.models.arguments import present
from vlv.models.batching import side_by_side
from vlv.models.context import Context
from vlv.toyworld.language import Claims, parse
from vlv.toyworld.render import render
from vlv.toyworld.writing import describe

MODEL = "model"
"""Name of the model among the pipelines of `Backends`."""
INSPECTOR = "inspector"
"""Name of the inspector among those of `Backends`."""
TIMESTEPS = (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)
"""Thousandths of the noise schedule at which the denoising loss is measured: an even grid for the mean over all."""


class Meter:
    """Measures a model on every scene of the split `test`, in a table of its own."""

    def __init__(self, run: Run, backends: Backends) -> None:
        self.run, self.backends = run, backends
        self.pipe = backends.pipeline(MODEL)
        self.decoder = self.pipe.decoder
        self.samples = run.data.samples()

    def prepare(self, batch: Sequence[Sample]) -> Callable[[], list[Row]]:
        """Read a batch on this thread; what is returned measures it on any."""
        raise NotImplementedError

    def fill(self, name: str, report: Report) -> Tally:
        """Measure the scenes that are missing."""
        known = by_id(self.samples)

        def jobs(missing: list[Key]) -> Iterator[tuple[Sequence[Sample], Callable[[], list[Row]]]]:
            for batch in batches([known[id] for (id,) in missing], self.backends.batch_size):
                yield batch, self.prepare(batch)

        def make(missing: list[Key], emit: Emit) -> None:
            done = side_by_side(
                lambda work: (work[0], work[1]()), jobs(missing), self.backends.workers
            )
            for batch, rows in done:
                emit([{"id": s.id, **row} for s, row in zip(batch, rows, strict=True)])

        about = {"models": self.run.settings["models"]}
        wanted = [(sample.id,) for sample in self.samples]
        return self.run.fill(f"measured/{name}", ("id",), about, wanted, make, report)

    def embed(self, batch: Sequence[Sample]) -> Tensor:
        """Caption embeddings z of the renders, (B, Q, D)."""
        images, _ = open_images(batch)
        return self.pipe.embed(list(images.values()), batch_size=len(batch))


class VAEMeter(Meter):
    """What the VAE (posterior mean) makes of every render."""

    def prepare(self, batch: Sequence[Sample]) -> Callable[[], list[Row]]:
        """PSNR in dB of the whole image, PSNR inside the objects, and the mean squared errors of both."""
        return lambda: self._measure(batch)

    @torch.no_grad()
    def _measure(self, batch: Sequence[Sample]) -> list[Row]:
        size = self.run.settings["image_size"]
        renderings = [render(sample.known_scene, size) for sample in batch]
        pixels = torch.stack([torch.from_numpy(r.image).permute(2, 0, 1) for r in renderings]) / 255
        mask = torch.stack([torch.from_numpy(r.objects >= 0) for r in renderings])
        decoded = self.decoder.decode(self.decoder.encode(pixels)).cpu()
        measures = (f(pixels, decoded, m) for f in (psnr, squared_error) for m in (None, mask))
        return [{"errors": row} for row in torch.stack(list(measures), 1).tolist()]


class LossMeter(Meter):
    """Denoising loss of every render given no text, the true caption, z, and the caption of another scene.

    All four see the same latents (posterior mean), timesteps and noise.
    """

    @torch.no_grad()
    def prepare(self, batch: Sequence[Sample]) -> Callable[[], list[Row]]:
        """Losses (4, timesteps) of each."""
        texts = [sample.references[0] for sample in self.samples]
        place = {sample.id: row for row, sample in enumerate(self.samples)}
        rows = [place[sample.id] for sample in batch]
        contexts = (
            self.decoder.null_context(len(batch)),
            self.decoder.encode_text([texts[row] for row in rows]).c,
            self.pipe.context(self.embed(batch)),
            self.decoder.encode_text([texts[(row + 1) % len(texts)] for row in rows]).c,
        )
        return lambda: self._measure(batch, contexts)

    @torch.no_grad()
    def _measure(self, batch: Sequence[Sample], contexts: Sequence[Context]) -> list[Row]:
        size = self.run.settings["image_size"]
        latents = self.decoder.encode(stack([sample.square(size) for sample in batch]))
        timesteps = self.run.settings["timesteps"]
        losses = np.empty((len(batch), len(contexts), len(timesteps)))
        for k, timestep in enumerate(timesteps):
            noise = torch.stack([_noise(sample.seed + 1 + k, latents) for sample in batch]).to(
                latents
            )
            for i, c in enumerate(contexts):
                losses[:, i, k] = self._loss(latents, c, timestep, noise).cpu().numpy()
        return [{"losses": row} for row in losses.tolist()]

    def _loss(self, latents: Tensor, c: Context, timestep: int, noise: Tensor) -> Tensor:
        return self.decoder.denoising_loss(
            latents,
            c,
            torch.Generator(),  # nothing is sampled: timesteps and noise are given
            timesteps=torch.full((len(latents),), timestep),
            noise=noise,
            reduction="none",
        )


def _noise(seed: int, like: Tensor) -> Tensor:
    """Noise of a scene's own seed, whatever the batch: (k, h, w)."""
    return torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(seed))


class WordsMeter(Meter):
    """z read as words: how many of its tokens lie nearest to the tokens of the scene's tag caption, place by place."""

    @torch.no_grad()
    def prepare(self, batch: Sequence[Sample]) -> Callable[[], list[Row]]:
        """Equal and compared tokens of each."""
        z = self.embed(batch)
        table = self.decoder.token_table().to(z)
        nearest = torch.cdist(z.flatten(0, 1), table).argmin(-1).view(z.shape[:-1]).tolist()
        rng = np.random.default_rng(0)  # tags leave nothing to chance
        tags = [describe(sample.known_scene, "tags", rng) for sample in batch]
        counts = equal_tokens(nearest, present(self.pipe.tokenizer, "tokenizer")(tags).input_ids)
        rows: list[Row] = [{"equal": row} for row in counts.tolist()]
        return lambda: rows


class PlainMeter(Meter):
    """Images of sentences as people type them: which of the stated facts and relations the inspector finds."""

    def prepare(self, batch: Sequence[Sample]) -> Callable[[], list[Row]]:
        """(shown, stated) facts, objects with all stated facts, and relations of each."""
        settings = self.run.settings
        texts = [
            describe(s.known_scene, "plain", np.random.default_rng([s.seed, 4])) for s in batch
        ]
        generator = self.backends.generator(settings["generator"], settings["steps"])
        (guidance,) = settings["guidances"]
        job = generator.prepare(texts, [s.seed for s in batch], guidance)
        return lambda: self._measure([parse(text) for text in texts], job)

    def _measure(self, said: Sequence[Claims], job: Job) -> list[Row]:
        inspector = self.backends.inspector(INSPECTOR)
        images, _ = job()
        seen = [r.claims for r in inspector.inspect(stack(images).to(inspector.device))]
        counts = np.concatenate([facts_shown(said, seen), relations_shown(said, seen)], 1)
        return [{"shown": row} for row in counts.tolist()]


METERS: dict[str, type[Meter]] = {
    "vae": VAEMeter,
    "denoising": LossMeter,
    "words": WordsMeter,
    "plain": PlainMeter,
}
"""By the section whose table they fill."""
