"""Diffusion decoders with two CLIP towers and a pooled vector: SDXL, Stable Diffusion 3 and 3.5.

z carries the widths of both towers side by side, D = D1 + D2, as each token of a text has an
embedding in either. Shapes: B batch, Q queries, L token ids, P pooled width, k h w latents.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from vlv.errors import ConfigError
from vlv.models.arguments import present
from vlv.models.context import Context
from vlv.models.diffusion import SAMPLERS, DiffusionDecoder, Sampler, TextContext
from vlv.models.text_tower import num_positions, penultimate_and_last, token_embeddings, tokenize
from vlv.storage import Json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel

    from vlv.models.diffusion import Scheduler
    from vlv.models.text_tower import Tower

_NUM_SIZE_CONDITIONS = 6
T5_LENGTH = 256


class TwoTowerDecoder(DiffusionDecoder):
    """What SDXL and Stable Diffusion 3 share: the towers' penultimate states beside each other."""

    towers = ("text_encoder", "text_encoder_2")

    def __init__(
        self,
        text_encoder: Tower,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: PreTrainedTokenizerBase | None,
        vae: AutoencoderKL | None,
        scheduler: Scheduler | None,
        unet: UNet2DConditionModel | None = None,
    ) -> None:
        super().__init__(text_encoder, tokenizer, unet, vae, scheduler)
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2

    @property
    def text_width(self) -> int:
        """D = D1 + D2."""
        return sum(self._widths())

    @property
    def num_positions(self) -> int:
        """The longest z, in tokens."""
        return min(num_positions(self.text_encoder), num_positions(self.text_encoder_2))

    def _widths(self) -> list[int]:
        return [int(tower.config.hidden_size) for tower in (self.text_encoder, self.text_encoder_2)]

    def context(self, z: Tensor) -> Context:
        """From z (B, Q, D) to c = [T1(z1), T2(z2)] and the pooled vector.

        Under the causal mask the last position alone has seen all of z, as the end token of a text
        has seen all of the text; so the pooled vector is read there.
        """
        last = torch.full((len(z),), z.shape[1] - 1, device=z.device)
        return self._contextualize(z, last, last)

    def _contextualize(self, z: Tensor, end_1: Tensor, end_2: Tensor) -> Context:
        """The context of embeddings; the ends (B,) are where each tower's pooled vector is read."""
        if z.ndim != 3 or z.shape[-1] != self.text_width:
            raise ValueError(
                f"the two text towers read embeddings of shape (B, Q, {self.text_width}), "
                f"got {tuple(z.shape)}"
            )
        z_1, z_2 = torch.split(z, self._widths(), dim=-1)
        first, last_1 = penultimate_and_last(self.text_encoder, z_1)
        second, last_2 = penultimate_and_last(self.text_encoder_2, z_2)
        rows = torch.arange(len(z), device=z.device)
        pooled = self._pool(last_1[rows, end_1], last_2[rows, end_2])  # (B, P)
        return Context(torch.cat([first, second], dim=-1), pooled)

    @abstractmethod
    def _pool(self, end_1: Tensor, end_2: Tensor) -> Tensor:
        """The pooled vector (B, P) of both towers' last states at the end, (B, D1) and (B, D2)."""

    def token_embeddings(self, ids: Tensor) -> Tensor:
        """The embeddings of both towers for ids (B, L) of their common vocabulary, (B, L, D)."""
        towers = (self.text_encoder, self.text_encoder_2)
        return torch.cat([token_embeddings(tower, ids) for tower in towers], dim=-1)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> TextContext:
        """The context of texts, padded to the towers' length; longer texts are cut and counted."""
        embedded, ends, lost = [], [], []
        for tokenizer, tower in (
            (present(self.tokenizer, "tokenizer"), self.text_encoder),
            (present(self.tokenizer_2, "tokenizer_2"), self.text_encoder_2),
        ):
            ids, truncated = tokenize(tokenizer, tower, list(texts))
            embedded.append(token_embeddings(tower, ids))
            ends.append((ids == tokenizer.eos_token_id).int().argmax(-1))  # the first of them
            lost.append(truncated)
        c = self._contextualize(torch.cat(embedded, dim=-1), *ends)
        return TextContext(c, int((lost[0] | lost[1]).sum()))


