"""What a model folder holds, read from its configs and safetensors headers without loading a weight."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlv.errors import ModelFolderError
from vlv.models.card import CARD_NAME, read_front_matter
from vlv.models.folder import INDEX_NAME, NEEDED, Reference, needed, read_index

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Part:
    """One component of a model folder.

    Attributes:
        name: Its subfolder.
        kind: Its class.
        num_parameters: Numbers in its weights.
        num_bytes: Size of all its files.
        dtypes: Types of the stored numbers, such as F16.
        licence: What the model card says; empty when it says nothing.
        reference: Where the component lies when the folder only refers to it.
    """

    name: str
    kind: str
    num_parameters: int = 0
    num_bytes: int = 0
    dtypes: tuple[str, ...] = ()
    licence: str = ""
    reference: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """A model folder.

    Attributes:
        folder: Where it lies.
        parts: Its components.
        licence: Licence of the whole, from the model card.
        knows: What the model knows, from the model card.
    """

    folder: Path
    parts: list[Part] = field(default_factory=list)
    licence: str = ""
    knows: str = ""

    @property
    def commands(self) -> list[str]:
        """Commands for which all parts are there."""
        names = {part.name for part in self.parts}
        return [command for command in NEEDED if names.issuperset(needed(command, names))]


def describe_model(folder: Path) -> ModelInfo:
    """Read what a model folder says about itself.

    The front matter of its README.md may name the ``license``, under ``parts`` the licence of each
    component, and under ``knows`` in a sentence what the model was taught.

    Raises:
        ModelFolderError: The folder is no model.
    """
    index = read_index(folder)
    card = read_front_matter(folder / CARD_NAME)
    licences = card.get("parts") or {}
    parts = [
        _referred(name, reference, str(licences.get(name, "")))
        if reference is not None
        else _read_part(folder / name, index.classes[name], str(licences.get(name, "")))
        for name, reference in index.components.items()
    ]
    return ModelInfo(folder, parts, str(card.get("license", "")), str(card.get("knows", "")))


def _referred(name: str, reference: Reference, licence: str) -> Part:
    where = "/".join(str(reference[key]) for key in ("repo", "subfolder") if reference.get(key))
    revision = reference.get("revision")
    return Part(name, "", licence=licence, reference=where + (f"@{revision}" if revision else ""))


def _read_part(folder: Path, kind: str, licence: str) -> Part:
    if not folder.is_dir():
        raise ModelFolderError(
            f"{folder} is missing, though {INDEX_NAME} lists it; copy the model again"
        )
    files = [path for path in folder.rglob("*") if path.is_file()]
    headers = [read_header(path) for path in files if path.suffix == ".safetensors"]
    tensors = [tensor for header in headers for tensor in header.values()]
    return Part(
        folder.name,
        kind,
        num_parameters=sum(math.prod(tensor["shape"]) for tensor in tensors),
        num_bytes=sum(path.stat().st_size for path in files),
        dtypes=tuple(sorted({tensor["dtype"] for tensor in tensors})),
        licence=licence,
    )


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Header of a safetensors file: name to dtype and shape.

    Raises:
        ModelFolderError: The file is damaged.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= path.stat().st_size else None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path} is damaged ({error}); copy it again") from error
    if not isinstance(header, dict):
        raise ModelFolderError(f"{path} is cut off; copy it again")
    header.pop("__metadata__", None)
    return header
