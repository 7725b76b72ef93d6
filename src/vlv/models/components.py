"""The components of a model as one object of diffusers: loaded from a folder or the hub, saved, pushed."""

from __future__ import annotations

import copy
import importlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from vlv.data.framing import DEFAULT_FRAMING, Framing, check_framing
from vlv.errors import ModelFolderError, OutputError
from vlv.models.adapter import apply_adapter, find_adapter
from vlv.models.arguments import named
from vlv.models.calibration import CALIBRATION_NAME, Calibration, read_calibration
from vlv.models.captioner import CaptionDecoder
from vlv.models.card import (
    CARD_NAME,
    Provenance,
    model_card,
    named_parts,
    origin_of,
    past_trainings,
    read_card,
    rename_card,
)
from vlv.models.diffusion import DiffusionDecoder, Scheduler
from vlv.models.encoder import ImageEncoder
from vlv.models.folder import (
    COMPONENTS,
    INDEX_NAME,
    MORE_COMPONENTS,
    ModelIndex,
    Reference,
    Task,
    check_parts,
    default_image_size,
    find_folder,
    load_components,
    quiet_loading,
    read_index,
)
from vlv.models.hub import upload
from vlv.models.placement import pick_device, pick_dtype
from vlv.models.search_space import SPACE_NAME, Space, read_search_space
from vlv.models.two_towers import make_diffusion_decoder
from vlv.storage import replacing_folder, write_json

CAPTIONING_TYPE = "vlv"
"""The model type by which transformers knows a model folder, see `vlv.models.captioning`."""


