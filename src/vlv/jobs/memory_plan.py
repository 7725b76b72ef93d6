"""What a preset's models need: parameters, download and memory of each use, before anything is downloaded.

Shapes: B batch, Q queries, D text width, H W pixels, T caption tokens, E language-model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from vlv.config import load_config
from vlv.models.architectures import architectures, num_parameters, outline
from vlv.models.card import origin_of
from vlv.models.folder import part_dtype
from vlv.training.assemble import Parts, make_objective, set_precision
from vlv.training.hollow import hollow, imagined
from vlv.training.memory import Footprint, FullLength, rehearse, rehearse_training, training_batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from vlv.config import ModelPreset, RunConfig
    from vlv.models.captioner import CaptionDecoder
    from vlv.models.diffusion import DiffusionDecoder
    from vlv.models.encoder import VLVEncoder
    from vlv.training.objective import Objective

STAGES = {"stage 1": "paper-stage1", "stage 2": "paper-stage2"}
CAPTION_BATCH, CAPTION_TOKENS, PICTURE_BATCH = 8, 300, 4  # the defaults of the commands


@dataclass(frozen=True)
class PlannedPart:
    """One part of a preset."""

    name: str
    source: str
    num_parameters: int
    download: int
    """Bytes of its weights on the hub; 0 for a folder on this machine."""
    licence: str


@dataclass(frozen=True)
class Use:
    """What one use of the models needs."""

    name: str
    batch_size: int
    precision: str
    footprint: Footprint


def describe_parts(preset: ModelPreset) -> list[PlannedPart]:
    """The parts of a preset, with what is to be downloaded of each."""
    found, drawn = architectures(preset.model), outline(preset)
    modules = {
        "florence": drawn.encoder.backbone,
        "decoder": drawn.decoder,
        "llm": drawn.caption_decoder.llm,
    }
    parts = []
    for name, module in modules.items():
        source, known = getattr(preset.model, name), found[name]
        count = num_parameters(module)
        download = count * known.stored.itemsize if known.stored is not None else 0
        where = f"{source.path}@{source.revision}" if source.revision else source.path
        licence = known.licence or origin_of(source.path, name, revision=source.revision).licence
        parts.append(PlannedPart(name, where, count, download, licence or "licence unknown"))
    trained = num_parameters(drawn.encoder) - num_parameters(drawn.encoder.backbone)
    trained += num_parameters(drawn.caption_decoder.mlp)
    return [*parts, PlannedPart("queries, projectors", "fresh", trained, 0, "")]


def plan_uses(preset: ModelPreset, *, batch_size: int | None = None) -> Iterator[Use]:
    """Predicted memory of captioning, reconstruction and both stages, one after the other: each takes seconds.

    Args:
        preset: The models.
        batch_size: Images together; None takes the defaults of the commands and of the paper's runs.
    """
    yield plan_captioning(preset, batch_size or CAPTION_BATCH, torch.bfloat16)
    yield plan_reconstruction(preset, batch_size or PICTURE_BATCH, torch.bfloat16)
    for name, run in STAGES.items():
        changes = [f"loop.batch_size={batch_size}", "loop.global_batch_size=null"]
        changes = [] if batch_size is None else [*changes, "loop.accumulate=2"]
        yield plan_training(preset, name, load_config(run, changes))


# --- uses -----------------------------------------------------------------------------------------


def plan_captioning(
    preset: ModelPreset, batch_size: int, dtype: torch.dtype, tokens: int = CAPTION_TOKENS
) -> Use:
    """Memory of `vlv caption`: encoder, text tower and caption decoder."""
    drawn = outline(preset)
    parts = nn.ModuleDict(
        {
            "encoder": drawn.encoder,
            "text_encoder": drawn.decoder.text_encoder,
            "caption_decoder": drawn.caption_decoder,
        }
    )
    with imagined():
        hollow(parts, lambda _: dtype)
        pixels = _pixels(batch_size, drawn.image_size).float()
        footprint = rehearse(
            parts,
            pixels,
            lambda x: caption(drawn.encoder, drawn.decoder, drawn.caption_decoder, x, tokens),
        )
    return Use("captioning", batch_size, _short(dtype), footprint)


def caption(
    encoder: VLVEncoder,
    decoder: DiffusionDecoder,
    caption_decoder: CaptionDecoder,
    pixels: Tensor,
    tokens: int,
) -> None:
    """The two highest moments of captioning: reading the prefix, and writing the last of ``tokens`` tokens."""
    e = caption_decoder.prefix(decoder.context(encoder(pixels)).sequence)  # (B, Q, E)
    length = e.shape[1] + tokens - 1
    llm = caption_decoder.llm
    cache = llm(inputs_embeds=e, use_cache=True, logits_to_keep=1).past_key_values
    for layer in cache.layers:  # what T - 1 further tokens leave behind
        shape = (*layer.keys.shape[:2], length, layer.keys.shape[3])
        layer.keys, layer.values = layer.keys.new_empty(shape), layer.values.new_empty(shape)
    last = e[:, :1]  # stands for the embedding of the token before
    llm(inputs_embeds=last, past_key_values=cache, use_cache=True)


def plan_reconstruction(preset: ModelPreset, batch_size: int, dtype: torch.dtype) -> Use:
    """Memory of `vlv reconstruct`: encoder and diffusion decoder."""
    drawn = outline(preset)
    parts = nn.ModuleDict({"encoder": drawn.encoder, "decoder": drawn.decoder})
    with imagined():
        hollow(parts, lambda name: part_dtype("vae" if ".vae." in name else "", dtype))
        pixels = _pixels(batch_size, drawn.image_size).float()
        footprint = rehearse(parts, pixels, lambda x: reconstruct(drawn.encoder, drawn.decoder, x))
    return Use("reconstruction", batch_size, _short(dtype), footprint)


def reconstruct(encoder: VLVEncoder, decoder: DiffusionDecoder, pixels: Tensor) -> None:
    """The two highest moments of rebuilding: a pass of the U-Net, and the VAE's decoder."""
    c = decoder.context(encoder(pixels))
    unet, factor = cast("Any", decoder.unet), decoder.downscale_factor
    size = pixels.shape[-1] // factor
    latents = torch.zeros(len(pixels), int(unet.config["in_channels"]), size, size)
    decoder.denoising_loss(latents, c, torch.Generator())
    decoder.decode(latents)


