"""`--model vlv-3b` on the command line: what it says, what it asks, and that it asks only once."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from tests import hub as hubs
from tests.hub import Hub, Repo
from tests.models.official_files import COMPONENTS, STAGE2, tensors, values
from vlv.models.decoding import tidy_caption
from vlv.models.folder import released_folder
from vlv.models.released import released_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cli.conftest import Vlv

MODEL = released_model("vlv-3b")
SEARCH = ("--num-beams", 4, "--early-stopping", "--max-new-tokens", 40, "--batch-size", 4)


def repositories() -> dict[str, Repo]:
    """What vlv-3b is made of, in miniature; enough to caption."""
    parts = {
        "florence": ("Florence2large", "mit"),
        "diffusion": ("stable-diffusion-2-1-base", "openrail++"),
        "llm": ("Qwen2.5", "other"),
    }
    found = {
        getattr(MODEL, part).path: Repo(hubs.content_of(COMPONENTS / folder), licence)
        for part, (folder, licence) in parts.items()
    }
    return found | {MODEL.checkpoint.path: Repo({"model.safetensors": STAGE2.read_bytes()})}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hubs.running() as hub:
        hub.repos = repositories()
        hubs.point_to(hub, monkeypatch, tmp_path)
        yield hub


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, image in enumerate(tensors("stage2_reference")["images_uint8"]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    return folder


class Terminal(io.StringIO):
    """A person who types."""

    def isatty(self) -> bool:
        return True


@pytest.mark.slow
def test_one_command_to_captions(
    vlv: Vlv, hub: Hub, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("caption", pictures, "--model", "vlv-3b", *SEARCH)
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    refused = vlv(*command)
    assert refused.code == 1
    assert (
        "vlv-3b has to be downloaded first (0.00 GB; licences: licence unknown, mit" in refused.err
    )
    assert "agree with --yes (`vlv caption IMAGE --model vlv-3b --yes`)" in refused.err
    monkeypatch.setattr(sys, "stdin", Terminal("no\n"))
    assert "vlv-3b was not downloaded" in vlv(*command).err
    assert not hub.sent("/model.safetensors"), "nothing is fetched that was not agreed to"
    about = vlv("info", "vlv-3b")
    assert (about.code, "not on this machine; `vlv caption IMAGE" in about.out) == (0, True)
    assert "Qwen/Qwen2.5-3B  Qwen Research (no commercial use)" in about.out
    assert "vlv-3b (the VLV authors' captioner" in vlv("doctor").out

    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    result = vlv(*command)
    raw = values("stage2_reference")["generation"]["beam4_fp32"]["texts"]
    expected = [tidy_caption(text) for text in raw]
    assert [line.split("\t")[1] for line in result.out.splitlines()] == expected
    for line in (
        "mit  (configuration",
        "licence unknown  (the trained model)",
        "to download: 2.2 MB",
    ):
        assert line in result.err
    assert hubs.TOKEN not in result.err

    hub.requests.clear()
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    again = vlv(*command)
    assert (again.out, hub.requests) == (result.out, []), "no question and no network"
    about = vlv("info", "vlv-3b")
    assert f"in the cache: {released_folder('vlv-3b')}" in about.out
    assert f"unet             -> {MODEL.diffusion.path}/unet@" in about.out
    assert f"in {released_folder('vlv-3b')}" in vlv("doctor").out


def test_every_command_says_how_to_get_it(vlv: Vlv, hub: Hub, tmp_path: Path) -> None:
    for command in (
        ("data", "caption", tmp_path, "--model", "vlv-3b", "--output", tmp_path / "out"),
        ("eval", "toyworld", "--model", "vlv-3b", "--num", 2),
    ):
        (tmp_path / "a.png").write_bytes(b"")
        assert "vlv caption IMAGE --model vlv-3b --yes" in vlv(*command).err
    assert not hub.sent("/model.safetensors")
    assert vlv("info", "vlv-3b", "--batch-size", 2).code == 1
    assert "did you mean vlv-3b?" in vlv("info", "vlv-3B").err