class SDXLDecoder(TwoTowerDecoder):
    """SDXL: U-Net with the pooled vector of the second tower, and the image's size as conditions."""

    components = (
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "unet",
        "vae",
        "scheduler",
    )

    def _pool(self, end_1: Tensor, end_2: Tensor) -> Tensor:
        return projected(self.text_encoder_2, end_2)

    def null_context(self, batch_size: int = 1) -> Context:
        """Zeros, which stood for no text when SDXL was trained."""
        like = next(self.text_encoder_2.parameters())
        return Context(
            like.new_zeros(batch_size, self.num_positions, self.text_width),
            like.new_zeros(batch_size, self._pooled_width()),
        )

    def _pooled_width(self) -> int:
        return int(self.text_encoder_2.config.projection_dim or 0)

    def _predict(self, noisy: Tensor, timesteps: Tensor, c: Context) -> Tensor:
        unet = present(self.unet, "unet")
        dtype = unet.dtype  # diffusers walks through the modules to find it
        noise: Tensor = unet(
            noisy.to(dtype),
            timesteps,
            encoder_hidden_states=c.sequence.to(dtype),
            added_cond_kwargs={
                "text_embeds": pooled_of(c).to(dtype),
                "time_ids": self._size_conditions(noisy).to(dtype),
            },
        ).sample
        return noise

    def _size_conditions(self, latents: Tensor) -> Tensor:
        """Original size, crop corner and target size (B, 6): an image of this size, not cropped."""
        config = present(self.unet, "unet").config
        width = config["projection_class_embeddings_input_dim"] - self._pooled_width()
        if width != _NUM_SIZE_CONDITIONS * config["addition_time_embed_dim"]:
            raise ConfigError(
                "this SDXL U-Net expects other conditions than the six sizes, as the refiner does; "
                "name the base model"
            )
        height, width = (side * self.downscale_factor for side in latents.shape[-2:])
        sizes = latents.new_tensor([height, width, 0, 0, height, width])
        return sizes.expand(len(latents), -1)