def plan_training(preset: ModelPreset, name: str, config: RunConfig) -> Use:
    """Memory of a run's step."""
    drawn = outline(preset)
    caption_decoder = None if config.stage == "stage1" else drawn.caption_decoder
    parts = Parts(drawn.encoder, drawn.decoder, caption_decoder)
    return plan_step(parts, name, config, drawn.image_size)


def plan_step(
    parts: Parts, name: str, config: RunConfig, image_size: int, *, num_ranks: int = 1
) -> Use:
    """Memory of a run's step in one of its processes; every caption is as long as it may be.

    Args:
        parts: Of the meta device; they are changed.
        name: Of the use.
        config: The run.
        image_size: Side of the images in pixels.
        num_ranks: Processes that train together.
    """
    loop = config.loop
    objective = outlined_objective(config, parts)
    with imagined():
        hollow(objective.module)
        set_precision(config, parts, objective)
        batch = training_batch(_pixels(loop.batch_size, image_size))
        footprint = rehearse_training(objective, batch, loop, config.optim, num_ranks=num_ranks)
    return Use(name, loop.batch_size, loop.precision, footprint)


def outlined_objective(config: RunConfig, parts: Parts) -> Objective:
    """A run's objective with as much of the parts as it needs."""
    if config.stage2 is not None and not config.stage2.denoising_weight:
        parts.decoder.unet = parts.decoder.vae = None
    if parts.caption_decoder is not None:
        longest = (config.stage2 and config.stage2.max_caption_tokens) or CAPTION_TOKENS
        parts.caption_decoder.tokenizer = cast("Any", FullLength(longest))
    return make_objective(config, parts)


def _pixels(batch_size: int, size: int) -> Tensor:
    return torch.zeros(batch_size, 3, size, size, dtype=torch.uint8)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
