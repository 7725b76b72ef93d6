"""Random models of other sizes, written as the authors' code would write them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartTokenizer,
    CLIPTextModel,
    Florence2ForConditionalGeneration,
)

from tests.models.official_files import COMPONENTS
from vlv.models.captioner import CaptionDecoder
from vlv.models.encoder import VLVEncoder
from vlv.models.official_parts import Components, florence_names
from vlv.models.pipeline import VLVPipeline

State = dict[str, torch.Tensor]

SIZES: list[dict[str, Any]] = [
    {"width": 48, "layers": 1, "queries": 20, "positions": 40, "depths": [1, 2, 1, 1], "llm": 32},
    {"width": 24, "layers": 3, "queries": 77, "positions": 200, "depths": [1, 1, 1, 2], "llm": 64},
    {"width": 64, "layers": 2, "queries": 8, "positions": 128, "depths": [2, 1, 1, 1], "llm": 16},
]


def change(path: Path, **values: Any) -> None:
    """Change settings in a JSON file; a name with a dot is nested."""
    settings = json.loads(path.read_text())
    for name, value in values.items():
        *outer, last = name.split("__")
        inner = settings
        for key in outer:
            inner = inner[key]
        inner[last] = value
    path.write_text(json.dumps(settings))


def write_components(folder: Path, size: dict[str, Any]) -> Components:
    """Configurations and tokenizers in the authors' layout, without weights."""
    shutil.copytree(COMPONENTS, folder)
    width, layers = size["width"], size["layers"]
    change(
        folder / "Florence2large" / "config.json",
        projection_dim=width,
        vision_config__projection_dim=width,
        vision_config__depths=size["depths"],
        text_config__d_model=width,
        text_config__encoder_layers=layers,
        text_config__decoder_layers=layers,
    )
    diffusion = folder / "stable-diffusion-2-1-base"
    change(diffusion / "text_encoder" / "config.json", hidden_size=width, num_hidden_layers=layers)
    change(diffusion / "unet" / "config.json", cross_attention_dim=width)
    change(folder / "Qwen2.5" / "config.json", hidden_size=size["llm"], num_hidden_layers=layers)
    return Components.at(folder)


def make_pipeline(parts: Components, size: dict[str, Any], seed: int) -> VLVPipeline:
    """A random model of the sizes in the component folders."""
    torch.manual_seed(seed)
    text_config = parts.text_config()
    text_config.initializer_factor = 20.0
    vision = parts.vision()
    encoder = VLVEncoder.from_florence(
        Florence2ForConditionalGeneration(parts.florence_config(size["positions"])),
        BartTokenizer.from_pretrained(parts.florence),
        num_queries=size["queries"],
        text_width=size["width"],
        image_size=vision.size,
        seed=seed,
    )
    llm = AutoModelForCausalLM.from_config(parts.llm_config())
    tokenizer = AutoTokenizer.from_pretrained(parts.llm)
    decoder = CaptionDecoder.from_llm(llm, tokenizer, text_width=size["width"], seed=seed)
    decoder.config.ends_by_itself = False
    return VLVPipeline(
        encoder=encoder,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=parts.tokenizer(),
        unet=parts.diffusion_model("unet"),
        vae=parts.diffusion_model("vae"),
        scheduler=parts.scheduler(),
        caption_decoder=decoder,
        image_size=parts.image_size(),
        framing="resize",
    )


def florence_state(encoder: VLVEncoder) -> State:
    """Florence-2 in the remote code's names, below ``model.``; lm_head differs from the embedding."""
    state = encoder.backbone.state_dict()
    lm_head = state.pop("lm_head.weight")
    theirs = {florence_names(key)[0]: tensor for key, tensor in state.items()}
    theirs["model.image_projection"] = theirs["model.image_projection"].T
    theirs["model.language_model.lm_head.weight"] = lm_head + 1
    theirs["model.language_model.final_logits_bias"] = torch.zeros(1, len(lm_head))
    return theirs


def with_prefix(prefix: str, module: torch.nn.Module) -> State:
    return {f"{prefix}{key}": tensor for key, tensor in module.state_dict().items()}


def official_state(pipe: VLVPipeline, stage: int, *, frozen: bool = True) -> State:
    """A whole checkpoint under the authors' names; ``frozen`` parts may be left out."""
    projector = with_prefix("language_proj.", pipe.encoder.projector)
    state = florence_state(pipe.encoder) | projector | {"query_embed": pipe.encoder.queries}
    if frozen:
        state |= with_prefix("text_encoder.text_model.", pipe.text_encoder)
    else:
        state = {k: v for k, v in state.items() if "vision_tower" not in k and ".image_" not in k}
    if stage == 1:
        return state | (
            with_prefix("unet.", pipe.unet) | with_prefix("vae.", pipe.vae) if frozen else {}
        )
    decoder = pipe.caption_decoder
    return (
        {f"VLV_model.{key}": tensor for key, tensor in state.items()}
        | with_prefix("qwen2_model.", decoder.llm)
        | with_prefix("mlp.layers.", decoder.mlp)
    )


def write_frozen(pipe: VLVPipeline, parts: Components) -> None:
    """Put the weights of the frozen parts into the component folders."""
    florence = {k.removeprefix("model."): v for k, v in florence_state(pipe.encoder).items()}
    torch.save(florence, parts.florence / "pytorch_model.bin")
    for name in ("text_encoder", "unet", "vae"):
        getattr(pipe, name).save_pretrained(parts.diffusion / name)


# --- forms of files -------------------------------------------------------------------------------


def unshared(state: State) -> State:
    """What safetensors can hold: each tensor with memory of its own."""
    return {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}


def single(folder: Path, state: State) -> Path:
    save_file(unshared(state), folder / "model.safetensors")
    return folder


def sharded(folder: Path, state: State) -> Path:
    keys = sorted(state)
    shards = {f"model-0000{i}-of-00003.safetensors": keys[i - 1 :: 3] for i in (1, 2, 3)}
    for name, held in shards.items():
        save_file(unshared({key: state[key] for key in held}), folder / name)
    weight_map = {key: name for name, held in shards.items() for key in held}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def consolidated(folder: Path, state: State) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def wrapped(folder: Path, state: State) -> Path:
    extra = {"optimizer_state_dict": {"state": {0: {"step": torch.tensor(3.0)}}}, "step": 3}
    torch.save({"model_state_dict": state, **extra}, folder / "checkpoint_3.pt")
    return folder / "checkpoint_3.pt"


def plain(folder: Path, state: State) -> Path:
    torch.save(state, folder / "model.pt")
    return folder / "model.pt"


def old_format(folder: Path, state: State) -> Path:
    torch.save(state, folder / "old.bin", _use_new_zipfile_serialization=False)
    return folder / "old.bin"


def sharded_pickles(folder: Path, state: State) -> Path:
    keys = sorted(state)
    halves = {"pytorch_model-1.bin": keys[::2], "pytorch_model-2.bin": keys[1::2]}
    for name, held in halves.items():
        torch.save({key: state[key] for key in held}, folder / name)
    weight_map = {key: name for name, held in halves.items() for key in held}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


FORMS: list[Callable[[Path, State], Path]] = [
    single,
    sharded,
    consolidated,
    wrapped,
    plain,
    old_format,
    sharded_pickles,
]
