"""A model is a folder: finding it, reading its index, loading its components (written by saving.py).

```
my-model/
  model_index.json   image size and framing, and one entry per component: [library, class], or
                     {"repo", "subfolder", "revision"} where it is named instead of copied
  encoder/ caption_decoder/                        config.json + model.safetensors
  text_encoder/ tokenizer/ unet/ vae/ scheduler/   as in any diffusers folder; SDXL and Stable
                     Diffusion 3 have more towers, the latter a transformer/ instead of unet/
```
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
)
from transformers.utils import logging as transformers_logging

from vlv.config_files import RELEASED, model_preset_names, names_in
from vlv.data.framing import DEFAULT_FRAMING, Framing
from vlv.errors import MissingPartError, ModelFolderError
from vlv.models.captioner import CaptionDecoder
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.encoder import VLVEncoder
from vlv.models.hub import check_variant, download
from vlv.models.two_towers import SD3Decoder, SDXLDecoder, decoder_class
from vlv.models.vetting import (
    check_files,
    check_memory,
    check_values,
    naming,
    predicted_bytes,
    read_config,
)
from vlv.models.vision_encoder import VisionEncoder, VisionEncoderConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

Task = Literal["caption", "reconstruct", "generate", "embed", "search"]
Reference: TypeAlias = dict[str, str | None]
"""Where a component lies that is not copied: repo (hub id or folder), subfolder, revision, variant."""

INDEX_NAME = "model_index.json"

MODELS: dict[str, Any] = {
    "encoder": VLVEncoder,
    "text_encoder": CLIPTextModel,
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "caption_decoder": CaptionDecoder,
}
_MORE_MODELS: dict[str, Any] = {
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
    "transformer": SD3Transformer2DModel,
}
COMPONENTS = (
    "encoder",
    "text_encoder",
    "tokenizer",
    "unet",
    "vae",
    "scheduler",
    "caption_decoder",
)
MORE_COMPONENTS = (
    "text_encoder_2",
    "tokenizer_2",
    "text_encoder_3",
    "tokenizer_3",
    "transformer",
)
"""Those that some families of diffusion decoders have beside or instead of the others."""
_ALL = (*COMPONENTS, *MORE_COMPONENTS)


def _needed_of(family: type[DiffusionDecoder]) -> dict[str, tuple[str, ...]]:
    return {
        "embed": ("encoder",),
        "caption": ("encoder", *family.towers, "caption_decoder"),
        "reconstruct": ("encoder", *family.components),
        "generate": family.components,
        "search": ("encoder", *_text_parts(family)),
    }


def _text_parts(family: type[DiffusionDecoder]) -> tuple[str, ...]:
    """The text towers that z enters, and their tokenizers."""
    return tuple(x for x in family.components if x.startswith(("text_encoder", "tokenizer")))


NEEDED = _needed_of(DiffusionDecoder)
"""The components that each task needs where the diffusion decoder has one text tower."""


def needed(task: str, present: Iterable[str]) -> tuple[str, ...]:
    """The components that a task needs of a model with these components."""
    return _needed_of(decoder_class(tuple(present))).get(task, ())


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LIBRARIES = ("diffusers", "transformers", "vlv")
_LARGEST_SIDE = 2**14


@dataclass(frozen=True)
class ModelIndex:
    """What a model folder says about itself."""

    folder: Path
    components: dict[str, Reference | None]
    """Component name to the reference that stands for it; None where it lies in the folder."""
    classes: dict[str, str] = field(default_factory=dict)
    """Component name to its class, of those in the folder."""
    image_size: int | None = None
    """Side in pixels of the images it was trained on; None where the index does not say."""
    framing: Framing = DEFAULT_FRAMING
    """How images of other shapes become squares."""

    def require(self, tasks: Iterable[str]) -> list[str]:
        """The components that tasks need.

        Raises:
            MissingPartError: The model lacks one of them.
        """
        names: list[str] = []
        for task in tasks:
            if task not in NEEDED:
                raise ModelFolderError(
                    f'"{task}" is no part of a model; choose from {", ".join(NEEDED)}'
                )
            check_parts(f"the model {self.folder}", task, self.components)
            names += needed(task, self.components)
            if task == "generate":
                optional = decoder_class(tuple(self.components)).optional
                names += [name for name in optional if (self.folder / name).is_dir()]
        return [name for name in _ALL if name in names and name in self.components]


def check_parts(model: str, task: str, present: Iterable[str]) -> None:
    """Raise MissingPartError unless a model has every component that a task needs."""
    present = set(present)
    missing = [name for name in needed(task, present) if name not in present]
    if missing:
        raise MissingPartError(
            f'{model} has no {" and no ".join(missing)}, which "{task}" needs; '
            "name a model that has it"
        )


# --- finding --------------------------------------------------------------------------------------


def shipped_models() -> dict[str, Path]:
    """The models inside the package: the folder ``weights/NAME`` has the name ``vlv-NAME``."""
    weights = Path(str(files("vlv"))) / "weights"
    folders = sorted(path.parent for path in weights.glob(f"*/{INDEX_NAME}"))
    return {f"vlv-{folder.name}": folder for folder in folders}


def find_folder(
    name: str | Path,
    *,
    tasks: Iterable[str] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Resolve the name of a model to a folder on this machine.

    Args:
        name: A folder, a shipped model, a released one that was downloaded before, or ``owner/name`` on the hub, tried
            in this order. Only the last uses the network.
        tasks: Of a model on the hub, download only what these need.
        revision: Of a model on the hub.
        subfolder: Where in it to look; the result is the folder around it.
        variant: Of its weights, such as fp16.
        local_files_only: Take a model on the hub from the cache, without network.

    Raises:
        ModelFolderError: There is no such model; the message names the ways to name one.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelFolderError(f"{path} is a file; a model is a folder: name the one around it")
    shipped = shipped_models()
    if str(name) in shipped:
        return shipped[str(name)]
    if str(name) in model_preset_names():
        raise ModelFolderError(
            f'"{name}" names untrained models to start from (see vlv info {name}); '
            "train with its presets first, or name a trained model"
        )
    if str(name) in released_names():
        return _released(str(name), revision)
    if not HUB_ID.fullmatch(str(name)):
        known = ", ".join([*shipped, *released_names()])
        raise ModelFolderError(
            f'there is no model "{name}"; name a known model ({known}), a model folder, '
            "or a model on the hub as owner/name"
        )
    parts = sorted({part for task in tasks for part in _may_need(task)}) if tasks else None
    return download(
        str(name),
        parts,
        revision,
        local_files_only=local_files_only,
        subfolder=subfolder,
        variant=variant,
    )


def released_names() -> list[str]:
    """Names of models that others have released and that `vlv.models.released` downloads and converts."""
    return names_in(RELEASED)


def released_folder(name: str, revision: str | None = None) -> Path:
    """Where a released model lies once it is converted: beside the cache of the hub."""
    suffix = f"@{revision.replace('/', '--')}" if revision else ""
    return Path(constants.HF_ASSETS_CACHE) / "vlv" / f"{name}{suffix}"


def _released(name: str, revision: str | None) -> Path:
    folder = released_folder(name, revision)
    if not (folder / INDEX_NAME).is_file():
        raise ModelFolderError(
            f"{name} is not on this machine yet (it would be in {folder}); `vlv caption IMAGE --model {name} --yes` "
            "downloads and converts it"
        )
    return folder


def _may_need(task: str) -> set[str]:
    """What a task needs of a model of any family; folders that it lacks do no harm."""
    families = (DiffusionDecoder, SDXLDecoder, SD3Decoder)
    return {name for family in families for name in _needed_of(family).get(task, ())}


def read_index(folder: Path) -> ModelIndex:
    """Read ``model_index.json``.

    Raises:
        ModelFolderError: It is missing or damaged.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        found = sorted(p.name for p in folder.iterdir())[:8]
        raise ModelFolderError(
            f"{folder} is no model: {INDEX_NAME} is missing "
            f"(found: {', '.join(found) or 'nothing'}); "
            "name the folder that save_pretrained wrote"
        )
    index = read_config(path)
    entries = {name: index[name] for name in _ALL if index.get(name) not in (None, [None, None])}
    references = {name: entry for name, entry in entries.items() if isinstance(entry, dict)}
    classes = {name: _class_name(entry, f"{path}: {name}") for name, entry in entries.items() if name not in references}  # fmt: skip
    for name, reference in references.items():
        _check_reference(reference, f"{path}: {name}")
    size, framing = index.get("image_size"), index.get("framing", DEFAULT_FRAMING)
    if size is not None and (type(size) is not int or not 0 < size <= _LARGEST_SIDE):
        raise ModelFolderError(
            f"{path}: image_size is {size!r:.60}, but a number between 1 and {_LARGEST_SIDE} is wanted; copy the model again"
        )
    if framing not in get_args(Framing):
        raise ModelFolderError(
            f"{path}: framing is {framing!r:.60}, but one of {', '.join(get_args(Framing))} is wanted; copy the model again"
        )
    return ModelIndex(
        folder, {name: references.get(name) for name in entries}, classes, size, framing
    )


