"""How the device computes: precision, memory layout, compilation. None of it changes what is computed beyond rounding."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from vlv.errors import ConfigError
from vlv.models.compilation import compile_layers, lay_out, repeated_layers, why_no_compiler
from vlv.training.attention import cpu_attention

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlv.config import LoopConfig
    from vlv.models.captioner import CaptionDecoder
    from vlv.models.diffusion import DiffusionDecoder
    from vlv.models.image_encoder import ImageEncoder

logger = logging.getLogger(__name__)

COMPILED_BY_DEFAULT = ("vision_tower", "vae", "unet", "language", "llm")
"""All that takes a good part of a step."""
TRANSFORMERS = ("language", "text_encoder", "llm")
"""Rows of like layers, of which one translation serves all."""


def arithmetic(device: torch.device, precision: str) -> torch.autocast:
    """The arithmetic of the forward pass: bf16 is autocast.

    Args:
        device: Where the work is done.
        precision: fp32 or bf16.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def attention_of(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The arithmetic of attention within a step: under bf16 on a CPU it is that of `cpu_attention`.

    PyTorch's backward pass of it is slower in bfloat16 there than in float32.
    The context has to enclose the backward pass too, which may recompute.

    Args:
        device: Where the work is done.
        precision: fp32 or bf16.
    """
    return _CpuAttention() if precision == "bf16" and device.type == "cpu" else nullcontext()


class _CpuAttention:
    """Exchanges PyTorch's function for attention for the time being."""

    def __enter__(self) -> None:
        functions: Any = F
        functions.scaled_dot_product_attention = cpu_attention

    def __exit__(self, *error: object) -> None:
        functions: Any = F
        functions.scaled_dot_product_attention = _attention


_attention = F.scaled_dot_product_attention


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


def arrange(
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
    parts: dict[str, list[Any]] = {
        name: found for name, (*found,) in modules.items() if None not in found
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
