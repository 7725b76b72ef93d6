"""Downloads that fail, each with one sentence that says what to do; and which files are fetched."""

from __future__ import annotations

import errno
import shutil
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vlv.config import PartSource
from vlv.errors import ModelFolderError
from vlv.models import hub
from vlv.training.parts import load_decoder

if TYPE_CHECKING:
    from pathlib import Path


def http(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    request = httpx2.Request("GET", "https://huggingface.co/api/models/some/model")
    return kind("several\nlines", response=httpx2.Response(status, request=request))


FAILURES = [
    (http(GatedRepoError, 403), False, "accept the terms at https://huggingface.co/some/model"),
    (http(RepositoryNotFoundError, 404), False, "withdrawn or renamed.*name a mirror or a local"),
    (http(RevisionNotFoundError, 404), False, "no revision 'v9'.*name another revision"),
    (http(HfHubHTTPError, 500), False, "several lines.*check the name, the revision"),
    (LocalEntryNotFoundError("x"), False, "not in the cache, and there is no connection"),
    (LocalEntryNotFoundError("x"), True, "HF_HUB_OFFLINE is set.*hf download some/model"),
    (OfflineModeIsEnabled("x"), True, "HF_HUB_OFFLINE is set.*hf download some/model"),
    (HFValidationError("bad name"), False, "bad name.*owner/name"),
    (OSError(errno.ENOSPC, "No space left on device"), False, "the disk is full.*set HF_HOME"),
    (RuntimeError("Data error: No space left on device"), False, "the disk is full.*set HF_HOME"),
    (PermissionError(13, "Permission denied"), False, "Permission denied"),
]


@pytest.mark.parametrize(("error", "offline", "message"), FAILURES)
def test_failures(
    error: Exception, offline: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ModelFolderError, match=message) as caught:
        hub.download("some/model", None, "v9")
    assert "\n" not in str(caught.value)


REPOSITORY = (
    *("model_index.json", "v2-1.safetensors", "v2-1.ckpt"),
    *("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/model.onnx"),
    *("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin"),
    *("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
    *("sd/unet/config.json", "sd/unet/model-00001-of-00002.safetensors"),
    *("sd/unet/model-00001-of-00002.fp16.safetensors", "sd/unet/model.safetensors.index.json"),
)


def fetched(monkeypatch: pytest.MonkeyPatch, *parts: str, **settings: Any) -> set[str]:
    chosen: set[str] = set()

    def snapshot(repo: str, *, allow_patterns: Any, ignore_patterns: Any, **_: Any) -> str:
        for name in REPOSITORY:
            wanted = allow_patterns is None or any(fnmatch(name, p) for p in allow_patterns)
            if wanted and not any(fnmatch(name, p) for p in ignore_patterns):
                chosen.add(name)
        return "folder"

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    hub.download("some/model", parts, None, **settings)
    return chosen


def test_only_what_is_read_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert fetched(monkeypatch, "unet") == plain
    half = {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    }
    assert fetched(monkeypatch, "unet", variant="fp16") == half
    inside = {
        "sd/unet/config.json",
        "sd/unet/model-00001-of-00002.safetensors",
        "sd/unet/model.safetensors.index.json",
    }
    assert fetched(monkeypatch, "unet", subfolder="sd") == inside
    inside = {"sd/unet/config.json", "sd/unet/model-00001-of-00002.fp16.safetensors"}
    assert fetched(monkeypatch, "unet", subfolder="sd", variant="fp16") == inside


def test_a_variant_is_loaded_from_a_folder(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nested" / "decoder"
    shutil.copytree(tiny_folder, folder)
    for name in ("unet", "vae", "text_encoder"):
        weights = next((folder / name).glob("*.safetensors"))
        weights.rename(weights.with_name(f"{weights.stem}.fp16.safetensors"))
    source = {"path": str(tmp_path / "nested"), "subfolder": "decoder"}
    assert load_decoder(PartSource(**source, variant="fp16")).unet is not None
    with pytest.raises(ModelFolderError, match="no plain weights, but fp16; set variant"):
        load_decoder(PartSource(**source))
    with pytest.raises(ModelFolderError, match="no weights of the variant bf16, but fp16"):
        load_decoder(PartSource(**source, variant="bf16"))
    with pytest.raises(ModelFolderError, match="of the variant fp16, but the plain files only"):
        load_decoder(PartSource(path=str(tiny_folder), variant="fp16"))
