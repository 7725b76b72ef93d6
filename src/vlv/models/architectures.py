"""Real models by their configurations alone: parts are built without weights, before any download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, CLIPTextConfig, CLIPTextModel, Florence2Config

from vlv.config import ModelConfig, PartSource
from vlv.config_files import known_repositories
from vlv.errors import ModelFolderError
from vlv.models.captioner import CaptionDecoder
from vlv.models.captioner_config import CaptionDecoderConfig
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.encoder import VLVEncoder, VLVEncoderConfig
from vlv.models.folder import scheduler_class, shipped_models
from vlv.models.gguf_files import unpacked
from vlv.models.vetting import read_json
from vlv.storage import Json

_PROMPT_TOKENS = 14  # of Florence-2's prompt for a long caption
_COMPONENTS = {
    "florence": ("florence",),
    "decoder": ("text_encoder", "unet", "vae", "scheduler"),
    "llm": ("llm",),
}
"""Configurations of each part; a single one lies in the folder itself, several in subfolders."""
_DTYPE_OF_VARIANT = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Architecture:
    """A repository of the hub, or a folder, without its weights."""

    configs: dict[str, Json]
    """Configuration of each component."""
    licence: str = ""
    """Empty where it is not known."""
    stored: torch.dtype | None = None
    """Dtype of its files on the hub; None for a folder on this machine."""


def find_architecture(source: PartSource, part: str) -> Architecture:
    """Find out what a part is from its folder, from the package, or from the cache of the hub; nothing is fetched.

    Args:
        source: Where the part is.
        part: "florence", "decoder" or "llm".

    Raises:
        ModelFolderError: Nothing is known of it.
    """
    files = {name: _file(name, part) for name in _COMPONENTS[part]}
    if Path(source.path).expanduser().is_dir():
        folder = Path(source.path).expanduser() / (source.subfolder or ".")
        return Architecture({name: read_json(folder / file) for name, file in files.items()})
    for known in known_repositories():
        if source.path in known["ids"]:
            stored = _DTYPE_OF_VARIANT.get(source.variant or "", getattr(torch, known["stored"]))
            return Architecture(known["configs"], known["licence"], stored)
    configs = {name: _cached(source, file) for name, file in files.items()}
    dtypes = {config.get("dtype", config.get("torch_dtype")) for config in configs.values()}
    halves = dtypes & {"float16", "bfloat16"}
    return Architecture(configs, stored=torch.float16 if halves else torch.float32)


def _file(name: str, part: str) -> str:
    file = "scheduler_config.json" if name == "scheduler" else "config.json"
    return file if len(_COMPONENTS[part]) == 1 else f"{name}/{file}"


def _cached(source: PartSource, file: str) -> Json:
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
    return read_json(Path(path))


# --- building -------------------------------------------------------------------------------------


class Outline(NamedTuple):
    """The parts of a model without their weights."""

    encoder: VLVEncoder
    decoder: DiffusionDecoder
    caption_decoder: CaptionDecoder | None


def outline(model: ModelConfig, image_size: int, device: str = "meta") -> Outline:
    """Build the parts that a run or a preset starts from without reading any weights.

    Args:
        model: Where the parts are.
        image_size: Side of the images in pixels, where the settings give Florence-2 no other.
        device: The meta device for shapes alone; on any other the numbers are random.

    Raises:
        ModelFolderError: Sizes are not known without loading the weights.
    """
    with torch.device(device):
        decoder = _decoder(_local(model.decoder))
        if model.encoder is not None:
            folder = _component(model.encoder, "encoder")
            encoder = VLVEncoder(VLVEncoderConfig.from_pretrained(folder))
        elif model.florence is not None:
            configs = find_architecture(_local(model.florence), "florence").configs
            backbone = Florence2Config(**_without_class(configs["florence"]))
            encoder = VLVEncoder(
                VLVEncoderConfig(
                    backbone_config=backbone,
                    num_queries=model.num_queries or decoder.num_positions,
                    text_width=decoder.text_width,
                    prompt_ids=[0] * _PROMPT_TOKENS,
                    image_size=model.input_size or image_size,
                )
            )
        else:
            raise ModelFolderError(
                "the sizes of a vision backbone are known only when it is loaded"
            )
        caption_decoder = _caption_decoder(model, decoder)
    encoder.train(False)
    return Outline(encoder, decoder, caption_decoder)


def _decoder(source: PartSource) -> DiffusionDecoder:
    folder = Path(source.path).expanduser() / (source.subfolder or ".")
    if (folder.is_dir() and not (folder / "unet").is_dir()) or (folder / "text_encoder_2").is_dir():
        raise ModelFolderError(
            f"the sizes of {source.path} are known only when it is loaded: it is not of the family of "
            "Stable Diffusion 1 and 2"
        )
    configs = find_architecture(source, "decoder").configs
    text_encoder = CLIPTextModel(CLIPTextConfig(**_without_class(configs["text_encoder"])))
    unet = diffusers.UNet2DConditionModel.from_config(configs["unet"])
    vae = diffusers.AutoencoderKL.from_config(configs["vae"])
    scheduler = scheduler_class(configs["scheduler"]).from_config(configs["scheduler"])
    return DiffusionDecoder(text_encoder, None, unet, vae, scheduler)


def _caption_decoder(model: ModelConfig, decoder: DiffusionDecoder) -> CaptionDecoder | None:
    if model.caption_decoder is not None:
        folder = _component(model.caption_decoder, "caption_decoder")
        config = CaptionDecoderConfig.from_pretrained(folder)
    elif model.llm is not None:
        configs = find_architecture(_local(unpacked(model.llm)), "llm").configs
        llm = AutoConfig.for_model(**_without_class(configs["llm"]))
        config = CaptionDecoderConfig(llm_config=llm, text_width=decoder.text_width)
    else:
        return None
    caption_decoder = CaptionDecoder(config)
    caption_decoder.train(False)
    return caption_decoder


def _local(source: PartSource) -> PartSource:
    """The source, with the folder of a shipped model in place of its name."""
    folder = shipped_models().get(source.path)
    return source if folder is None else source.model_copy(update={"path": str(folder)})


def _component(source: PartSource, name: str) -> Path:
    """The folder of one component in a model folder, or the component's own."""
    folder = Path(_local(source).path).expanduser() / (source.subfolder or ".")
    folder = folder / name if (folder / name).is_dir() else folder
    if not (folder / "config.json").is_file():
        raise ModelFolderError(
            f"the sizes of {source.path} are not known: there is no folder with a config.json of that name yet"
        )
    return folder


def _without_class(config: Json) -> Json:
    """A configuration without what names its class rather than its shape."""
    return {k: v for k, v in config.items() if k not in {"architectures", "auto_map"}}
