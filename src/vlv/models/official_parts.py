"""The authors' component folders: configurations and tokenizers, and weights where they lie there.

```
Florence2large/              config.json, preprocessor_config.json, tokenizer files
stable-diffusion-2-1-base/   text_encoder/ tokenizer/ unet/ vae/ scheduler/
Qwen2.5/                     config.json, tokenizer files
```
Florence-2's folder may have the remote code's configuration or the native one; no code is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BartTokenizer,
    CLIPTextConfig,
    CLIPTokenizer,
    Florence2Config,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from vlv.errors import ModelFolderError
from vlv.models.folder import MODELS, quiet_loading
from vlv.models.official_files import find_weights, read_tensors
from vlv.models.vetting import read_json
from vlv.storage import Json

AUTHORS_IMAGE_SIZE = 384
"""Side in pixels of the images that the authors train on, where the U-Net's own is not smaller."""

_BICUBIC = 3  # Pillow's number
_BART_SETTINGS = (
    *("vocab_size", "d_model", "max_position_embeddings", "scale_embedding", "init_std"),
    *("encoder_layers", "encoder_ffn_dim", "encoder_attention_heads", "encoder_layerdrop"),
    *("decoder_layers", "decoder_ffn_dim", "decoder_attention_heads", "decoder_layerdrop"),
    *("dropout", "attention_dropout", "activation_dropout", "activation_function"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
)
_VISION_SETTINGS = (
    *("depths", "patch_size", "patch_stride", "patch_padding", "patch_prenorm"),
    *("num_heads", "num_groups", "window_size", "drop_path_rate", "projection_dim"),
)
T = TypeVar("T")

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class Vision:
    """What Florence-2's image processor does."""

    size: int
    """Side in pixels."""
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class Components:
    """The folders of the three models that VLV is built from.

    Attributes:
        florence: Florence-2.
        diffusion: Stable Diffusion, in the layout of diffusers.
        llm: The language model; None where no captions are wanted (stage 1).
    """

    florence: Path
    diffusion: Path
    llm: Path | None = None

    @classmethod
    def at(cls, folder: str | Path) -> Components:
        """The three folders in the authors' layout.

        Raises:
            ModelFolderError: `folder` is none.
        """
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise ModelFolderError(
                f"there is no folder {root}; name the one that holds Florence2large, "
                "stable-diffusion-2-1-base and Qwen2.5"
            )
        return cls(root / "Florence2large", root / "stable-diffusion-2-1-base", root / "Qwen2.5")

    # --- Florence-2 ------------------------------------------------------------------------------

    def florence_config(self, num_positions: int) -> Florence2Config:
        """The native configuration of either form."""

        def read() -> Florence2Config:
            values = _read_json(self.florence / "config.json")
            if "dim_embed" in values["vision_config"]:
                values = _native_config(values)
            values["text_config"]["max_position_embeddings"] = num_positions
            return Florence2Config.from_dict(values)

        return _reading(self.florence / "config.json", read)

    def florence_tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer; the automatic class would want the remote code."""
        return _read_tokenizer(BartTokenizer, self.florence)

    def vision(self) -> Vision:
        """Size and normalisation of Florence-2's images."""
        path = self.florence / "preprocessor_config.json"

        def read() -> Vision:
            values = _read_json(path)
            if values.get("resample", _BICUBIC) != _BICUBIC:
                raise ValueError(f"resample is {values['resample']}, only 3 (bicubic) is supported")
            size = int(values["size"]["height"])
            return Vision(size, list(values["image_mean"]), list(values["image_std"]))

        return _reading(path, read)

    # --- Stable Diffusion ------------------------------------------------------------------------

    def text_config(self) -> CLIPTextConfig:
        """Of the text tower."""
        path = self.diffusion / "text_encoder"
        return _reading(
            path, lambda: CLIPTextConfig.from_dict(_read_json(path / "config.json", "hidden_size"))
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the text tower."""
        return _read_tokenizer(CLIPTokenizer, self.diffusion / "tokenizer")

    def scheduler(self) -> Any:
        """The noise schedule; whatever class the folder names, the authors read it as DDPM."""
        path = self.diffusion / "scheduler" / "scheduler_config.json"
        return _reading(path, lambda: DDPMScheduler.from_config(_read_json(path, "beta_schedule")))

    def diffusion_model(self, name: str) -> Any:
        """The U-Net or the VAE, without weights where this is called on the meta device."""
        path = self.diffusion / name / "config.json"
        kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[name]
        return _reading(path, lambda: kind.from_config(_read_json(path)))

    def image_size(self) -> int:
        """Side in pixels that the authors train on with these models."""
        files = [self.diffusion / name / "config.json" for name in ("unet", "vae")]
        if not all(file.exists() for file in files):
            return AUTHORS_IMAGE_SIZE
        unet, vae = map(_read_json, files)
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        return min(AUTHORS_IMAGE_SIZE, int(unet["sample_size"] * factor))

    # --- the language model ----------------------------------------------------------------------

    def llm_config(self) -> PreTrainedConfig:
        """Of the language model."""
        path = self._llm() / "config.json"
        config: PreTrainedConfig = _reading(
            path, lambda: AutoConfig.from_pretrained(path.parent, **_LOCAL, trust_remote_code=False)
        )
        return config

    def llm_tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the language model."""
        return _read_tokenizer(AutoTokenizer, self._llm(), **_LOCAL)

    def _llm(self) -> Path:
        if self.llm is None:
            raise ModelFolderError(
                "this is a checkpoint of stage 2, but no folder of the language model was given; "
                "name it"
            )
        return self.llm

    # --- weights ---------------------------------------------------------------------------------

    def weights(self, part: str) -> dict[str, Tensor] | None:
        """Tensors of a frozen part by the names in its own folder; None where it has none."""
        folder = self.florence if part == "encoder" else self.diffusion / part
        if find_weights(folder) is None:
            return None
        if part == "encoder":
            return read_tensors(folder)

        def read() -> dict[str, Tensor]:
            with quiet_loading():
                # The library's own loader knows the names of older versions.
                loaded, info = MODELS[part].from_pretrained(
                    folder, output_loading_info=True, local_files_only=True
                )
            missing = {*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])}
            return {key: x for key, x in loaded.state_dict().items() if key not in missing}

        return _reading(folder, read)


