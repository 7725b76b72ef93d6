"""Fewer bits for the language model: its linear layers, the output layer excepted, for captioning only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from vlv.errors import ConfigError

if TYPE_CHECKING:
    from vlv.models.captioner import CaptionDecoder


def quantize_llm(caption_decoder: CaptionDecoder, bits: Literal[4, 8]) -> None:
    """Store the weights of the language model in fewer bits: 8 by torchao, 4 (NF4) by bitsandbytes.

    Args:
        caption_decoder: Changed in place; it cannot be trained or saved afterwards.
        bits: Of each weight.

    Raises:
        ConfigError: The package is not installed.
    """
    llm = caption_decoder.llm
    if bits == 8:
        _to_int8(llm)
    else:
        _to_nf4(llm)


def _layers(llm: Any) -> dict[str, nn.Linear]:
    """The linear layers by name, without the output layer, which may share its weights with the embeddings."""
    head = llm.get_output_embeddings()
    return {
        name: layer
        for name, layer in llm.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }


def _to_int8(llm: Any) -> None:
    quantization = _package("torchao.quantization", "8")
    chosen = set(_layers(llm))
    quantization.quantize_(
        llm,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda _, name: name in chosen,
    )


def _to_nf4(llm: Any) -> None:
    layers = _package("bitsandbytes.nn", "4")
    for name, layer in _layers(llm).items():
        new = layers.Linear4bit(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        new.weight = layers.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4", module=new
        )
        new.bias = layer.bias
        parent, _, last = name.rpartition(".")
        setattr(llm.get_submodule(parent), last, new)
    llm.to(llm.device)  # the weights are packed when they are moved


def _package(name: str, bits: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise ConfigError(
            f"{bits}-bit weights need {package} ({' '.join(str(error).split())}); "
            'install it with pip install "vlv[quant]", or leave --llm-bits out'
        ) from error