def _class_name(entry: object, where: str) -> str:
    """The class in an entry [library, class]; loading goes by the component's name and never looks it up."""
    match entry:
        case [str(library), str(name)] if library.split(".")[0] in _LIBRARIES:
            return name
    raise ModelFolderError(
        f"{where} is {entry!r:.60}, but [library, class] of {', '.join(_LIBRARIES)} is wanted; copy the model again"
    )


def _check_reference(reference: Mapping[str, object], where: str) -> None:
    texts = all(value is None or isinstance(value, str) for value in reference.values())
    inside = ".." not in Path(str(reference.get("subfolder") or "")).parts
    if not texts or not inside or not reference.get("repo"):
        raise ModelFolderError(
            f"{where} is {reference!r:.100}, but repo, subfolder and revision of a model are wanted; copy the model again"
        )


# --- loading --------------------------------------------------------------------------------------


def load_components(
    index: ModelIndex, names: Iterable[str], dtype: torch.dtype, *, local_files_only: bool = False
) -> dict[str, Any]:
    """Load components in eval mode onto the CPU, after a look at what their files ask for.

    Raises:
        ModelFolderError: Files are missing, damaged, of another configuration, or not to be trusted; or all together
            need more memory than there is.
    """
    folders = {
        name: component_folder(index, name, local_files_only=local_files_only) for name in names
    }
    num_bytes = 0
    for name, folder in folders.items():
        with naming(name, folder):
            num_bytes += _vet(name, folder, part_dtype(name, dtype))
    check_memory(index.folder, num_bytes)
    variants = {name: (index.components[name] or {}).get("variant") for name in folders}
    return {name: _loaded(name, folder, dtype, variants[name]) for name, folder in folders.items()}


