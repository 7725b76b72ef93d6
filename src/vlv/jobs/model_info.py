"""What a model folder holds, read from its configs and safetensors headers without loading a weight."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from vlv.errors import ModelFolderError

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = {
    "caption": ("encoder", "text_encoder", "caption_decoder"),
    "reconstruct": ("encoder", "text_encoder", "unet", "vae", "scheduler"),
    "generate": ("text_encoder", "tokenizer", "unet", "vae", "scheduler"),
    "embed": ("encoder",),
}
"""Parts that each command needs."""


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
        return [command for command, needs in COMMANDS.items() if names.issuperset(needs)]


def describe_model(folder: Path) -> ModelInfo:
    """Read what a model folder says about itself.

    The front matter of its README.md may name the ``license``, under ``parts`` the licence of each
    component, and under ``knows`` in a sentence what the model was taught.

    Raises:
        ModelFolderError: The folder is no model.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelFolderError(f"{folder} is no model folder: it has no model_index.json")
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFolderError(f"{index} is damaged ({error})") from error
    card = _front_matter(folder / "README.md")
    licences = card.get("parts") or {}
    parts = [
        _part(folder / name, entry, str(licences.get(name, "")))
        for name, entry in sorted(entries.items())
        if not name.startswith("_") and _is_component(entry)
    ]
    return ModelInfo(folder, parts, str(card.get("license", "")), str(card.get("knows", "")))


def _is_component(entry: Any) -> bool:
    return isinstance(entry, dict) or (isinstance(entry, list) and entry[-1] is not None)


def _part(folder: Path, entry: Any, licence: str) -> Part:
    if isinstance(entry, dict):
        where = "/".join(str(entry[key]) for key in ("repo", "subfolder") if entry.get(key))
        return Part(
            folder.name, "", licence=licence, reference=f"{where}@{entry.get('revision', 'main')}"
        )
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    count, dtypes = 0, set()
    for path in files:
        if path.suffix == ".safetensors":
            for tensor in read_header(path).values():
                count += math.prod(tensor["shape"])
                dtypes.add(tensor["dtype"])
    size = sum(path.stat().st_size for path in files)
    return Part(folder.name, str(entry[-1]), count, size, tuple(sorted(dtypes)), licence)


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Header of a safetensors file: name to dtype and shape.

    Raises:
        ModelFolderError: The file is damaged.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= path.stat().st_size else None
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{path} is damaged ({error}); copy it again") from error
    if not isinstance(header, dict):
        raise ModelFolderError(f"{path} is cut off; copy it again")
    header.pop("__metadata__", None)
    return header


def _front_matter(card: Path) -> dict[str, Any]:
    """YAML between the two lines of dashes at the top of a model card; empty without one."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if not text.startswith("---\n") or "\n---" not in text[3:]:
        return {}
    try:
        matter = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except yaml.YAMLError as error:
        raise ModelFolderError(f"the front matter of {card} is no YAML ({error})") from error
    return matter if isinstance(matter, dict) else {}
