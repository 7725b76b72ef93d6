from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from vlv import storage
from vlv.errors import CheckpointError, OutputError
from vlv.training import checkpoint as module
from vlv.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

OPERATIONS = [
    (storage, "sync"),
    (module, "save_file"),
    (module, "_write_json"),
    (module, "_manifest"),
]


def save(folder: Path, step: int, keep_last: int = 2) -> Path:
    tensors = {"trainable": {"w": torch.full((3,), float(step))}, "ema": {"w": torch.zeros(3)}}
    return save_checkpoint(folder, tensors, {"step": step}, keep_last=keep_last)


def loaded_step(folder: Path) -> int:
    """The step of the newest good checkpoint, after a look at its tensors."""
    found = latest_checkpoint(folder)
    assert found is not None
    assert found.tensors("trainable")["w"].tolist() == [float(found.step)] * 3
    return found.step


def test_round_trip(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    path = save(tmp_path, 12)
    assert path.name == "step-00000012"
    assert {file.name for file in path.iterdir()} == {
        *("trainable.safetensors", "ema.safetensors", "state.json", "manifest.json")
    }
    found = load_checkpoint(path)
    assert found.step == 12
    assert found.tensors("trainable")["w"].tolist() == [12.0] * 3
    assert found.tensors("absent") == {}


def test_keeps_the_last_ones(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save(tmp_path, step, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]


def test_a_damaged_later_one_is_not_counted_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 9):
        save(tmp_path, step, keep_last=3)
    (tmp_path / "step-00000009" / "state.json").write_text("{")
    assert loaded_step(tmp_path) == 2
    save(tmp_path, 3, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    (path / "state.json").unlink()
    save(tmp_path, 5)
    assert loaded_step(tmp_path) == 5


def failing(plain: Any, countdown: list[int], error: BaseException) -> Any:
    """`plain` until the countdown is over, then the error."""

    def call(*args: Any, **kwargs: Any) -> Any:
        countdown[0] -= 1
        if countdown[0] < 0:
            raise error
        return plain(*args, **kwargs)

    return call


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_fault_at_any_operation_leaves_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    faults = 0
    for allowed in range(40):
        folder = tmp_path / str(allowed)
        save(folder, 1)
        countdown = [allowed]
        with monkeypatch.context() as patch:
            for owner, name in OPERATIONS:
                patch.setattr(owner, name, failing(getattr(owner, name), countdown, error))
            patch.setattr(Path, "rename", failing(Path.rename, countdown, error))
            try:
                save(folder, 2)
            except (OutputError, KeyboardInterrupt):
                faults += 1
                assert loaded_step(folder) in (1, 2)  # 2 if the fault came after the rename
            else:
                assert loaded_step(folder) == 2
                break
        save(folder, 3)
        assert loaded_step(folder) == 3
        assert not list(folder.glob(".*"))
    assert faults >= 9


def test_everything_is_on_the_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    plain_sync, plain_rename = storage.sync, Path.rename

    def sync(path: Path) -> None:
        synced.append(path.name)
        plain_sync(path)

    def rename(self: Path, target: Path) -> Path:
        assert {file.name for file in self.iterdir()} | {self.name} == set(synced)
        synced.append("renamed")
        return plain_rename(self, target)

    monkeypatch.setattr(storage, "sync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    save(tmp_path, 1)
    assert synced[-2:] == ["renamed", tmp_path.name]
    assert synced[-3].startswith("."), "the temporary folder itself"


@pytest.mark.parametrize("name", ["trainable.safetensors", "ema.safetensors", "state.json"])
def test_a_changed_byte_is_found(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert loaded_step(tmp_path) == 1
    assert f"step-00000002 is damaged: {name} is not the file that was saved" in caplog.text


DAMAGES = (
    "missing",
    "cut",
    "no manifest",
    "other manifest",
    "empty",
    "no files",
    "format 99",
    "deep",
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_incomplete_ones_are_passed_over(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    match damage:
        case "missing":
            (path / "ema.safetensors").unlink()
        case "cut":
            os.truncate(path / "trainable.safetensors", 10)
        case "no manifest":
            (path / "manifest.json").unlink()
        case "other manifest":
            (path / "manifest.json").write_text(json.dumps(["a"]))
        case "no files":
            (path / "manifest.json").write_text('{"format": 1, "files": {}}')
        case "format 99":
            known = json.loads((path / "manifest.json").read_text())
            (path / "manifest.json").write_text(json.dumps(known | {"format": 99}))
        case "deep":
            (path / "manifest.json").write_text("[" * 100_000)
        case "empty":
            for file in path.iterdir():
                file.write_bytes(b"")
    assert loaded_step(tmp_path) == 1


def test_only_damaged_ones_are_an_error(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        latest_checkpoint(tmp_path)