_LOCAL = {"local_files_only": True}


def _native_config(remote: Json) -> Json:
    """Florence-2's remote-code configuration as the native one."""
    vision, text = remote["vision_config"], remote["text_config"]
    return {
        "vision_config": {
            **{key: vision[key] for key in _VISION_SETTINGS if key in vision},
            "embed_dim": vision["dim_embed"],
            "max_temporal_embeddings": vision["visual_temporal_embedding"][
                "max_temporal_embeddings"
            ],
            "max_position_embeddings": vision["image_pos_embed"]["max_pos_embeddings"],
        },
        "text_config": {
            "model_type": "bart",
            **{key: text[key] for key in _BART_SETTINGS if key in text},
        },
        "image_token_id": text["vocab_size"],  # the native processor's addition; not used here
    }


def _read_json(path: Path, *needed: str) -> Json:
    values = read_json(path)
    if absent := [key for key in needed if key not in values]:  # a default would be taken for it
        raise ValueError(f"{absent[0]} is missing")
    return values


def _read_tokenizer(kind: Any, folder: Path, **options: bool) -> PreTrainedTokenizerBase:
    """A tokenizer from local files; without them some classes make an empty one."""

    def read() -> PreTrainedTokenizerBase:
        names = {path.name for path in folder.iterdir()}
        if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
            raise FileNotFoundError("the files of its tokenizer are missing")
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(
            folder, trust_remote_code=False, **options
        )
        return tokenizer

    return _reading(folder, read)


def _reading(path: Path, read: Callable[[], T]) -> T:
    """Read something below a component folder; whatever is wrong becomes one sentence."""
    if not path.exists():
        raise ModelFolderError(
            f"{path} is missing; name the component folders that the checkpoint was trained with"
        )
    try:
        return read()
    except _UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelFolderError(
            f"{path} cannot be read ({reason}); name the component folders that the checkpoint was "
            "trained with"
        ) from error


