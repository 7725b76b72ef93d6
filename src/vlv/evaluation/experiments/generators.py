"""What generates images from texts: the frozen decoder of a VLV model, or any text-to-image pipeline of diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from vlv.errors import ConfigError, ModelFolderError
from vlv.models.arguments import present
from vlv.models.text_tower import tokenize

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from vlv.models.context import Context
    from vlv.models.pipeline import VLVPipeline

KINDS = ("model", "diffusers")


@dataclass(frozen=True, slots=True)
class Preset:
    """How the images of a published table were generated."""

    generator: str
    steps: int
    guidances: tuple[float, ...]


PRESETS = {
    # Table 1: Stable Diffusion 3.5 Medium, flow matching, 40 steps, guidance 1 to 4 (section 4.2.1)
    "sd35-medium": Preset(
        "diffusers:stabilityai/stable-diffusion-3.5-medium", 40, (1.0, 2.0, 3.0, 4.0)
    ),
    # vlv-tiny in the toy world; its own evaluation takes 20 steps at guidance 2
    "toy": Preset("model:vlv-tiny", 20, (1.0, 2.0, 3.0, 4.0)),
}


class Generated(NamedTuple):
    """Images of a batch."""

    images: list[Image.Image]
    truncated: list[bool] | None
    """Whether every text encoder lost some of the text, for each text; None where there were no texts."""


Job = Callable[[], Generated]
"""Generates a batch that has been read already; it may run on any thread, as tokenizers may not."""


class Generator(Protocol):
    """Generates images from texts."""

    def prepare(self, texts: Sequence[str], seeds: Sequence[int], guidance: float) -> Job:
        """Read a batch; the job generates one image per text, each from the noise of its seed, whatever the batch."""
        ...


class ModelGenerator:
    """The frozen diffusion decoder of a VLV model."""

    def __init__(self, pipe: VLVPipeline, steps: int) -> None:
        self.pipe, self._steps = pipe, steps

    def prepare(self, texts: Sequence[str], seeds: Sequence[int], guidance: float) -> Job:
        """Generate from texts."""
        tokenizer = present(self.pipe.tokenizer, "tokenizer")
        cut = tokenize(tokenizer, self.pipe.decoder.text_encoder, list(texts))[1].tolist()
        c = self.pipe.decoder.encode_text(list(texts)).c
        return lambda: Generated(self._sample(c, seeds, guidance), cut)

    def prepare_images(
        self, images: Sequence[Image.Image], seeds: Sequence[int], guidance: float
    ) -> Job:
        """Reconstruct images from their caption embeddings (experiment 2)."""
        z = self.pipe.embed(list(images), batch_size=len(images))
        return self.prepare_embeddings(z, seeds, guidance)

    def prepare_embeddings(self, z: Tensor, seeds: Sequence[int], guidance: float) -> Job:
        """Generate from caption embeddings (B, Q, D)."""
        c = self.pipe.context(z)
        return lambda: Generated(self._sample(c, seeds, guidance), None)

    @torch.no_grad()
    def _sample(self, c: Context, seeds: Sequence[int], guidance: float) -> list[Image.Image]:
        return self.pipe.draw(
            c, seed=list(seeds), steps=self._steps, guidance=guidance, batch_size=len(seeds)
        )


class DiffusersGenerator:
    """A text-to-image pipeline of diffusers.

    Args:
        name: A folder, or ``owner/name`` on the hub.
        steps: Denoising steps.
        device: Where it works.
        dtype: Of its weights.

    Raises:
        ModelFolderError: There is no such pipeline, or it takes something other than text.
    """

    def __init__(
        self, name: str, steps: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        from diffusers.pipelines.auto_pipeline import AutoPipelineForText2Image

        try:
            self.pipe: Any = AutoPipelineForText2Image.from_pretrained(
                name, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ModelFolderError(
                f"{name} is no text-to-image pipeline of diffusers ({error})"
            ) from error
        self.pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self._steps = steps
        parameters = inspect.signature(self.pipe.__call__).parameters
        longest = parameters.get("max_sequence_length")
        self._t5_length = longest.default if longest is not None else None

    def prepare(self, texts: Sequence[str], seeds: Sequence[int], guidance: float) -> Job:
        """The pipeline reads and generates at once, each image with a random generator of its own."""

        def job() -> Generated:
            images = self.pipe(
                prompt=list(texts),
                num_inference_steps=self._steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pil",
            ).images
            return Generated(list(images), self._truncated(texts))

        return job

    def _truncated(self, texts: Sequence[str]) -> list[bool]:
        """A text is lost in part only where no tokenizer reads the whole of it."""
        flags = []
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(self.pipe, name, None)
            if tokenizer is None:
                continue
            limit = tokenizer.model_max_length
            if "T5" in type(tokenizer).__name__ and self._t5_length:
                limit = self._t5_length
            ids = tokenizer(list(texts), truncation=False, verbose=False).input_ids
            flags.append([len(row) > limit for row in ids])
        return [bool(row.all()) for row in np.array(flags).T] if flags else [False] * len(texts)


def split_generator(text: str) -> tuple[str, str]:
    """Read ``model:MODEL`` or ``diffusers:NAME``.

    Raises:
        ConfigError: It is neither.
    """
    kind, _, value = text.partition(":")
    if kind not in KINDS or not value:
        raise ConfigError(
            f'"{text}" is no generator; write model:MODEL for a VLV model, or diffusers:NAME for a pipeline of diffusers'
        )
    return kind, value
