"""DiffusionDecoder: context c to image, frozen; and the denoising loss that teaches the encoder.

Shapes: B batch, Q queries, D text width, H W pixels, k h w latents (k channels). x_t = sqrt(a) x +
sqrt(1 - a) eps with a the scheduler's ``alphas_cumprod[t]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from vlv.errors import ConfigError
from vlv.models.arguments import finite, missing, present, whole_number
from vlv.models.compilation import own_precision
from vlv.models.context import Context
from vlv.models.draws import rand, randn_like
from vlv.models.pixels import as_float
from vlv.models.text_tower import contextualize, num_positions, token_embeddings, tokenize
from vlv.storage import Json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import PreTrainedTokenizerBase

    from vlv.models.text_tower import Tower

    Denoiser: TypeAlias = UNet2DConditionModel | SD3Transformer2DModel

Sampler = Literal["dpm", "ddim", "ddpm"]
TimestepSampling = Literal["uniform", "text"]

_CPU_PIXELS = 2 * 192 * 192
"""That a CPU's VAE encodes at once."""

SAMPLERS = {"dpm": DPMSolverMultistepScheduler, "ddim": DDIMScheduler, "ddpm": DDPMScheduler}


@runtime_checkable
class Scheduler(Protocol):
    """What is used of a training schedule of diffusers."""

    @property
    def config(self) -> Json:
        """Its settings."""


class TextContext(NamedTuple):
    """Encoded texts."""

    c: Context
    num_truncated: int
    """How many texts lost tokens because the text tower has no more positions."""


class Posterior(NamedTuple):
    """The VAE's Gaussian over latents, before scaling."""

    mean: Tensor
    """(B, k, h, w)."""
    std: Tensor
    """(B, k, h, w)."""


