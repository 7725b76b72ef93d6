"""What a model folder holds, read from its configs and safetensors headers without loading a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vlv.errors import ModelFolderError
from vlv.models.card import CARD_NAME, read_front_matter
from vlv.models.folder import INDEX_NAME, NEEDED, Reference, needed, read_index
from vlv.storage import read_settings


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
    """A model folder."""

    folder: Path
    parts: list[Part] = field(default_factory=list)
    licence: str = ""
    knows: str = ""
    styles: dict[str, str] = field(default_factory=dict)
    """Instruction of each style that its captions may have."""
    answers_questions: bool = False
    obeys_lengths: bool = False
    uses_known: bool = False

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
    file = folder / "caption_decoder" / "config.json"
    taught = read_settings(file, mend="copy the model again") or {}
    styles = taught.get("styles")
    return ModelInfo(
        folder,
        parts,
        str(card.get("license", "")),
        str(card.get("knows", "")),
        styles if isinstance(styles, dict) else {},
        bool(taught.get("answers_questions")),
        bool(taught.get("obeys_lengths")),
        bool(taught.get("uses_known")),
    )


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
    weights = [path for path in files if path.suffix == ".safetensors"]
    tensors = [tensor for path in weights for tensor in _read_header(path)]
    return Part(
        folder.name,
        kind,
        num_parameters=sum(math.prod(shape) for shape, _ in tensors),
        num_bytes=sum(path.stat().st_size for path in files),
        dtypes=tuple(sorted({dtype for _, dtype in tensors})),
        licence=licence,
    )


def _read_header(path: Path) -> list[tuple[list[int], str]]:
    """Shape and dtype of every tensor in a safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
            return [(one.get_shape(), one.get_dtype()) for one in slices]
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path} is damaged ({error}); copy it again") from error
