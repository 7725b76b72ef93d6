"""Reading checkpoint files of any form as plain tensors; nothing in a file is ever executed.

Read are safetensors and torch's pickles, single or in shards with an index, alone or in a folder.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.torch_version import TorchVersion

from vlv.errors import CheckpointError, ModelFolderError
from vlv.models.vetting import read_json

PICKLE_LIMIT = 64 * 2**30
"""Largest pickled file that is opened, in bytes."""

_SAFE_PICKLES = "2.10"
"""The first torch whose ``weights_only`` holds against CVE-2026-24747."""
_NAMES = [
    f"{stem}{suffix}"
    for suffix in (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin", ".pt")
    for stem in ("model", "diffusion_pytorch_model", "pytorch_model")
]
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_WRAPPERS = ("model_state_dict", "state_dict", "module", "model")
_DAMAGED = (OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError, TypeError)


def read_tensors(path: Path, *, max_bytes: int = PICKLE_LIMIT) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint onto the CPU.

    Args:
        path: A ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file, an ``.index.json`` that lists
            shards, or a folder with one of these. Pickles may wrap the tensors in a dictionary
            under ``model_state_dict`` or the like; other entries are left out.
        max_bytes: Largest pickled file that is opened.

    Returns:
        Names and tensors as in the file, memory-mapped where the form allows it.

    Raises:
        CheckpointError: There is no such file, it is damaged, too large, or holds no tensors.
    """
    path = path.expanduser()
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint {path}; name a .safetensors, .bin or .pt file, "
            "an .index.json, or a folder with one"
        )
    if path.suffix == ".json":
        return _read_shards(path, max_bytes)
    return (
        _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, max_bytes)
    )


def find_weights(folder: Path) -> Path | None:
    """The weights file in a folder by its usual names; None where there is none."""
    name = usual_weights({path.name for path in folder.glob("*") if path.is_file()})
    return None if name is None else folder / name


def usual_weights(names: Collection[str]) -> str | None:
    """The name of the weights, or of their index, among the names of a folder's files; None where there is none.

    >>> usual_weights({"model.pt", "optimizer.pt"}), usual_weights({"checkpoint.pt"})
    ('model.pt', None)
    """
    return next((name for name in _NAMES if name in names), None)


def is_weights(name: str) -> bool:
    """Whether a file of this name may be one that `read_tensors` reads."""
    return name.endswith(_SUFFIXES)


def _in_folder(folder: Path) -> Path:
    """The one checkpoint in a folder."""
    if (found := find_weights(folder)) is not None:
        return found
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    if len(files) == 1 and files[0].is_file():
        return files[0] if not files[0].name.startswith("mp_rank_") else _raw_deepspeed(folder)
    if any(folder.glob("**/mp_rank_*")):
        _raw_deepspeed(folder)
    found_names = ", ".join(path.name for path in files[:5]) or "none"
    raise CheckpointError(
        f"{folder} holds no single checkpoint (weights found: {found_names}); name the file"
    )


def _raw_deepspeed(folder: Path) -> Path:
    raise CheckpointError(
        f"{folder} holds DeepSpeed's own shards; join them with the zero_to_fp32.py beside them "
        "and name the pytorch_model.bin that it writes"
    )


def read_shard_index(index: Path) -> dict[str, str]:
    """The shard of each tensor in an ``.index.json``.

    Raises:
        CheckpointError: It is damaged, or names a file that is no shard beside it.
    """
    try:
        shards = {str(k): str(shard) for k, shard in read_json(index)["weight_map"].items()}
    except (*_DAMAGED, ModelFolderError) as error:
        raise CheckpointError(f"{index} is no index of shards; name another file") from error
    for shard in shards.values():
        if Path(shard).name != shard or not is_weights(shard):
            raise CheckpointError(f"{index} names the shard {shard!r} outside its folder")
    return shards


def _read_shards(index: Path, max_bytes: int) -> dict[str, Tensor]:
    names = read_shard_index(index)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(names.values())):
        path = index.parent / shard
        if not path.is_file():
            raise CheckpointError(f"{index} names the shard {shard}, which is missing; copy it too")
        tensors |= read_tensors(path, max_bytes=max_bytes)
    if absent := [name for name in names if name not in tensors]:
        raise CheckpointError(
            f"{index} lists {absent[0]} and {len(absent) - 1} more tensors that no shard holds; "
            "copy the checkpoint again"
        )
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy it again") from error


def _read_pickle(path: Path, max_bytes: int) -> dict[str, Tensor]:
    size = path.stat().st_size
    if size > max_bytes:
        raise CheckpointError(
            f"{path} is a pickle of {size / 1e9:.1f} GB, above the limit of {max_bytes / 1e9:.1f} "
            "GB; convert it to safetensors"
        )
    if TorchVersion(torch.__version__) < _SAFE_PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which torch {torch.__version__} can be made to run code with "
            f"(CVE-2026-24747); update torch to {_SAFE_PICKLES} or convert the file to safetensors"
        )
    try:
        loaded = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is no pickle of tensors alone: it is damaged or would run code, and is not "
            "opened; convert it to safetensors where you trust it"
        ) from error
    except _DAMAGED as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is damaged ({reason}); copy it again") from error
    return _state_dict(loaded, path)


def _state_dict(loaded: object, path: Path) -> dict[str, Tensor]:
    """The tensors in what a pickle held, out of any wrapping dictionaries."""
    while isinstance(loaded, Mapping):
        inner = next(
            (loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), None
        )
        if inner is None:
            break
        loaded = inner
    items = loaded.items() if isinstance(loaded, Mapping) else ()
    tensors = {str(key): value for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{path} holds no tensors (it holds a {type(loaded).__name__}); name a file of weights"
        )
    return tensors