class DiffusionDecoder(nn.Module):
    """The frozen text-to-image model: text tower T, U-Net, VAE and noise schedule.

    Training freezes it (`freeze`) and lets gradients flow through the U-Net and the text tower to z.
    All but the text tower may be None where they are not needed (stage 2 without a denoising loss,
    cached latents).

    Args:
        text_encoder: The CLIP text transformer.
        tokenizer: Its tokenizer.
        unet: Text-conditioned U-Net on latents.
        vae: Latent auto-encoder.
        scheduler: The training schedule; never changed, samplers are built from its configuration.
    """

    components: tuple[str, ...] = ("text_encoder", "tokenizer", "unet", "vae", "scheduler")
    """Names of the components, as folders in the diffusers layout."""
    optional: tuple[str, ...] = ()
    """Components that a model may do without."""
    towers: tuple[str, ...] = ("text_encoder",)
    """The components that make the context of z."""
    denoiser_name = "unet"
    """The component that predicts what the noise hides."""

    def __init__(
        self,
        text_encoder: Tower,
        tokenizer: PreTrainedTokenizerBase | None,
        unet: UNet2DConditionModel | None,
        vae: AutoencoderKL | None,
        scheduler: Scheduler | None,
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.unet = unet
        self.vae = vae
        self.scheduler = scheduler

    def freeze(self) -> None:
        """Let nothing in it train; gradients still flow through it."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> DiffusionDecoder:
        """Stay in eval mode, whatever the surrounding module does."""
        return super().train(False)

    # --- context ---------------------------------------------------------------------------------

    @property
    def text_width(self) -> int:
        """D, the width of z."""
        return int(self.text_encoder.config.hidden_size)

    @property
    def num_positions(self) -> int:
        """The longest z, in tokens."""
        return num_positions(self.text_encoder)

    def token_embeddings(self, ids: Tensor) -> Tensor:
        """The space z lives in: embeddings (B, L, D) of token ids (B, L)."""
        return token_embeddings(self.text_encoder, ids)

    def token_table(self) -> Tensor:
        """The embeddings of every token, (V, D)."""
        size = int(self.text_encoder.config.vocab_size)
        ids = torch.arange(size, device=self.text_encoder.device)
        return self.token_embeddings(ids[None])[0]

    def context(self, z: Tensor) -> Context:
        """From caption embedding (B, Q, D) to context: c = T(z)."""
        return Context(contextualize(self.text_encoder, z))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> TextContext:
        """The context of texts, padded to the tower's length; longer texts are cut and counted."""
        tokenizer = present(self.tokenizer, "tokenizer")
        ids, truncated = tokenize(tokenizer, self.text_encoder, list(texts))
        c = self.context(self.token_embeddings(ids))
        return TextContext(c, int(truncated.sum()))

    def null_context(self, batch_size: int = 1) -> Context:
        """The context of the empty text, padded with the tokenizer's pad token and read without a mask, as Stable Diffusion does."""
        return self.encode_text([""]).c.expand(batch_size)

    def _null_like(self, c: Context) -> Context:
        """The null context (one row) that guidance leads away from on the way to c."""
        return self.null_context()

    # --- latents ---------------------------------------------------------------------------------

    @property
    def downscale_factor(self) -> int:
        """Pixels per latent position along one side, from the VAE's configuration."""
        return int(2 ** (len(present(self.vae, "vae").config["block_out_channels"]) - 1))

    @property
    def denoiser(self) -> Denoiser | None:
        """The network that predicts what the noise hides, or None."""
        return self.unet

    @property
    def image_size(self) -> int:
        """The side in pixels that the denoiser was trained on."""
        return int(self._denoiser().config["sample_size"]) * self.downscale_factor

    def _denoiser(self) -> Denoiser:
        if self.denoiser is None:
            raise missing(self.denoiser_name)
        return self.denoiser

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> Posterior:
        """The VAE's Gaussian for images, without the latent scale.

        Args:
            pixels: (B, 3, H, W), float in [0, 1] or uint8, sides divisible by `downscale_factor`.

        Returns:
            Mean and standard deviation, each (B, k, h, w).
        """
        vae, factor = present(self.vae, "vae"), self.downscale_factor
        height, width = pixels.shape[-2:]
        if height % factor or width % factor:
            raise ValueError(f"the VAE reads sides divisible by {factor}, got {height}x{width}")
        inputs = (as_float(pixels) * 2 - 1).to(vae.device, vae.dtype)
        with _full_precision(inputs):
            pieces = [vae.encode(piece).latent_dist for piece in _pieces(inputs)]
        mean, std = (
            torch.cat(parts) for parts in zip(*((p.mean, p.std) for p in pieces), strict=True)
        )
        return Posterior(mean.float(), std.float())

    def draw_latents(self, posterior: Posterior, generator: torch.Generator | None) -> Tensor:
        """Scaled latents from a posterior: a draw, or its mean where the generator is None.

        Args:
            posterior: From `posterior`, or read from a cache.
            generator: Source of the draw.

        Returns:
            Latents on the scale of the U-Net, (B, k, h, w).
        """
        latents = posterior.mean
        if generator is not None:
            latents = latents + posterior.std * randn_like(latents, generator)
        shift, scale = self._latent_scale()
        return (latents - shift) * scale

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (B, 3, H, W) to scaled latents (B, k, h, w); without a generator, of the mean."""
        return self.draw_latents(self.posterior(pixels), generator)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, k, h, w) to pixels (B, 3, H, W) in [0, 1]."""
        vae = present(self.vae, "vae")
        shift, scale = self._latent_scale()
        inputs = (latents / scale + shift).to(vae.dtype)
        with _full_precision(inputs):
            sample: Tensor = vae.decode(inputs).sample
        return (sample.float() / 2 + 0.5).clamp(0, 1)

    def _latent_scale(self) -> tuple[float, float]:
        """(shift, scale) of the VAE's configuration."""
        config = present(self.vae, "vae").config
        return float(config.get("shift_factor") or 0.0), float(config["scaling_factor"])

    # --- the loss --------------------------------------------------------------------------------

    @property
    def num_timesteps(self) -> int:
        """T, the length of the noise schedule."""
        return int(self._schedule().config["num_train_timesteps"])

    def _schedule(self) -> Scheduler:
        return present(self.scheduler, "scheduler")

    def draw_timesteps(
        self, batch_size: int, generator: torch.Generator, sampling: TimestepSampling = "uniform"
    ) -> Tensor:
        """Draw one timestep per image.

        "uniform" is the paper's (section 3.2). "text" draws floor(T sqrt(u)), u uniform: density
        2t/T, mean 2T/3, so that mid and high noise, where the image has to come from the text, is
        seen more often. The loss is not reweighted: in expectation it is the uniform loss with the
        weight 2t/T on each timestep, so its values compare only with others drawn the same way.

        Args:
            batch_size: B.
            generator: Source of the draws.
            sampling: "uniform" or "text".

        Returns:
            Integers in [0, T), (B,), on the generator's device.
        """
        u = rand(batch_size, generator)
        match sampling:
            case "uniform":
                position = u
            case "text":
                position = u.sqrt()
            case _:
                raise ConfigError(f'timestep sampling is "{sampling}"; choose "uniform" or "text"')
        return (position * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(a) x + sqrt(1 - a) eps, (B, k, h, w)."""
        signal, sigma = self._signal_and_sigma(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the U-Net predicts, by the scheduler's ``prediction_type``.

        epsilon: eps. v_prediction: sqrt(a) eps - sqrt(1 - a) x (Salimans and Ho 2022, section 4).
        sample: x.

        Raises:
            ConfigError: The prediction type is another.
        """
        kind = str(self._schedule().config["prediction_type"])
        match kind:
            case "epsilon":
                return noise
            case "sample":
                return latents
            case "v_prediction":
                signal, sigma = self._signal_and_sigma(timesteps, latents)
                return signal * noise - sigma * latents
        raise ConfigError(
            f'the scheduler has the prediction_type "{kind}"; '
            "epsilon, v_prediction and sample are supported"
        )

    def denoising_loss(
        self,
        latents: Tensor,
        c: Context,
        generator: torch.Generator,
        *,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        sampling: TimestepSampling = "uniform",
        weights: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """The diffusion loss of stage 1 (paper, equation 1).

        It says how well c tells the U-Net what the noise hides.

        Args:
            latents: Scaled latents, (B, k, h, w).
            c: B contexts.
            generator: Source of the timesteps, then the noise, where they are not given.
            timesteps: (B,) integers.
            noise: (B, k, h, w).
            sampling: How timesteps are drawn, see `draw_timesteps`.
            weights: Weight of each latent position, (B, 1, h, w); None weighs all alike.
            reduction: "mean" over the batch, or "none".

        Returns:
            Mean squared error against `target` in float32: a scalar, or (B,).
        """
        if timesteps is None:
            timesteps = self.draw_timesteps(len(latents), generator, sampling)
        if noise is None:
            noise = randn_like(latents, generator)
        timesteps = timesteps.to(latents.device)
        noisy = self.add_noise(latents, noise, timesteps)
        with own_precision(self._denoiser()):
            prediction = self._predict(noisy, self._clock(timesteps, latents), c)
        target = self.target(latents, noise, timesteps)
        error = F.mse_loss(prediction.float(), target.float(), reduction="none")
        if weights is not None:
            error = error * weights
        per_image = error.flatten(1).mean(1)  # (B,)
        return per_image.mean() if reduction == "mean" else per_image

    def _signal_and_sigma(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a) and sqrt(1 - a), each (B, 1, 1, 1)."""
        alphas: Tensor | None = getattr(self._schedule(), "alphas_cumprod", None)
        if alphas is None:
            raise ConfigError(
                f"{type(self.scheduler).__name__} has no alphas_cumprod; "
                "use a scheduler of the DDPM family"
            )
        a = alphas.to(timesteps.device)[timesteps].to(like.device, torch.float32)
        a = a[:, None, None, None]
        return a.sqrt().to(like.dtype), (1 - a).sqrt().to(like.dtype)

    def _clock(self, timesteps: Tensor, latents: Tensor) -> Tensor:
        """Timestep conditioning of the denoiser, (B,)."""
        return timesteps

    def _predict(self, noisy: Tensor, timesteps: Tensor, c: Context) -> Tensor:
        unet = present(self.unet, "unet")
        dtype = unet.dtype  # diffusers walks through the modules to find it
        states = c.sequence.to(dtype)
        noise: Tensor = unet(noisy.to(dtype), timesteps, encoder_hidden_states=states).sample
        return noise

    # --- sampling --------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        c: Context,
        *,
        seeds: Sequence[int],
        steps: int = 20,
        guidance: float = 2.0,
        sampler: Sampler = "dpm",
        height: int | None = None,
        width: int | None = None,
        null: Context | None = None,
    ) -> Tensor:
        """Draw one image per context.

        Each image starts from the noise of its own seed, drawn on the CPU. "dpm" and "ddim" are
        deterministic from there, "ddpm" draws on from the same generator: a batch of n equals n
        single calls.

        Args:
            c: B contexts.
            seeds: B seeds.
            steps: Number of sampler steps.
            guidance: Classifier-free guidance; 1 follows c alone and skips the null branch.
            sampler: "dpm" (DPM-Solver++, second order), "ddim" (eta 0) or "ddpm" (ancestral, the
                VLV authors').
            height: Pixels; None is the size the U-Net was trained on.
            width: Likewise.
            null: Context that guidance leads away from, one row; None is that of the empty text.

        Returns:
            Pixels in [0, 1], (B, 3, H, W).
        """
        if len(seeds) != len(c):
            raise ValueError(f"{len(c)} contexts need as many seeds, got {len(seeds)}")
        guidance = finite("guidance", guidance)
        solver = self._make_sampler(sampler, steps)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents = self._first_noise(generators, height, width)
        latents = latents * getattr(solver, "init_noise_sigma", 1.0)
        draws = {"generator": generators} if sampler == "ddpm" else {}
        scale = getattr(solver, "scale_model_input", lambda sample, _: sample)
        if guidance == 1:
            null = None
        else:
            null = (self._null_like(c) if null is None else null).expand(len(c))
        for t in solver.timesteps:
            inputs = scale(latents, t)
            prediction = self._predict(inputs, t, c).float()
            if null is not None:
                baseline = self._predict(inputs, t, null).float()
                prediction = baseline + guidance * (prediction - baseline)
            latents = solver.step(prediction, t, latents, **draws).prev_sample
        return self.decode(latents)

    def _make_sampler(self, sampler: Sampler, steps: int) -> Any:
        """A fresh sampling scheduler with the noise levels and prediction type of training."""
        if sampler not in SAMPLERS:
            raise ConfigError(f'the sampler is "{sampler}"; choose one of {", ".join(SAMPLERS)}')
        whole_number("steps", steps, 1, self.num_timesteps)
        kind, config = self._sampler_config(sampler)
        # `from_config` forgets values that the training scheduler took by default, until it is
        # saved and loaded; without this mark it keeps them.
        config.pop("_use_default_values", None)
        solver = kind.from_config(config)
        solver.set_timesteps(steps, device=self._denoiser().device)
        return solver

    def _sampler_config(self, sampler: Sampler) -> tuple[Any, Json]:
        """Class and settings of a sampler; latents must not be clipped as pixels would be."""
        return SAMPLERS[sampler], dict(self._schedule().config) | {"clip_sample": False}

    def _first_noise(
        self, generators: Sequence[torch.Generator], height: int | None, width: int | None
    ) -> Tensor:
        """Standard normal float32 latents (B, k, h, w), each image from its own CPU generator."""
        denoiser, factor = self._denoiser(), self.downscale_factor
        height, width = height or self.image_size, width or self.image_size
        if height % factor or width % factor:
            raise ConfigError(f"image sides are divisible by {factor}, got {height}x{width}")
        shape = (int(denoiser.config["in_channels"]), height // factor, width // factor)
        draws = [torch.randn(shape, generator=generator) for generator in generators]
        return torch.stack(draws).to(denoiser.device)


def _full_precision(tensor: Tensor) -> torch.autocast:
    """No autocast: the VAE computes in the dtype of its weights."""
    return torch.autocast(tensor.device.type, enabled=False)


def _pieces(images: Tensor) -> tuple[Tensor, ...]:
    """Images (B, 3, H, W) as the VAE encodes them together: on a CPU as many as let its caches hold what the first layers make of them.

    Beyond that the time of each image grows.
    """
    if images.device.type != "cpu":
        return (images,)
    return torch.split(images, max(1, _CPU_PIXELS // images[0, 0].numel()))