def _vet(name: str, folder: Path, dtype: torch.dtype) -> int:
    """Refuse what no folder of this component should hold; returns the bytes that its weights will take."""
    check_files(folder)
    if name.startswith("tokenizer"):
        return 0
    path = folder / ("scheduler_config.json" if name == "scheduler" else "config.json")
    if not path.is_file():  # transformers would go on with its defaults
        raise FileNotFoundError(f"{path.name} is missing")
    config = read_config(path)
    kind = scheduler_class(config) if name == "scheduler" else _model_class(name, config)
    check_values(config, kind, path)
    return 0 if name == "scheduler" else predicted_bytes(config, kind, dtype)


def _loaded(name: str, folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    with naming(name, folder), quiet_loading():
        loaded, info = _load(name, folder, dtype, variant)
    missing = [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())]
    if missing:
        raise ModelFolderError(
            f"the weights of {name} in {folder} do not fit its config.json: {len(missing)} "
            f"tensors are missing or of another shape, such as {missing[0]}; copy the model again"
        )
    return loaded


def _load(
    name: str, folder: Path, dtype: torch.dtype, variant: str | None
) -> tuple[Any, dict[str, Any]]:
    """A component in eval mode, and what its loader found missing."""
    if name == "tokenizer_3":
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ), {}
    if name.startswith("tokenizer"):
        return CLIPTokenizer.from_pretrained(folder), {}
    if name == "scheduler":
        config = read_config(folder / "scheduler_config.json")
        return scheduler_class(config).from_pretrained(folder), {}
    check_variant(folder, variant)
    kind = _model_class(name, read_config(folder / "config.json"))
    dtype = part_dtype(name, dtype)
    options = {
        "dtype": dtype,
        "variant": variant,
        "output_loading_info": True,
        "local_files_only": True,
        "use_safetensors": True,  # a pickle may run code
    }
    model, info = kind.from_pretrained(folder, trust_remote_code=False, **options)
    for key, parameter in model.named_parameters():
        if parameter.is_meta:
            continue  # it is missing, which the loader has noted
        # a nested model may load in its own configuration's dtype
        parameter.data = parameter.data.to(dtype)
        if not torch.stack(parameter.data.aminmax()).isfinite().all():
            raise ValueError(f"the weight {key} holds NaN or infinity")
    return model.eval(), info


