"""`vlv doctor`."""

from __future__ import annotations

import shutil
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from huggingface_hub import constants

from vlv.jobs import doctor

if TYPE_CHECKING:
    from tests.cli.conftest import Vlv


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This machine may have faults of its own; the tests look for those that they make."""
    monkeypatch.setattr(doctor, "requirements", lambda extra=None: {"torch": ">=2.6,<3"})
    monkeypatch.setattr(doctor, "_torchvision", lambda: doctor.Finding(True, "torchvision"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(shutil, "which", lambda _: None)


def test_all_is_well(vlv: Vlv, tmp_path: Path) -> None:
    (tmp_path / "hub" / "models--some--model").mkdir(parents=True)
    result = vlv("doctor")
    assert result.code == 0
    assert f"torch {torch.__version__} (>=2.6,<3)" in result.out
    assert f"hub cache {tmp_path / 'hub'}: 1 models" in result.out
    assert "auto is" in result.out
    assert "BAD" not in result.out
    assert "all is well" in result.err


def test_a_package_that_does_not_fit(vlv: Vlv, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"torch": ">=99", "no-such-package": ">=1"}
    monkeypatch.setattr(doctor, "requirements", lambda extra=None: wanted)
    result = vlv("doctor")
    assert result.code == 1
    assert 'pip install "torch>=99"' in result.out
    assert "BAD  no-such-package is missing" in result.out
    assert "2 of" in result.err


def test_running_from_the_sources_alone(vlv: Vlv, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.undo()
    for name in ("version", "requires", "metadata"):
        monkeypatch.setattr(metadata, name, missing)
    result = vlv("doctor")
    assert result.code == 1
    assert "BAD  vlv is not installed, so the versions it needs are not known" in result.out
    assert "auto is" in result.out


def test_a_torchvision_that_breaks_everything(
    vlv: Vlv, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    (tmp_path / "torchvision.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist")'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    finding = doctor._torchvision()
    assert not finding.good
    assert "nms does not exist" in finding.text
    assert (
        "breaks transformers and diffusers; remove it (pip uninstall torchvision)" in finding.text
    )


def test_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = SimpleNamespace(free=3e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    room, offline = doctor._cache()
    assert room.good
    assert "3.0 GB free (little for real models" in room.text
    assert "HF_HUB_OFFLINE is set" in offline.text
    monkeypatch.setattr("os.access", lambda *_: False)
    locked, _ = doctor._cache()
    assert not locked.good
    assert "set HF_HOME" in locked.text


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert doctor._device().text.startswith("auto is cpu in float32")
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not doctor._device().good


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties: Any = SimpleNamespace(total_memory=48e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    assert "auto is cuda in bfloat16" in doctor._device().text
    assert "Some GPU with 48 GB" in doctor._device().text


def test_the_requirements_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert "torch" in doctor.requirements()
    assert "pytest" not in doctor.requirements()
    assert "pyarrow" in doctor.requirements("data")


def test_a_missing_extra_comes_with_its_command(vlv: Vlv, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {None: {"torch": ">=2.6,<3"}, "data": {"no-such-package": ">=1", "torch": ">=99"}}
    monkeypatch.setattr(doctor, "requirements", lambda extra=None: needed.get(extra, {}))
    result = vlv("doctor")
    (line,) = (line for line in result.out.splitlines() if "extra [data]" in line)
    assert line.startswith("-    extra [data]: no-such-package is missing, torch 2.")
    assert line.endswith('; pip install "vlv[data]"')
    assert (result.code, "all is well; optional extras missing: 1" in result.err) == (0, True)
