"""Checkpoints that are either complete or absent.

```
checkpoints/step-00001234/
  trainable.safetensors   the trained parameters (and the buffers of trained modules)
  ema.safetensors         their moving average, where the run keeps one
  optimizer.safetensors   AdamW's moments, by parameter name
  state.json              step, counters, random generators, data position, configuration
  manifest.json           size and sha256 of each file above; written last
```
All files are written and synced in a temporary folder, which is then renamed: a crash leaves the checkpoint before.
The tensors are whole, however many processes share them, and the first process alone writes. No pickle is written or read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlv.errors import CheckpointError
from vlv.storage import Json, remove_temporaries, replacing_folder

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_FORMAT = 1
_ROOM_FOR_STATE = 2**20
"""Bytes for state.json, manifest.json and the headers of the others."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint whose files were verified."""

    path: Path
    """Its folder."""
    state: Json
    """What state.json holds."""

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.state["step"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `<name>.safetensors`, on the CPU; empty where the checkpoint has no such file."""
        file = self.path / f"{name}.safetensors"
        return load_file(file) if file.exists() else {}


def save_checkpoint(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Json,
    *,
    keep_last: int,
    keep: Collection[int] = (),
) -> Path:
    """Write a checkpoint, then delete the ones that are no longer wanted.

    The disk is asked for room before anything is written, and every file is read again before it counts.

    Args:
        folder: The `checkpoints` folder of the run.
        tensors: File stem to tensors by name.
        state: JSON values; `state["step"]` names the checkpoint.
        keep_last: Number of checkpoints left, this one included.
        keep: Steps of checkpoints that are left besides.

    Raises:
        OutputError: The disk refuses; earlier checkpoints are then untouched.
    """
    target = checkpoint_path(folder, state["step"])
    remove_temporaries(folder)
    with replacing_folder(target) as temporary:
        _check_room(folder, tensors)
        for name, named in tensors.items():
            contiguous = {key: value.detach().contiguous() for key, value in named.items()}
            save_file(contiguous, temporary / f"{name}.safetensors")
            _check_written(temporary / f"{name}.safetensors", contiguous)
        _write_json(temporary / "state.json", state)
        _write_json(temporary / _MANIFEST, _manifest(temporary))
    _prune(folder, newest=target, keep_last=keep_last, keep=keep)
    return target


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def _check_room(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise OSError where the disk has less room than the tensors need."""
    sizes = (t.numel() * t.element_size() for named in tensors.values() for t in named.values())
    needed, free = sum(sizes) + _ROOM_FOR_STATE, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the checkpoint needs {needed:,} bytes and {free:,} are free",
            str(folder),
        )


def _check_written(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise OSError unless the file has a place for every byte of the tensors."""
    try:
        with safe_open(file, "pt") as opened:
            complete = set(opened.keys()) == set(tensors)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"the file was not written whole ({error})", str(file)) from error
    if not complete:
        raise OSError(errno.EIO, "the file was not written whole", str(file))


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are what its manifest says; damaged ones are logged and passed over.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged.
    """
    candidates = _by_step(folder)
    for path in reversed(candidates):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            logger.warning("%s; trying the one before it", error)
    if candidates:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged; delete the folder to start the run from its beginning"
        )
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Open one checkpoint folder after comparing each file with the manifest.

    Raises:
        CheckpointError: A file is missing, unreadable, or not the one that was written.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        if manifest["format"] != _FORMAT:
            raise CheckpointError(
                f"the checkpoint {path} has the format {manifest['format']!r:.40}, but {_FORMAT} is read here"
            )
        names = {file.name for file in path.iterdir()} - {_MANIFEST}
        if other := sorted(names ^ set(manifest["files"])):
            raise CheckpointError(
                f"the checkpoint {path} is damaged: {other[0]} is missing, or not in its manifest"
            )
        for name, expected in manifest["files"].items():
            if _fingerprint(path / name) != expected:
                raise CheckpointError(
                    f"the checkpoint {path} is damaged: {name} is not the file that was saved"
                )
        return Checkpoint(path, json.loads((path / "state.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the checkpoint {path} is incomplete ({error})") from error


def reopen_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint that another process has verified.

    Raises:
        CheckpointError: This process cannot see it.
    """
    try:
        return Checkpoint(path, json.loads((path / "state.json").read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the first process found the checkpoint {path}, but this one cannot read it ({error}); "
            "put the run folder where all processes see it"
        ) from error


def _by_step(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.name[5:].isdigit())


def _prune(folder: Path, *, newest: Path, keep_last: int, keep: Collection[int]) -> None:
    """Keep `newest`, those just before it, and `keep`; one with a later step was damaged and passed over."""
    earlier = [path for path in _by_step(folder) if path.name <= newest.name]
    kept = {*earlier[-keep_last:], *(checkpoint_path(folder, step) for step in keep)}
    for path in set(_by_step(folder)) - kept:
        shutil.rmtree(path, ignore_errors=True)


def _manifest(folder: Path) -> Json:
    return {"format": _FORMAT, "files": {f.name: _fingerprint(f) for f in sorted(folder.iterdir())}}


def _fingerprint(file: Path) -> Json:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _write_json(file: Path, value: object) -> None:
    """Write a JSON file, and look whether it is all there."""
    text = json.dumps(value, indent=1)
    file.write_text(text)
    if file.read_text() != text:
        raise OSError(errno.EIO, "the file was not written whole", str(file))
