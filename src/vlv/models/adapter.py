"""An adapter is a folder: what a LoRA training adds to a base model, a few megabytes that people share.

```
my-adapter/
  vlv.json                   the base that it belongs to, and what its captions may be asked for
  adapter_config.json        of the caption decoder's language model, as peft writes it
  adapter_model.safetensors
  encoder/                   the same of the encoder's language model, where that trained
  trained.safetensors        what trained whole: psi, and with the encoder its queries and projector
  README.md                  how it was trained
```
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from vlv.errors import ConfigError, ModelFolderError, OutputError
from vlv.models.card import CARD_NAME, Training
from vlv.models.encoder import ImageEncoder, VLVEncoder
from vlv.models.folder import HUB_ID, INDEX_NAME, ModelIndex, component_folder
from vlv.models.hashing import sample_hash
from vlv.models.hub import download
from vlv.models.lora import (
    WEIGHTS_NAME,
    low_rank_parameters,
    merge_low_rank,
    read_weights,
    save_low_rank,
)
from vlv.models.vetting import read_json
from vlv.storage import Json, replacing_folder, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlv.models.captioner import CaptionDecoder

ABOUT_NAME = "vlv.json"
FORMAT = 1
_TRAINED_NAME = "trained.safetensors"
_PARTS = ("encoder", "text_encoder", "text_encoder_2", "caption_decoder")
"""What the captions of a model depend on."""
_FLAGS = ("answers_questions", "ends_by_itself", "obeys_lengths", "uses_known")
"""Settings of a caption decoder that stage 2 changes, beside its styles."""


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to."""

    name: str
    """For people; a folder's own name without its path."""
    weights: dict[str, str]
    """Hash of each part."""


def base_of(index: ModelIndex, name: str) -> Base:
    """What tells a model folder from others."""
    return Base(name, {part: _hash(index, part) for part in _PARTS if part in index.components})


def _hash(index: ModelIndex, part: str) -> str:
    return sample_hash(component_folder(index, part, local_files_only=True))


def language_models(
    encoder: ImageEncoder | None, caption_decoder: CaptionDecoder | None
) -> dict[str, PreTrainedModel]:
    """The language models that may have adapters, by the component that they lie in."""
    found: dict[str, PreTrainedModel] = {}
    if caption_decoder is not None:
        found["caption_decoder"] = caption_decoder.llm
    if isinstance(encoder, VLVEncoder):  # the small transformer of others trains whole
        found["encoder"] = encoder.backbone.model.language_model
    return found


def _place(folder: Path, part: str) -> Path:
    return folder if part == "caption_decoder" else folder / part


# --- saving ---------------------------------------------------------------------------------------


def save_adapter(
    folder: Path,
    encoder: ImageEncoder,
    caption_decoder: CaptionDecoder,
    base: Base,
    training: Training,
) -> None:
    """Write what trained: complete, or not at all.

    Args:
        folder: New, empty, or an older adapter that is replaced.
        encoder: Of the trained model.
        caption_decoder: Of the trained model, with adapters.
        base: The model that both belong to.
        training: The run.

    Raises:
        OutputError: The folder holds something else, or the disk refuses.
    """
    if folder.exists() and not (folder / ABOUT_NAME).is_file() and any(folder.iterdir()):
        raise OutputError(f"{folder} exists and is no adapter; name a new folder or empty this one")
    taught = {name: getattr(caption_decoder.config, name) for name in ("styles", *_FLAGS)}
    about = {"format": FORMAT, "base": asdict(base), "caption_decoder": taught}
    with replacing_folder(folder) as temporary:
        for part, model in language_models(encoder, caption_decoder).items():
            if low_rank_parameters(model):
                save_low_rank(model, _place(temporary, part), base.name)
        whole = _trained_whole({"encoder": encoder, "caption_decoder": caption_decoder})
        save_file(whole, temporary / _TRAINED_NAME, {"format": "pt"})
        write_json(temporary / ABOUT_NAME, about)
        (temporary / CARD_NAME).write_text(_card(folder.name, base, training), encoding="utf-8")
        for path in [temporary, *temporary.rglob("*")]:  # they are born private
            path.chmod(0o755 if path.is_dir() else 0o644)


def _trained_whole(parts: Mapping[str, PreTrainedModel]) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": parameter.detach().cpu().contiguous()
        for part, model in parts.items()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in low_rank_parameters(model)
    }


def _card(name: str, base: Base, training: Training) -> str:
    """README.md, whose first lines the hub and `past_trainings` read."""
    matter = {
        "library_name": "vlv",
        "pipeline_tag": "image-to-text",
        "tags": ["vision-language-vision", "image-captioning", "lora"],
        "training": [asdict(training)],
    }
    head = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True, width=100)
    return (
        f"---\n{head}---\n\n# {name}\n\nA LoRA adapter of the model `{base.name}`, of {training.steps:,} steps of "
        f"{training.stage}. It is used with its base, whose licences hold for it too:\n\n"
        f"```\nvlv caption IMAGE --model {base.name} --adapter {name}\n```\n"
    )


# --- loading --------------------------------------------------------------------------------------


