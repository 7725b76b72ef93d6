"""Where the parts of a training lie, and how one of them is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer

from vlv.config import PartSource, RunConfig
from vlv.data.framing import DEFAULT_FRAMING, Framing
from vlv.errors import ConfigError
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.folder import (
    COMPONENTS,
    INDEX_NAME,
    MORE_COMPONENTS,
    ModelIndex,
    Reference,
    find_folder,
    load_components,
    read_index,
)
from vlv.models.hub import check_variant
from vlv.models.two_towers import decoder_class, make_diffusion_decoder
from vlv.models.vetting import naming


def load_decoder(
    source: PartSource, *, draws: bool = True, encodes: bool = False
) -> DiffusionDecoder:
    """The diffusion decoder in a folder of the diffusers layout, of the family that its parts show.

    Where it need not draw, the text towers and their tokenizers are enough, with the VAE where it encodes. What a family may do
    without (the T5 tower, which z never enters) is left out.
    """
    family = decoder_class(tuple(_decoder_parts(source)))
    names = family.components
    if not draws:
        needed = ("text_encoder", "tokenizer", *(("vae",) if encodes else ()))
        names = tuple(name for name in names if name.startswith(needed))
    index = decoder_index(source, names)
    return make_diffusion_decoder(load_components(index, names, torch.float32))


def decoder_index(source: PartSource, names: Sequence[str]) -> ModelIndex:
    """Where the named parts of a decoder lie."""
    folder, parts = part_folder(source, ["generate"]), _decoder_parts(source)
    missing: Reference = {"repo": str(folder.absolute())}
    entries: dict[str, Reference | None] = {}
    for name in names:
        entries[name] = parts.get(name, missing | {"subfolder": name})
    return ModelIndex(folder, entries)


def _decoder_parts(source: PartSource) -> dict[str, Reference]:
    """Where the decoder's parts lie: in the folder, or where its index says, as that of a model that was trained on others does."""
    folder, known = part_folder(source, ["generate"]), (*COMPONENTS, *MORE_COMPONENTS)
    named = read_index(folder).components if (folder / INDEX_NAME).is_file() else {}
    parts = {name: x for name, x in named.items() if x is not None and name in known}
    for name, reference in parts.items():
        beside = folder / str(reference["repo"])
        if beside.is_dir():  # what is exported may lie elsewhere
            parts[name] = reference | {"repo": str(beside.absolute())}
    here: dict[str, str | None] = {"repo": str(folder.absolute()), "variant": source.variant}
    return parts | {name: here | {"subfolder": name} for name in known if (folder / name).is_dir()}


def load_component(source: PartSource, name: str, tasks: Sequence[Literal["embed"]] | None) -> Any:
    """One component in float32, from a model folder or from its own folder."""
    folder = model_around(part_folder(source, tasks), name)
    return load_components(ModelIndex(folder, {name: None}), [name], torch.float32)[name]


def model_around(folder: Path, name: str) -> Path:
    """The model folder, where a component's own folder was named."""
    return folder.parent if folder.name == name and not (folder / name).is_dir() else folder


def part_folder(source: PartSource, tasks: Sequence[Literal["generate", "embed"]] | None) -> Path:
    """The folder of a part; one on the hub is downloaded, as far as the tasks need it."""
    folder = find_folder(
        source.path,
        tasks=tasks,
        revision=source.revision,
        subfolder=source.subfolder,
        variant=source.variant,
    )
    return folder / (source.subfolder or ".")


def load_pretrained(kind: Any, source: PartSource, what: str) -> Any:
    """Load a model (in float32) or tokenizer of transformers."""
    folder = part_folder(source, None)
    options: dict[str, object] = {}
    if kind is not AutoTokenizer:
        check_variant(folder, source.variant)
        options = {"dtype": torch.float32, "variant": source.variant, "use_safetensors": True}
    with naming(what, folder):
        return kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )


def framing_of(config: RunConfig) -> Framing:
    """How images become squares: as the settings say, or as the encoder that learns on has seen them.

    Raises:
        ConfigError: The two differ.
    """
    wanted, folder = config.data.framing, encoder_folder(config)
    known = None
    if folder is not None and (folder / INDEX_NAME).is_file():
        known = read_index(folder).framing
    if wanted and known and wanted != known:
        raise ConfigError(
            f'data.framing is "{wanted}", but the encoder in {folder} has seen images of the framing "{known}"; '
            "leave data.framing out"
        )
    return wanted or known or DEFAULT_FRAMING


def encoder_folder(config: RunConfig) -> Path | None:
    """The model folder whose encoder learns on; None for a fresh encoder."""
    source = config.model.encoder
    return None if source is None else model_around(part_folder(source, ["embed"]), "encoder")