FLORENCE_HEADS = (
    "vision_tower",
    "image_projection",
    "image_proj_norm",
    "image_pos_embed",
    "visual_temporal_embed",
    "language_model",
)
_OTHER_HEADS = ("query_embed", "language_proj", "text_encoder", "unet", "vae")
_STAGE2_HEADS = ("qwen2_model", "mlp")
_STAGE1_IN_STAGE2 = "VLV_model."
_WRAPPING = re.compile(r"(?:(?:module|model|_orig_mod)\.)+")
_UNNEEDED = re.compile(
    r"model\.language_model\.(lm_head\.weight|final_logits_bias)"
    r"|(text_encoder|qwen2_model)\..*(position_ids|rotary_emb\.inv_freq)"
)

_VISION = "model.vision_tower."
_PROJECTOR = "model.multi_modal_projector."
_FLORENCE_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(convs\.\d+)\.conv\.", r"\1.proj."),
        (r"\.conv([12])\.", r".conv\1.fn.dw."),
        (r"\.(window|channel)_attn\.", r".\1_attn.fn."),
        (r"\.spatial_block\.norm1\.", r".spatial_block.window_attn.norm."),
        (r"\.channel_block\.norm1\.", r".channel_block.channel_attn.norm."),
        (r"\.norm2\.", r".ffn.norm."),
        (r"\.ffn\.fc", r".ffn.fn.net.fc"),
    )
]


def canonical(key: str) -> str | None:
    """A key without wrappers such as ``module.`` and without ``VLV_model.``.

    Their own ``model.`` before Florence-2's names is kept, or put back where a wrapper's was taken
    for it.

    >>> canonical("module.model.model.vision_tower.convs.0.proj.weight")
    'model.vision_tower.convs.0.proj.weight'
    >>> canonical("VLV_model.module.query_embed")
    'query_embed'

    Returns:
        The key; None where it is none of theirs.
    """
    bare = _bare(key)
    if bare.startswith(_STAGE1_IN_STAGE2):
        bare = _bare(bare.removeprefix(_STAGE1_IN_STAGE2))
    elif _head(bare) in _STAGE2_HEADS:
        return bare
    if _head(bare) in FLORENCE_HEADS:
        return f"model.{bare}"
    return bare if _head(bare) in _OTHER_HEADS else None


def is_stage2(key: str) -> bool:
    """Whether only a checkpoint of stage 2 has such a key."""
    bare = _bare(key)
    return bare.startswith(_STAGE1_IN_STAGE2) or _head(bare) in _STAGE2_HEADS


def is_unneeded(key: str) -> bool:
    """Whether a canonical key belongs to them but is not used here.

    Their lm_head is a frozen copy of the token embedding from before the training; the native class
    ties it to the embedding, and loading it would overwrite what was trained.
    """
    return _UNNEEDED.fullmatch(key) is not None


def florence_names(native: str) -> tuple[str, ...]:
    """Names in the authors' checkpoint of a tensor of ``Florence2ForConditionalGeneration``.

    Several names are copies of one tensor, the preferred first. The image projection is stored
    transposed.
    """
    if native.startswith(_VISION):
        name = native.removeprefix(_VISION)
        for pattern, replacement in _FLORENCE_RENAMES:
            name = pattern.sub(replacement, name)
        return (f"model.vision_tower.{name}",)
    if native == f"{_PROJECTOR}image_projection.weight":
        return ("model.image_projection",)
    if native.startswith(_PROJECTOR):
        name = native.removeprefix(_PROJECTOR)
        return (f"model.{name.replace('image_position_embed', 'image_pos_embed')}",)
    name = native.removeprefix("model.language_model.")
    prefix = "model.language_model.model."
    if name == "shared.weight":
        copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
        return (f"{prefix}{name}", *(f"{prefix}{copy}" for copy in copies))
    return (f"{prefix}{name}",)


def text_tower_names(native: str) -> tuple[str, ...]:
    """Names of a tensor of ``CLIPTextModel``, with the level of older versions and without."""
    return (f"text_encoder.text_model.{native}", f"text_encoder.{native}")


def _bare(key: str) -> str:
    return _WRAPPING.sub("", key, count=1) if _WRAPPING.match(key) else key


def _head(key: str) -> str:
    return key.split(".", 1)[0]
