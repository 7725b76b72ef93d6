"""`vlv convert official`, and captions of a converted model."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Vlv
from tests.models.official_files import COMPONENTS, STAGE1, STAGE2, tensors, values
from vlv.models.decoding import tidy_caption

PARTS = (
    "--florence",
    COMPONENTS / "Florence2large",
    "--diffusion",
    COMPONENTS / "stable-diffusion-2-1-base",
)
LLM = ("--llm", COMPONENTS / "Qwen2.5")
S = tensors("stage2_reference")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, image in enumerate(S["images_uint8"]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    return folder


@pytest.mark.slow
def test_a_converted_model_writes_the_recorded_captions(
    vlv: Vlv, tmp_path: Path, pictures: Path
) -> None:
    result = vlv("convert", "official", STAGE2, *PARTS, *LLM, tmp_path / "out")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].startswith("stage 2: encoder from checkpoint, text_encoder from checkpoint")
    assert {"used: 370", "missing: 0", "unexpected: 0", "misshaped: 0"} <= set(lines)
    search = ("--num-beams", 4, "--early-stopping", "--max-new-tokens", 40, "--batch-size", 4)
    command = ("caption", pictures, "--model", tmp_path / "out", *search)
    raw = values("stage2_reference")["generation"]["beam4_fp32"]["texts"]
    tidied = vlv(*command).out.splitlines()
    assert [line.split("\t")[1] for line in tidied] == [tidy_caption(text) for text in raw]
    untidy = vlv(*command, "--no-tidy").out.splitlines()
    assert [line.split("\t")[1] for line in untidy] == raw


@pytest.mark.slow
def test_stage_1_needs_no_language_model(vlv: Vlv, tmp_path: Path, pictures: Path) -> None:
    out = tmp_path / "out"
    result = vlv("convert", "official", STAGE1, out, *PARTS, "--dtype", "float16")
    assert result.code == 0
    assert "unet from checkpoint" in result.out
    rebuilt = vlv(
        "reconstruct", pictures, "-o", tmp_path / "rebuilt", "--model", out, "--sampler", "ddpm",
        "--steps", 2,
    )  # fmt: skip
    assert rebuilt.code == 0
    assert len(list((tmp_path / "rebuilt").glob("*.png"))) == 4


def test_what_is_wrong_is_said(vlv: Vlv, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no checkpoint" in vlv("convert", "official", tmp_path / "x", out, *PARTS).err
    assert "language model was given" in vlv("convert", "official", STAGE2, out, *PARTS).err
    gone = ("--florence", tmp_path / "gone", "--diffusion", COMPONENTS)
    assert "gone/config.json is missing" in vlv("convert", "official", STAGE1, out, *gone).err
    assert vlv("convert", "official", STAGE1, out).code == 1
    assert not out.exists()
