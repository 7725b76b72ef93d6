"""The real models by their configurations alone: sizes are known, and parts are built without weights, before any download."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, CLIPTextConfig, CLIPTextModel, Florence2Config

from vlv.errors import ModelFolderError
from vlv.models.captioner import CaptionDecoder, CaptionDecoderConfig
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.encoder import VLVEncoder, VLVEncoderConfig
from vlv.models.folder import scheduler_class

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from vlv.config import ModelConfig, ModelPreset, PartSource

_PROMPT_TOKENS = 14  # of Florence-2's prompt for a long caption
_FOLDERS = ("text_encoder", "unet", "vae", "scheduler")
_DTYPE_OF_VARIANT = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Architecture:
    """A repository of the hub, or a folder, without its weights."""

    configs: dict[str, dict[str, Any]]
    """Configuration of each component."""
    licence: str = ""
    """Empty where it is not known."""
    stored: torch.dtype | None = None
    """Dtype of its files on the hub; None for a folder on this machine."""


@dataclass(frozen=True)
class Outline:
    """The parts of a fresh VLV on the meta device: every shape, no numbers."""

    encoder: VLVEncoder
    decoder: DiffusionDecoder
    caption_decoder: CaptionDecoder
    image_size: int
    """Side of the images in pixels."""


def find_architecture(source: PartSource, components: Sequence[str]) -> Architecture:
    """What is known of a part: from its folder, from the package, or from the cache of the hub. Nothing is fetched.

    Args:
        source: Of the part.
        components: Names of the configurations; a single one lies in the folder itself, several in subfolders.

    Raises:
        ModelFolderError: Nothing is known of it.
    """
    if Path(source.path).expanduser().is_dir():
        folder = Path(source.path).expanduser() / (source.subfolder or ".")
        return Architecture({name: _read(folder / _file(name, components)) for name in components})
    for known in known_repositories():
        if source.path in known["ids"]:
            stored = _DTYPE_OF_VARIANT.get(source.variant or "", getattr(torch, known["stored"]))
            return Architecture(known["configs"], known["licence"], stored)
    configs = {name: _cached(source, _file(name, components)) for name in components}
    dtypes = {config.get("dtype", config.get("torch_dtype")) for config in configs.values()}
    halves = dtypes & {"float16", "bfloat16"}
    return Architecture(configs, stored=torch.float16 if halves else torch.float32)


def _file(name: str, components: Sequence[str]) -> str:
    file = "scheduler_config.json" if name == "scheduler" else "config.json"
    return file if len(components) == 1 else f"{name}/{file}"


def known_repositories() -> list[dict[str, Any]]:
    """The repositories whose configurations are in the package."""
    files = (resources.files("vlv") / "presets" / "hub").iterdir()
    return [yaml.safe_load(file.read_text("utf-8")) for file in files]


def _read(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFolderError(
            f"{path} cannot be read ({error}); name the folder of a model"
        ) from error
    return config


def _cached(source: PartSource, file: str) -> dict[str, Any]:
    name = f"{source.subfolder}/{file}" if source.subfolder else file
    try:
        path = try_to_load_from_cache(source.path, name, revision=source.revision)
    except HFValidationError as error:
        raise ModelFolderError(
            f"there is no folder {source.path}, and a model on the hub is named owner/name; name one of both"
        ) from error
    if not isinstance(path, str):
        raise ModelFolderError(
            f"the sizes of {source.path} are not known before it is downloaded; "
            f"run `hf download {source.path} {name}` first, or name a local folder"
        )
    return _read(Path(path))


# --- building -------------------------------------------------------------------------------------


def outline(preset: ModelPreset, device: str = "meta") -> Outline:
    """The parts of a preset without its weights: shapes alone on the meta device, random numbers on any other."""
    model = preset.model
    assert model.florence is not None, "checked by ModelPreset"
    assert model.llm is not None, "checked by ModelPreset"
    assert model.num_queries is not None, "checked by ModelPreset"
    assert model.input_size is not None, "checked by ModelPreset"
    decoder = outline_decoder(model.decoder, device)
    encoder = outline_encoder(model.florence, decoder, model.num_queries, model.input_size, device)
    caption_decoder = outline_caption_decoder(model.llm, decoder, device)
    return Outline(encoder, decoder, caption_decoder, preset.data.image_size)


def outline_decoder(source: PartSource, device: str = "meta") -> DiffusionDecoder:
    """A diffusion decoder of the family of Stable Diffusion 1 and 2 on a device.

    Raises:
        ModelFolderError: Nothing is known of it, or it is of another family.
    """
    folder = Path(source.path).expanduser() / (source.subfolder or ".")
    if (folder.is_dir() and not (folder / "unet").is_dir()) or (folder / "text_encoder_2").is_dir():
        raise ModelFolderError(
            f"the sizes of {source.path} are known only when it is loaded: it is not of the family of "
            "Stable Diffusion 1 and 2"
        )
    configs = find_architecture(source, _FOLDERS).configs
    with torch.device(device):
        text_encoder = CLIPTextModel(CLIPTextConfig(**_without_class(configs["text_encoder"])))
        unet = diffusers.UNet2DConditionModel.from_config(configs["unet"])
        vae = diffusers.AutoencoderKL.from_config(configs["vae"])
    scheduler = scheduler_class(configs["scheduler"]).from_config(configs["scheduler"])
    return DiffusionDecoder(text_encoder, None, unet, vae, scheduler)


def outline_encoder(
    source: PartSource,
    decoder: DiffusionDecoder,
    num_queries: int | None,
    side: int,
    device: str = "meta",
) -> VLVEncoder:
    """A fresh encoder of Florence-2 on a device.

    Args:
        source: Florence-2.
        decoder: What z is for.
        num_queries: Q; None takes every position of the text tower.
        side: Of the image that Florence-2 sees, in pixels.
        device: The meta device for shapes alone; on any other the numbers are random.
    """
    config = find_architecture(source, ["florence"]).configs["florence"]
    with torch.device(device):
        encoder = VLVEncoder(
            VLVEncoderConfig(
                backbone_config=Florence2Config(**_without_class(config)),
                num_queries=num_queries or decoder.num_positions,
                text_width=decoder.text_width,
                prompt_ids=[0] * _PROMPT_TOKENS,
                image_size=side,
            )
        )
    return encoder.train(False)


def outline_caption_decoder(
    source: PartSource, decoder: DiffusionDecoder, device: str = "meta"
) -> CaptionDecoder:
    """A language model with a fresh projector on a device."""
    config = find_architecture(source, ["llm"]).configs["llm"]
    with torch.device(device):
        llm = AutoConfig.for_model(**_without_class(config))
        caption_decoder = CaptionDecoder(
            CaptionDecoderConfig(llm_config=llm, text_width=decoder.text_width)
        )
    caption_decoder.train(False)
    return caption_decoder


def architectures(model: ModelConfig) -> dict[str, Architecture]:
    """What is known of Florence-2, the diffusion decoder and the language model."""
    assert model.florence is not None, "checked by ModelPreset"
    assert model.llm is not None, "checked by ModelPreset"
    return {
        "florence": find_architecture(model.florence, ["florence"]),
        "decoder": find_architecture(model.decoder, _FOLDERS),
        "llm": find_architecture(model.llm, ["llm"]),
    }


def _without_class(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what names its class rather than its shape."""
    return {k: v for k, v in config.items() if k not in {"architectures", "auto_map"}}


def num_parameters(module: nn.Module) -> int:
    """Numbers in the weights; shared ones count once."""
    return sum(math.prod(p.shape) for p in module.parameters())