def apply_adapter(folder: Path, parts: Mapping[str, Any], index: ModelIndex) -> set[str]:
    """Merge an adapter into the components that were loaded of its base.

    Args:
        folder: The adapter.
        parts: Components by name, changed in place.
        index: The model folder that they were loaded from.

    Returns:
        The components that it changed.

    Raises:
        ModelFolderError: The folder is no adapter, is damaged, or belongs to another model.
        ConfigError: It changes nothing that was loaded, or peft is missing.
    """
    about = read_about(folder)
    _check_base(folder, about, parts, index)
    whole = read_weights(folder / _TRAINED_NAME)
    models = language_models(parts.get("encoder"), parts.get("caption_decoder"))
    low_rank = {part for part in models if (_place(folder, part) / WEIGHTS_NAME).is_file()}
    changed = low_rank | {name.split(".")[0] for name in whole if name.split(".")[0] in parts}
    if not changed:
        raise ConfigError(
            f"the adapter {folder} changes the caption decoder alone, which is not used here; leave it out"
        )
    for part in sorted(low_rank):
        merge_low_rank(models[part], _place(folder, part))
    _copy_whole(folder, whole, parts)
    if "caption_decoder" in parts:
        _teach(parts["caption_decoder"], about["caption_decoder"])
    return changed


def adapted_name(model: str, adapter: str | None) -> str:
    """How a model and its adapter are named together, as results name what made them.

    >>> adapted_name("vlv-3b", None), adapted_name("vlv-3b", "runs/style/adapter")
    ('vlv-3b', 'vlv-3b+runs/style/adapter')
    """
    return model if adapter is None else f"{model}+{adapter}"


def split_name(name: str) -> tuple[str, str | None]:
    """The model and the adapter in a name; a folder that is called so is a model.

    >>> split_name("vlv-3b+runs/style/adapter")
    ('vlv-3b', 'runs/style/adapter')
    """
    model, plus, adapter = name.partition("+")
    return (model, adapter) if plus and not Path(name).is_dir() else (name, None)


def find_adapter(name: str | Path, *, local_files_only: bool = False) -> Path:
    """The folder of an adapter: one of this machine, or ``owner/name`` on the hub.

    Raises:
        ModelFolderError: There is none of that name.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not HUB_ID.fullmatch(str(name)):
        raise ModelFolderError(
            f'there is no adapter "{name}"; name a folder, such as RUN/adapter of a training with lora, or one on the hub '
            "as owner/name"
        )
    return download(str(name), None, None, local_files_only=local_files_only)


def read_about(folder: Path) -> Json:
    """What an adapter says of itself.

    Raises:
        ModelFolderError: The folder is no adapter, or of another format.
    """
    if not (folder / ABOUT_NAME).is_file():
        kind = "is a model: give it with --model" if (folder / INDEX_NAME).is_file() else "is none"
        raise ModelFolderError(
            f"an adapter is a folder with {ABOUT_NAME}, such as RUN/adapter of a training with lora, and {folder} {kind}"
        )
    about = read_json(folder / ABOUT_NAME)
    match about:
        case {
            "format": int(number),
            "base": {"name": str(), "weights": dict()},
            "caption_decoder": dict(),
        }:
            if number == FORMAT:
                return about
    raise ModelFolderError(
        f"{folder / ABOUT_NAME} has the format {about.get('format')!r:.40}, or lacks what {FORMAT} has; copy the adapter again"
    )


def _check_base(folder: Path, about: Json, parts: Mapping[str, Any], index: ModelIndex) -> None:
    name, weights = " ".join(about["base"]["name"].split())[:100], about["base"]["weights"]
    for part in _PARTS:
        if part in parts and weights.get(part) != _hash(index, part):
            raise ModelFolderError(
                f"the adapter {folder} belongs to the model {name}, and the {part} of {index.folder} is another; "
                "name its base with --model"
            )


@torch.no_grad()
def _copy_whole(folder: Path, whole: Mapping[str, Tensor], parts: Mapping[str, Any]) -> None:
    own = {
        f"{part}.{name}": parameter
        for part in ("encoder", "caption_decoder")
        if part in parts
        for name, parameter in parts[part].named_parameters()
    }
    for name, tensor in _of(whole, parts):
        if name not in own or own[name].shape != tensor.shape:
            there = tuple(own[name].shape) if name in own else "nothing"
            raise ModelFolderError(
                f"the adapter {folder} holds {tuple(tensor.shape)} for {name!r:.100}, where the model has {there}; "
                "name its base with --model, or copy the adapter again"
            )
    for name, tensor in _of(whole, parts):
        own[name].copy_(tensor)


def _of(whole: Mapping[str, Tensor], parts: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What was trained whole of the parts that are there."""
    known = ("encoder", "caption_decoder")
    for name, tensor in whole.items():
        part = name.split(".")[0]
        if part not in known or part in parts:
            yield name, tensor


def _teach(caption_decoder: CaptionDecoder, taught: Json) -> None:
    """Let the caption decoder know what the adapter taught it."""
    styles = taught.get("styles", "")
    are_texts = isinstance(styles, dict) and all(isinstance(x, str) for x in styles.values())
    if not (styles is None or are_texts) or any(type(taught.get(x)) is not bool for x in _FLAGS):
        raise ModelFolderError(
            f"{ABOUT_NAME} does not say what the captions may be asked for; copy the adapter again"
        )
    for name in ("styles", *_FLAGS):
        setattr(caption_decoder.config, name, taught[name])