class SD3Decoder(TwoTowerDecoder):
    """Stable Diffusion 3 and 3.5: a transformer that predicts the flow from image to noise.

    x_t = (1 - s) x + s eps, and the transformer predicts eps - x. z enters the two CLIP towers; the
    T5 tower, which may be absent, reads texts only. Where T5 rows are missing they are zeros, as
    when Stable Diffusion 3 was trained without T5.
    """

    components = (
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "transformer",
        "vae",
        "scheduler",
    )
    optional = ("text_encoder_3", "tokenizer_3")
    denoiser_name = "transformer"

    def __init__(
        self,
        *towers_and_rest: Any,
        transformer: SD3Transformer2DModel | None,
        text_encoder_3: T5EncoderModel | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
        **parts: Any,
    ) -> None:
        super().__init__(*towers_and_rest, **parts)
        self.transformer = transformer
        self.text_encoder_3, self.tokenizer_3 = text_encoder_3, tokenizer_3

    @property
    def denoiser(self) -> SD3Transformer2DModel | None:
        """The transformer, or None."""
        return self.transformer

    # --- context ---------------------------------------------------------------------------------

    def _pool(self, end_1: Tensor, end_2: Tensor) -> Tensor:
        pooled = projected(self.text_encoder, end_1), projected(self.text_encoder_2, end_2)
        return torch.cat(pooled, dim=-1)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> TextContext:
        """The context of texts; ones that CLIP cuts are counted, though T5 reads on."""
        c, num_truncated = super().encode_text(texts)
        if self.text_encoder_3 is None:
            return TextContext(c, num_truncated)
        ids = present(self.tokenizer_3, "tokenizer_3")(
            list(texts),
            padding="max_length",
            max_length=T5_LENGTH,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        t5 = self.text_encoder_3(ids.to(self.text_encoder_3.device)).last_hidden_state  # (B, T, D3)
        return TextContext(replace(c, t5=t5.to(c.sequence)), num_truncated)

    def null_context(self, batch_size: int = 1) -> Context:
        """The context of the empty text as the CLIP towers read it, like the context of z."""
        return super().encode_text([""]).c.expand(batch_size)

    def _null_like(self, c: Context) -> Context:
        return self.null_context() if c.t5 is None else self.encode_text([""]).c

    # --- the loss --------------------------------------------------------------------------------

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = (1 - s) x + s eps, (B, k, h, w)."""
        s = self._noise_share(timesteps, latents)[:, None, None, None]
        return (1 - s) * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The flow eps - x."""
        return noise - latents

    def _noise_share(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """The share s of noise at positions t of the schedule (B,), moved by its ``shift``."""
        config = self._schedule().config
        if config.get("use_dynamic_shifting") or "shift" not in config:
            raise ConfigError(
                f"{type(self.scheduler).__name__} is no flow-matching schedule with a fixed shift; "
                "use the scheduler of Stable Diffusion 3 or 3.5"
            )
        u = (timesteps.to(like.device, torch.float32) + 1) / self.num_timesteps
        shift = float(config["shift"])
        return (shift * u / (1 + (shift - 1) * u)).to(like.dtype)

    def _clock(self, timesteps: Tensor, latents: Tensor) -> Tensor:
        return self._noise_share(timesteps, latents) * self.num_timesteps

    def _predict(self, noisy: Tensor, timesteps: Tensor, c: Context) -> Tensor:
        transformer = present(self.transformer, "transformer")
        missing = int(transformer.config["joint_attention_dim"]) - self.text_width
        if c.t5 is None:
            sequence = F.pad(c.sequence, (0, missing, 0, T5_LENGTH))
        else:
            sequence = torch.cat([F.pad(c.sequence, (0, missing)), c.t5], dim=1)
        dtype = transformer.dtype  # diffusers walks through the modules to find it
        noise: Tensor = transformer(
            hidden_states=noisy.to(dtype),
            timestep=timesteps.to(noisy.device).expand(len(noisy)),
            encoder_hidden_states=sequence.to(dtype),
            pooled_projections=pooled_of(c).to(dtype),
        ).sample
        return noise

    # --- sampling --------------------------------------------------------------------------------

    def _sampler_config(self, sampler: Sampler) -> tuple[Any, Json]:
        """DPM-Solver++ for flows; DDIM of a flow is Euler's method."""
        config = self._schedule().config
        if sampler == "dpm":
            return SAMPLERS["dpm"], {
                "num_train_timesteps": self.num_timesteps,
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
                "flow_shift": config["shift"],
            }
        return FlowMatchEulerDiscreteScheduler, {**config, "stochastic_sampling": False}


def projected(tower: Tower, state: Tensor) -> Tensor:
    """The pooled vector (B, P) of a tower's last state at the end (B, D)."""
    projection: nn.Linear | None = getattr(tower, "text_projection", None)
    pooled: Tensor = present(projection, "text projection")(state)
    return pooled


def pooled_of(c: Context) -> Tensor:
    """The pooled vector (B, P), which only a context of another family lacks."""
    if c.pooled is None:
        raise ValueError("this diffusion decoder needs a context with a pooled vector")
    return c.pooled


def decoder_class(names: Sequence[str], text_encoder: object = None) -> type[DiffusionDecoder]:
    """The family of a diffusion decoder, by its components.

    Args:
        names: Of the components there are.
        text_encoder: The first tower, by which families with two towers differ where the denoiser
            was not loaded.
    """
    if "transformer" in names or hasattr(text_encoder, "text_projection"):
        return SD3Decoder
    return SDXLDecoder if "text_encoder_2" in names else DiffusionDecoder


def make_diffusion_decoder(components: Mapping[str, Any]) -> DiffusionDecoder:
    """The diffusion decoder of a family from components by name; None where one is absent."""
    names = [name for name, part in components.items() if part is not None]
    kind = decoder_class(names, components.get("text_encoder"))
    parts: Json = {n: components.get(n) for n in (*kind.components, *kind.optional)}
    return kind(**parts)
