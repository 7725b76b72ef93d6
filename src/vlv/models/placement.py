"""Device and dtype selection, quantisation and offloading of a loaded model."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from vlv.errors import ConfigError
from vlv.models.compilation import lay_out, why_no_compiler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from vlv.models.captioner import CaptionDecoder
    from vlv.models.components import VLVComponents

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
VAEMode = Literal["whole", "sliced", "tiled"]


@dataclass(frozen=True)
class Placement:
    """How a loaded model lies in memory."""

    device: str = "auto"
    """A device of torch; "auto" is CUDA, else MPS, else the CPU."""
    dtype: str = "auto"
    """Of the weights; "auto" is bfloat16 where the device computes in it, float32 on a CPU."""
    offload: bool = False
    """Keep the parts in main memory and bring each to the device only while it works."""
    vae: VAEMode = "whole"
    """"sliced" decodes image by image, "tiled" piece by piece: slower, in less memory."""
    llm_bits: Literal[4, 8] | None = None
    """Bits of the caption decoder's weights; None leaves them as they are."""
    compile: bool = False
    """Compile what gains most: vision tower, denoiser, the VAE's decoder; it takes minutes."""


def pick_device(device: str) -> str:
    """Name of the device that "auto" stands for.

    Raises:
        ConfigError: No such device on this machine.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {device!r} cannot be used ({reason}); try --device cpu"
        ) from error
    return device


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """The dtype that "auto" stands for on a device.

    Raises:
        ConfigError: No such dtype.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; choose auto or one of {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if device == "mps" and _mps_has_bfloat16() else torch.float32


def _mps_has_bfloat16() -> bool:
    """Whether this version of macOS computes in bfloat16 on its GPU."""
    try:
        torch.zeros(1, dtype=torch.bfloat16, device="mps")
    except (RuntimeError, TypeError):
        return False
    return True


def place(pipe: VLVComponents, placement: Placement) -> None:
    """Quantise, slice and move a pipeline as the placement says; its dtype was given to `from_pretrained`.

    Raises:
        ConfigError: The device cannot be used, a package or a compiler is missing, or offloading has nowhere to go.
    """
    device = pick_device(placement.device)
    if placement.compile:
        compile_parts(pipe, torch.device(device))
    if device.startswith("cuda"):
        lay_out((pipe.unet, pipe.vae))
    if placement.llm_bits is not None and pipe.caption_decoder is not None:
        quantize_llm(pipe.caption_decoder, placement.llm_bits)
    if pipe.vae is not None and placement.vae != "whole":
        pipe.vae.enable_slicing()
        if placement.vae == "tiled":
            pipe.vae.enable_tiling()
    if not placement.offload:
        pipe.to(device)
        return
    if device == "cpu":
        raise ConfigError("--offload frees a GPU, but there is none in use; leave it out")
    pipe.offload_device = torch.device(device)


def compile_parts(pipe: VLVComponents, device: torch.device) -> None:
    """Compile vision tower, denoiser and the VAE's decoder on first use.

    Raises:
        ConfigError: There is no compiler.
    """
    if reason := why_no_compiler(device):
        raise ConfigError(f"nothing can be compiled here: {reason}; leave --compile out")
    towers = () if pipe.encoder is None else pipe.encoder.vision()[:1]
    parts: list[nn.Module | None] = [*towers, pipe.unet, pipe.transformer]
    for part in (*parts, getattr(pipe.vae, "decoder", None)):
        if part is not None:
            part.compile()


@contextmanager
def at_work(pipe: VLVComponents, *names: str) -> Iterator[None]:
    """Keep these components of an offloaded pipeline on its device within the context."""
    device = pipe.offload_device
    parts = [part for name in names if isinstance(part := getattr(pipe, name), torch.nn.Module)]
    for part in parts if device is not None else ():
        part.to(device)
    try:
        yield
    finally:
        for part in parts if device is not None else ():
            part.to("cpu")


def quantize_llm(
    caption_decoder: CaptionDecoder, bits: Literal[4, 8], dtype: torch.dtype | None = None
) -> None:
    """Store the weights of the language model in fewer bits: 8 by torchao, 4 (NF4) by bitsandbytes.

    Args:
        caption_decoder: Changed in place; it cannot be saved afterwards, and of it only adapters on 4 bits can be trained.
        bits: Of each weight.
        dtype: What 4 bits are multiplied in; None is that of the weights.

    Raises:
        ConfigError: The package is not installed.
    """
    llm = caption_decoder.llm
    if bits == 8:
        _to_int8(llm)
    else:
        _to_nf4(llm, dtype)


def linear_layers(llm: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers by name, without the output layer, which may share its weights with the embeddings."""
    head = llm.get_output_embeddings()
    return {
        name: layer
        for name, layer in llm.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }


def _to_int8(llm: PreTrainedModel) -> None:
    quantization = _package("torchao.quantization", "8")
    chosen = set(linear_layers(llm))
    quantization.quantize_(
        llm, quantization.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in chosen
    )


def _to_nf4(llm: PreTrainedModel, dtype: torch.dtype | None) -> None:
    layers = _package("bitsandbytes.nn", "4")
    for name, layer in linear_layers(llm).items():
        new = layers.Linear4bit(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype=dtype or layer.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        new.weight = layers.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4", module=new
        )
        new.bias = layer.bias
        parent, _, last = name.rpartition(".")
        setattr(llm.get_submodule(parent), last, new)
    nn.Module.to(llm, llm.device)  # the weights are packed when they are moved


def _package(name: str, bits: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise ConfigError(
            f"{bits}-bit weights need {package} ({' '.join(str(error).split())}); "
            'install it with pip install "vlv[quant]", or leave the number of bits out'
        ) from error