def scheduler_class(config: Mapping[str, Any]) -> type[SchedulerMixin]:
    """The scheduler that a configuration names: a file must not choose any other class."""
    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ModelFolderError(
            f"the scheduler {name:.60} is none of diffusers; copy the model again"
        )
    return kind


def part_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a component has in a model of `dtype`: the small VAE, whose rounding shows, stays in float32."""
    return torch.float32 if name == "vae" else dtype


def _model_class(name: str, config: Mapping[str, Any]) -> Any:
    """The class of a component; where several can play its role, its configuration says which."""
    if name == "encoder" and config.get("model_type") == VisionEncoderConfig.model_type:
        return VisionEncoder
    if name == "text_encoder" and "CLIPTextModelWithProjection" in (
        config.get("architectures") or ()
    ):
        return CLIPTextModelWithProjection
    return (MODELS | _MORE_MODELS)[name]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Turn off for a while what comes unasked: progress bars, and notes on weights that we refuse in a sentence of our own."""
    enabled = transformers_logging.is_progress_bar_enabled()
    levels = transformers_logging.get_verbosity(), diffusers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(levels[0])
        diffusers_logging.set_verbosity(levels[1])
        if enabled:
            transformers_logging.enable_progress_bar()


def component_folder(index: ModelIndex, name: str, *, local_files_only: bool = False) -> Path:
    """The folder of a component; a reference is followed, to another folder or to the hub."""
    reference = index.components[name]
    if reference is None:
        folder = index.folder / name
    else:
        folder = _follow(reference, index.folder, local_files_only=local_files_only)
    if not folder.is_dir():
        raise ModelFolderError(
            f"{index.folder / INDEX_NAME} lists the part {name}, but the folder {folder} "
            "is missing; copy the model again"
        )
    return folder


def _follow(reference: Reference, base: Path, *, local_files_only: bool) -> Path:
    """The folder that a reference names: below the model folder, a shipped model's, or one of the hub."""
    repo, subfolder = str(reference["repo"]), reference.get("subfolder")
    root = base / repo
    if not root.is_dir() and repo in shipped_models():
        root = shipped_models()[repo]
    elif not root.is_dir():
        root = download(
            repo,
            None,
            reference.get("revision"),
            local_files_only=local_files_only,
            subfolder=subfolder,
            variant=reference.get("variant"),
        )
    return root / (subfolder or ".")


def default_image_size(index: ModelIndex) -> int | None:
    """The side in pixels from the configurations of U-Net and VAE; None without them."""
    denoiser = decoder_class(tuple(index.components)).denoiser_name
    if not {denoiser, "vae"} <= set(index.components):
        return None
    paths = {name: index.folder / name / "config.json" for name in (denoiser, "vae")}
    if not all(path.is_file() for path in paths.values()):
        return None
    configs = {name: read_config(path) for name, path in paths.items()}
    for name, path in paths.items():
        check_values(configs[name], _model_class(name, configs[name]), path)
    sizes = configs[denoiser].get("sample_size"), configs["vae"].get("block_out_channels")
    match sizes:
        case int(size), list(channels):
            return int(size * 2 ** (len(channels) - 1))
    return None
