"""Writing a model folder: components, index, model card; all or nothing."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
from torch import nn

from vlv.errors import OutputError
from vlv.models.folder import INDEX_NAME, quiet_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

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
    with quiet_progress():
        component.save_pretrained(folder)
    _forget_origin(folder / "config.json")


def _forget_origin(config: Path) -> None:
    """Drop how the component was loaded.

    A path of this machine says nothing elsewhere. The dtype of a part within a component would
    overrule the one that is asked for when it is loaded again.
    """
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        values = {
            key: _without(value, {"_name_or_path", "dtype"})
            for key, value in values.items()
            if key != "_name_or_path"
        }
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _without(value: Any, keys: set[str]) -> Any:
    """A value of a configuration without some keys, at any depth."""
    if isinstance(value, dict):
        return {k: _without(v, keys) for k, v in value.items() if k not in keys}
    return value


def index_entry(component: Any) -> list[str]:
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


def write_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder beside `folder`, then put it in its place.

    Raises:
        OutputError: `folder` exists and is no model.
    """
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        write(temporary)
        _make_readable(temporary)
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_readable(folder: Path) -> None:
    """Undo the private modes that temporary folders and safetensors files are born with."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def _replace(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; an older folder is removed only after that."""
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
    if folder.exists():
        folder.rename(old / folder.name)
    new.rename(folder)
    shutil.rmtree(old)


def write_index(
    folder: Path, class_name: str, components: Mapping[str, Any], extra: Mapping[str, Any]
) -> None:
    """Write ``model_index.json``, for each component its entry or null; and ``config.json``, by which transformers knows it."""
    index = {"_class_name": class_name, "_diffusers_version": diffusers.__version__}
    text = json.dumps({**index, **components, **extra}, indent=2) + "\n"
    (folder / INDEX_NAME).write_text(text, encoding="utf-8")
    about = json.dumps({"model_type": CAPTIONING_TYPE}) + "\n"
    (folder / "config.json").write_text(about, encoding="utf-8")
