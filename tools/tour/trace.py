"""One image through every part of a model, and every tensor on the way.

Shapes: B = 1 image, N image tokens, P prompt tokens, Q queries, d Florence width, D text width, E language-model
width, T caption tokens, k h w latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vlv.data.images import to_pil
from vlv.models.arguments import present
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.pixels import as_batch, as_float

if TYPE_CHECKING:
    from PIL import Image

    from vlv.models.context import Context
    from vlv.models.decoding import Caption
    from vlv.models.encoder import VLVEncoder
    from vlv.models.pipeline import VLVPipeline

NUM_STOPS = 6
"""Moments of the sampling that are shown."""
NUM_DRAWS = 256
"""Draws of timestep and noise behind each denoising loss."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """From pixels to the caption embedding."""

    pixels: Tensor
    """(1, 3, H, W) in [0, 1]."""
    vision: Tensor
    """Feature map of the vision tower, (1, channels, rows, columns)."""
    features: Tensor
    """Image tokens, (1, N, d)."""
    inputs: Tensor
    """Image tokens and prompt, (1, N + P, d)."""
    memory: Tensor
    """Encoder states, (1, N + P, d)."""
    queries: Tensor
    """(1, Q, d)."""
    hidden: Tensor
    """Decoder states, (1, Q, d)."""
    z: Tensor
    """The caption embedding, (1, Q, D)."""
    c: Context
    """The context, with a sequence (1, Q, D)."""


@dataclass(frozen=True, slots=True)
class Captioning:
    """From context to words."""

    e: Tensor
    """The prefix, (1, Q, E)."""
    ids: Tensor
    """Caption tokens with the end token, (1, T)."""
    pieces: tuple[str, ...]
    """The text of each token."""
    caption: Caption
    own_loss: float
    """Cross-entropy of the model's own caption, nats per token."""
    true_loss: float
    """Cross-entropy of the true caption, nats per token."""


class Moment(NamedTuple):
    """A moment of the sampling."""

    timestep: int
    """Of the noise schedule; 0 at the end."""
    latents: Tensor
    """(1, k, h, w)."""
    picture: Image.Image
    """The latents decoded as they are."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """From context to image."""

    mean: Tensor
    """Of the VAE's posterior, (1, k, h, w)."""
    std: Tensor
    """Of the VAE's posterior, (1, k, h, w)."""
    latents: Tensor
    """Scaled latents of the image, (1, k, h, w)."""
    through_vae: Image.Image
    """The latents of the image decoded: the best that any drawing can be."""
    losses: dict[str, float]
    """Denoising loss of the image's latents given no text, z, and the true caption."""
    moments: tuple[Moment, ...]
    prediction: Tensor
    """What the U-Net says at the first step, (1, k, h, w)."""
    image: Image.Image
    """The end of the sampling."""


@torch.no_grad()
def encode(pipe: VLVPipeline, image: Image.Image) -> Encoding:
    """Take an image to z and c, and keep what lies between (paper, section 3.1)."""
    pixels = as_float(as_batch([image], pipe.image_size, pipe.framing))
    encoder = cast("VLVEncoder", pipe.encoder)
    backbone = encoder.backbone.model
    language = backbone.language_model
    with _watched(backbone.vision_tower, language.encoder, language.decoder) as calls:
        features = encoder.image_features(pixels)
        z = encoder.encode_features(features)
    vision, reading, decoder = calls
    return Encoding(
        pixels=pixels,
        vision=vision.output.last_hidden_state,
        features=features,
        inputs=reading.named["inputs_embeds"],
        memory=reading.output.last_hidden_state,
        queries=decoder.named["inputs_embeds"].detach(),
        hidden=decoder.output.last_hidden_state,
        z=z,
        c=pipe.context(z),
    )


@torch.no_grad()
def caption(pipe: VLVPipeline, c: Context, truth: str, *, max_new_tokens: int = 300) -> Captioning:
    """Read a context in words (paper, section 3.3)."""
    reader = present(pipe.caption_decoder, "caption_decoder")
    (written,) = reader.generate(c.sequence, max_new_tokens=max_new_tokens)
    ids = reader.tokenize([written.text]).ids
    return Captioning(
        e=reader.prefix(c.sequence),
        ids=ids,
        pieces=tuple(str(reader.tokenizer.decode([token])) for token in ids[0].tolist()),
        caption=written,
        own_loss=float(reader.loss(c.sequence, [written.text])),
        true_loss=float(reader.loss(c.sequence, [truth])),
    )


@torch.no_grad()
def draw(
    pipe: VLVPipeline, encoding: Encoding, truth: str, *, seed: int, steps: int, guidance: float
) -> Drawing:
    """Rebuild the image from its context, and measure what the context is worth (paper, section 3.2, equation 1)."""
    decoder = _Decoder(pipe)
    posterior, latents = decoder.posterior(encoding.pixels), decoder.encode(encoding.pixels)
    contexts = {
        "no text": decoder.null_context(),
        "z": encoding.c,
        "the true caption": decoder.encode_text([truth]).c,
    }
    size = pipe.image_size
    with _watched(present(pipe.unet, "unet")) as calls:
        pixels = decoder.sample(
            encoding.c, seeds=[seed], steps=steps, guidance=guidance, height=size, width=size
        )
    with_c = calls[:: len(calls) // steps]  # guidance calls the U-Net a second time, without text
    stops = sorted({round(i * (steps - 1) / (NUM_STOPS - 1)) for i in range(NUM_STOPS)})
    seen = [(int(with_c[i].given[1]), with_c[i].given[0]) for i in stops]
    seen.append((0, decoder.decoded[-1]))
    moments = [Moment(t, x, to_pil(decoder.decode(x)[0])) for t, x in seen]
    return Drawing(
        mean=posterior.mean,
        std=posterior.std,
        latents=latents,
        through_vae=to_pil(decoder.decode(latents)[0]),
        losses={name: denoising_loss(decoder, latents, c, seed) for name, c in contexts.items()},
        moments=tuple(moments),
        prediction=with_c[0].output.sample,
        image=to_pil(pixels[0]),
    )


@torch.no_grad()
def denoising_loss(decoder: DiffusionDecoder, latents: Tensor, c: Context, seed: int) -> float:
    """Mean loss of one image over `NUM_DRAWS` timesteps and noises; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    many = latents.expand(NUM_DRAWS, -1, -1, -1)
    return float(decoder.denoising_loss(many, c.expand(NUM_DRAWS), generator))


class _Decoder(DiffusionDecoder):
    """The decoder of a pipeline, which keeps the latents that it decodes."""

    def __init__(self, pipe: VLVPipeline) -> None:
        tower = pipe.decoder.text_encoder
        super().__init__(tower, pipe.tokenizer, pipe.unet, pipe.vae, pipe.scheduler)
        self.decoded: list[Tensor] = []

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(latents)
        return super().decode(latents)


class _Call(NamedTuple):
    """One call of a module."""

    given: tuple[Any, ...]
    named: dict[str, Any]
    output: Any


@contextmanager
def _watched(*modules: nn.Module) -> Iterator[list[_Call]]:
    """Record the calls of some modules, in order."""
    calls: list[_Call] = []

    def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        calls.append(_Call(given, named, output))

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
