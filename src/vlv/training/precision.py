"""How the device computes: precision, memory layout, compilation. Nothing here changes results beyond rounding."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlv.config import LoopConfig
from vlv.errors import ConfigError
from vlv.models.captioner import CaptionDecoder
from vlv.models.compilation import compile_layers, lay_out, repeated_layers, why_no_compiler
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.encoder import ImageEncoder
from vlv.models.placement import quantize_llm

logger = logging.getLogger(__name__)

COMPILED_BY_DEFAULT = ("vision_tower", "vae", "unet", "language", "llm")
"""All that take a good part of a step."""
TRANSFORMERS = ("language", "text_encoder", "llm")
"""Rows of equal layers; compiling one serves all."""


def store_frozen(
    module: nn.Module, dtype: torch.dtype, *, keep: Iterable[nn.Module | None] = ()
) -> None:
    """Hold frozen submodules in another dtype, stored buffers included; what trains and `keep` stay as they are."""
    kept = {id(t) for part in keep if part for t in _stored(part)}
    for part in module.modules():
        parameters = list(part.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            for tensor in _stored(part):
                if tensor.is_floating_point() and id(tensor) not in kept:
                    tensor.data = tensor.data.to(dtype)


def warn_of_slow_products(device: torch.device) -> None:
    """Say so where a CPU has no bfloat16 of its own and computes every product in pieces."""
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        logger.warning(
            "this CPU has no instructions for bfloat16, so that a step may take a hundred times as long as in float32; "
            "set loop.precision=fp32"
        )


def _stored(module: nn.Module) -> Iterable[Tensor]:
    """Parameters and persistent buffers; the scales of weights in 4 bits are neither, and have to stay as they are."""
    own = {id(t) for t in (*module.parameters(), *module.buffers())}
    return [t for t in module.state_dict(keep_vars=True).values() if id(t) in own]


def pack_frozen(caption_decoder: CaptionDecoder, precision: str) -> None:
    """Hold the language model's weights in 4 bits, beside which adapters train.

    Raises:
        ConfigError: bitsandbytes is missing.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    quantize_llm(caption_decoder, 4, dtype)
    for layer in caption_decoder.llm.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # there a pass without gradients would repack the weights, and those with gradients lose them
            layer.support_avx512bf16_for_cpu = False


@contextmanager
def fast_products(*, tf32: bool) -> Iterator[None]:
    """Let a GPU round float32 products and convolutions to TF32 for the time being, or not."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = tf32
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def compile_parts(
    config: LoopConfig,
    encoder: ImageEncoder,
    decoder: DiffusionDecoder,
    caption_decoder: CaptionDecoder | None,
    device: torch.device,
) -> None:
    """Lay out and compile the parts as the settings say.

    Args:
        config: `channels_last` and `compile`.
        encoder: Image to z.
        decoder: Its denoiser and VAE are laid out, as they consist of convolutions.
        caption_decoder: None in stage 1.
        device: Where they are.

    Raises:
        ConfigError: A part shall be compiled that is not there, or there is no compiler.
    """
    wanted = config.channels_last
    if wanted is True or (wanted == "auto" and device.type == "cuda"):
        lay_out((decoder.denoiser, decoder.vae))
    # These modules are called as such; their owners are entered by other doors. Of transformers it is their layers.
    llm = None if caption_decoder is None else caption_decoder.llm.base_model
    modules: dict[str, tuple[nn.Module | None, ...]] = {
        "vision_tower": encoder.vision()[:1],
        "language": encoder.language(),
        "text_encoder": (getattr(decoder.text_encoder, "encoder", None),),
        "unet": (decoder.denoiser,),
        "vae": (getattr(decoder.vae, "encoder", None),),
        "llm": (llm,),
    }
    parts = {
        name: [module for module in found if module is not None]
        for name, found in modules.items()
        if None not in found
    }
    for name in _to_compile(config, list(parts), device):
        for module in parts[name]:
            layers = repeated_layers(module) if name in TRANSFORMERS else [module]
            compile_layers(layers, dynamic=True if name == "llm" else None)


def _to_compile(config: LoopConfig, parts: list[str], device: torch.device) -> list[str]:
    """Names of the parts to compile; there is a compiler for them."""
    if config.compile == "none" or (config.compile == "auto" and device.type != "cuda"):
        return []
    if config.compile == "auto":
        names = [name for name in COMPILED_BY_DEFAULT if name in parts]
    else:
        names = list(config.compile)
        for name in names:
            if name not in parts:
                raise ConfigError(
                    f"loop.compile names {name}, which this run does not have; it has {', '.join(parts)}"
                )
    if reason := why_no_compiler(device):
        if config.compile == "auto":
            logger.warning("nothing is compiled: %s", reason)
            return []
        raise ConfigError(f"loop.compile is {names}, but {reason}; set it to none")
    return names