def write_component(component: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """Save one component, its floating-point tensors in another dtype where one is given.

    Raises:
        OutputError: A weight does not fit the dtype.
    """
    if dtype is not None and isinstance(component, nn.Module):
        component = nn.Module.to(copy.deepcopy(component), dtype)
        for name, tensor in component.state_dict().items():
            if not tensor.isfinite().all():
                raise OutputError(
                    f"{folder.name}: the weight {name} does not fit {dtype}; save as float32"
                )
    with quiet_loading():
        component.save_pretrained(folder)
    for config in folder.rglob("*config.json"):
        _forget_origin(config)


def _forget_origin(config: Path) -> None:
    """Drop how the component was loaded.

    A path of this machine says nothing elsewhere, and the code that some models bring along is never run. The dtype of
    a part within a component would overrule the one that is asked for when it is loaded again.
    """
    values = json.loads(config.read_text(encoding="utf-8"))
    kept = {
        key: _without(value, {"_name_or_path", "dtype", "auto_map"})
        for key, value in values.items()
        if key not in {"_name_or_path", "auto_map"}
    }
    if kept != values or config.name == "config.json":
        config.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _without(value: object, keys: set[str]) -> object:
    """A value of a configuration without some keys, at any depth."""
    if isinstance(value, dict):
        return {k: _without(v, keys) for k, v in value.items() if k not in keys}
    return value


def index_entry(component: object) -> list[str]:
    """[library, class] of a component, as diffusers writes it; ours name their module."""
    module = type(component).__module__
    library = module.split(".", maxsplit=1)[0]
    name = type(component).__name__
    return [library if hasattr(importlib.import_module(library), name) else module, name]


def check_replaceable(folder: Path) -> None:
    """Raise OutputError if `folder` exists and is no model."""
    if folder.is_file() or (
        folder.exists() and not (folder / INDEX_NAME).is_file() and any(folder.iterdir())
    ):
        raise OutputError(
            f"{folder} exists and is no model folder; name a new folder or empty this one"
        )


def _make_readable(folder: Path) -> None:
    """Undo the private modes that temporary folders and safetensors files are born with."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def write_index(
    folder: Path, class_name: str, components: Mapping[str, object], extra: Mapping[str, object]
) -> None:
    """Write ``model_index.json``, for each component its entry or null; and ``config.json``, by which transformers knows it."""
    index = {"_class_name": class_name, "_diffusers_version": diffusers.__version__}
    text = json.dumps({**index, **components, **extra}, indent=2) + "\n"
    (folder / INDEX_NAME).write_text(text, encoding="utf-8")
    about = json.dumps({"model_type": CAPTIONING_TYPE}) + "\n"
    (folder / "config.json").write_text(about, encoding="utf-8")


class VLVComponents(DiffusionPipeline):
    """The components of a Vision-Language-Vision auto-encoder, each of which may be absent.

    Args:
        encoder: Image to caption embedding.
        text_encoder: The text tower T.
        tokenizer: Its tokenizer.
        unet: The denoiser of Stable Diffusion 1, 2 and SDXL.
        vae: The auto-encoder of the latents.
        scheduler: The noise schedule that the denoiser was trained with.
        caption_decoder: Context to caption.
        image_size: Side in pixels that images are brought to; None is that of the denoiser.
        framing: How images of other shapes become squares, see `vlv.data.framing.frame`.
        text_encoder_2, tokenizer_2: Second text tower, of SDXL and Stable Diffusion 3.
        text_encoder_3, tokenizer_3: The T5 of Stable Diffusion 3.
        transformer: The denoiser of Stable Diffusion 3.
    """

    encoder: ImageEncoder | None
    text_encoder: CLIPTextModel | CLIPTextModelWithProjection | None
    tokenizer: PreTrainedTokenizerBase | None
    unet: UNet2DConditionModel | None
    vae: AutoencoderKL | None
    scheduler: Scheduler | None
    caption_decoder: CaptionDecoder | None
    text_encoder_2: CLIPTextModelWithProjection | None
    tokenizer_2: PreTrainedTokenizerBase | None
    text_encoder_3: T5EncoderModel | None
    tokenizer_3: PreTrainedTokenizerBase | None
    transformer: SD3Transformer2DModel | None

    model_cpu_offload_seq = "->".join(  # type: ignore[assignment]
        (
            "encoder",
            "text_encoder",
            "text_encoder_2",
            "text_encoder_3",
            "unet",
            "transformer",
            "vae",
        )
    )
    _optional_components = [*COMPONENTS, *MORE_COMPONENTS]  # noqa: RUF012

    # diffusers reads the components from this signature, so each has a parameter of its own
    def __init__(
        self,
        encoder: ImageEncoder | None = None,
        text_encoder: CLIPTextModel | CLIPTextModelWithProjection | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        unet: UNet2DConditionModel | None = None,
        vae: AutoencoderKL | None = None,
        scheduler: Scheduler | None = None,
        caption_decoder: CaptionDecoder | None = None,
        image_size: int | None = None,
        framing: Framing = DEFAULT_FRAMING,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_3: T5EncoderModel | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
        transformer: SD3Transformer2DModel | None = None,
    ) -> None:
        super().__init__()
        parts = (encoder, text_encoder, tokenizer, unet, vae, scheduler, caption_decoder)
        more = (text_encoder_2, tokenizer_2, text_encoder_3, tokenizer_3, transformer)
        named = zip((*COMPONENTS, *MORE_COMPONENTS), (*parts, *more), strict=True)
        self.register_modules(**dict(named))  # type: ignore[no-untyped-call]
        check_framing(framing)
        self.register_to_config(  # type: ignore[no-untyped-call]
            image_size=image_size, framing=framing
        )
        self.references: dict[str, Reference] = {}
        self.card: str | None = None  # README.md of the folder it was loaded from
        self.calibration: Calibration | None = None  # of doubts about captions
        self.search_space: Space | None = None
        # where parts go while they work; see `place`
        self.offload_device: torch.device | None = None
        self._decoder: tuple[dict[str, object], DiffusionDecoder] | None = None
        for part in self._parts().values():
            if isinstance(part, torch.nn.Module):
                part.eval()

    @classmethod
    @named()
    def from_pretrained(  # type: ignore[override]
        cls,
        name_or_folder: str | Path,
        *,
        parts: Iterable[Task] | None = None,
        revision: str | None = None,
        adapter: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = torch.float32,
        local_files_only: bool = False,
    ) -> Self:
        """Load a model in eval mode.

        Args:
            name_or_folder: A model folder, the name of a shipped model, or ``owner/name`` on the hub (the network is used).
            parts: What it is for, any of "caption", "reconstruct", "generate", "embed", "search": only the components
                that these need are loaded. None loads all that the model has.
            revision: Of a model on the hub.
            adapter: Folder of a LoRA adapter of this model, or ``owner/name`` on the hub; it is merged in.
            device: Where it works; "auto" is CUDA, else MPS, else the CPU.
            dtype: Of the weights in memory, whatever the files hold, as a torch dtype or its name; "auto" is bfloat16
                where the device computes in it, or else float32. The VAE is always float32.
            local_files_only: Take a model on the hub from the cache.

        Raises:
            ModelFolderError: There is no such model or adapter, one is incomplete or damaged, or they do not belong together.
            MissingPartError: It lacks a component that `parts` need.
            ConfigError: There is no such device or dtype, or the adapter needs peft.
        """
        device = pick_device(str(device))
        dtype = dtype if isinstance(dtype, torch.dtype) else pick_dtype(dtype, device)
        tasks = None if parts is None else list(parts)
        folder = find_folder(
            name_or_folder, tasks=tasks, revision=revision, local_files_only=local_files_only
        )
        index = read_index(folder)
        names = list(index.components) if tasks is None else index.require(tasks)
        loaded = load_components(index, names, dtype, local_files_only=local_files_only)
        size = index.image_size or default_image_size(index)
        pipe = cls(**loaded, image_size=size, framing=index.framing)
        pipe.references = {k: v for k, v in index.components.items() if v is not None}
        pipe.card = read_card(folder)
        pipe.calibration = read_calibration(folder)
        pipe.search_space = read_search_space(folder)
        if adapter is not None:
            pipe._adapt(find_adapter(adapter, local_files_only=local_files_only), index)
        pipe.register_to_config(_name_or_path=str(name_or_folder))  # type: ignore[no-untyped-call]
        pipe.to(device)
        return pipe

    def _adapt(self, adapter: Path, index: ModelIndex) -> None:
        """Merge an adapter in, and forget what was known of the components that it changes."""
        parts = {name: part for name, part in self._parts().items() if part is not None}
        changed = apply_adapter(adapter, parts, index)
        self.references = {k: v for k, v in self.references.items() if k not in changed}
        if "encoder" in changed:
            self.search_space = None
        origins = {name: origin_of(index.folder, name) for name in parts}
        trainings = (*past_trainings(index.folder), *past_trainings(adapter))
        self.card = model_card(adapter.name, parts, Provenance(origins, trainings))

    def save_pretrained(  # type: ignore[override]
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        references: Mapping[str, Reference] | None = None,
        card: str | None = None,
    ) -> None:
        """Write a model folder: complete, or not at all.

        Args:
            folder: New, empty, or an older model that is replaced.
            dtype: Of the weights in the files (``torch.float16`` halves them); None keeps that in memory.
            references: Components that are named instead of copied; None keeps those the model was loaded with.
            card: Text of README.md; None keeps that of the replaced or the loaded folder, or writes one.

        Raises:
            OutputError: The folder holds something else, or a weight does not fit the dtype.
        """
        folder = Path(folder)
        references = self.references if references is None else references
        parts = self._parts()
        name = folder.resolve().name
        text = card or read_card(folder) or self._card(name, references)

        entries: dict[str, object] = {name: [None, None] for name in COMPONENTS}
        check_replaceable(folder)
        with replacing_folder(folder) as temporary:
            for part, component in parts.items():
                if part in references:
                    entries[part] = dict(references[part])
                elif component is not None:
                    write_component(component, temporary / part, dtype)
                    entries[part] = index_entry(component)
            extra = {"image_size": self._known_image_size(), "framing": self.framing}
            write_index(temporary, type(self).__name__, entries, extra)
            (temporary / CARD_NAME).write_text(text, encoding="utf-8")
            if self.calibration is not None:
                write_json(temporary / CALIBRATION_NAME, self.calibration.to_dict())
            if self.search_space is not None:
                self.search_space.save(temporary / SPACE_NAME)
            _make_readable(temporary)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        dtype: torch.dtype | None = None,
        card: str | None = None,
        commit_message: str = "Upload VLVPipeline",
    ) -> str:
        """Upload the model with its card.

        Args:
            repo_id: ``owner/name``; created where it does not exist.
            private: Of a created repository.
            token: Of the hub; None is the stored login.
            dtype: Of the uploaded weights.
            card: Text of README.md; None is that of the loaded folder, or one from what is known.
            commit_message: Of the upload.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            text = card or self._card(repo_id, self.references)
            self.save_pretrained(folder, dtype=dtype, card=text)
            return upload(folder, repo_id, commit_message, private=private, token=token)

    @property
    def image_size(self) -> int:
        """Side in pixels that images are brought to."""
        size = self._known_image_size()
        if size is None:
            raise ModelFolderError(
                f"the image size of {self._name()} is unknown: it has no denoiser and VAE that tell; "
                "pass image_size to VLVPipeline"
            )
        return size

    @property
    def framing(self) -> Framing:
        """How images of other shapes become squares: "cut" or "resize" first."""
        framing: Framing = self.config["framing"]
        return framing

    @property
    def decoder(self) -> DiffusionDecoder:
        """The components of the diffusion model as one module, built when one of them has changed."""
        parts = self._parts()
        if self._decoder is None or any(parts[k] is not v for k, v in self._decoder[0].items()):
            self._decoder = parts, make_diffusion_decoder(parts)
        return self._decoder[1]

    def _known_image_size(self) -> int | None:
        if (size := self.config["image_size"]) is not None:
            return int(size)
        if (self.unet is None and self.transformer is None) or self.vae is None:
            return None
        return self.decoder.image_size

    def _parts(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in (*COMPONENTS, *MORE_COMPONENTS)}

    def _card(self, name: str, references: Mapping[str, Reference]) -> str:
        if self.card is not None:
            return rename_card(self.card, name)
        return model_card(name, self._parts(), named_parts(references))

    def _name(self) -> str:
        return str(self.config.get("_name_or_path") or "in memory")

    def _require(self, task: Task, *, given_z: bool = False) -> None:
        """Check the components of a task; where z is given the encoder is not needed."""
        present = [name for name, component in self._parts().items() if component is not None]
        check_parts(
            f"the model {self._name()}, as it was loaded,",
            task,
            [*present, "encoder"] if given_z else present,
        )
