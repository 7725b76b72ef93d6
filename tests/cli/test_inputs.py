"""Bad and unusual inputs through the command line: one clear sentence, the right exit code, the right pixels."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file

from tests.cli.conftest import Vlv, write_image


def flat_pixels() -> np.ndarray:
    """Few colours, nothing symmetric: (32, 48, 3)."""
    pixels = np.full((32, 48, 3), (250, 240, 20), np.uint8)
    pixels[:10, :30] = (200, 30, 30)
    pixels[20:, 10:40] = (20, 60, 180)
    return pixels


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "there is no such file or folder"),
        ("empty", "the folder holds no images"),
        ("notes.odt", "does not read this type of file"),
        ("*.webp", "matches nothing that vlv reads"),
    ],
)
def test_inputs_that_are_none(vlv: Vlv, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.odt").write_text("text")
    for command in (
        ("caption",),
        ("reconstruct", "-o", tmp_path / "r"),
        ("embed", "-o", "z.safetensors"),
    ):
        result = vlv(*command, tmp_path / name)
        assert result.code == 1
        assert message in result.err
    assert not (tmp_path / "r").exists()


def test_bad_images_are_skipped_and_named(vlv: Vlv, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    good = write_image(folder / "good.png").read_bytes()
    bad = {
        "cut.png": (good[: len(good) // 2], "cannot be decoded"),
        "zero.jpg": (b"", "the file is empty"),
        "text.png": (b"this is no image", "of a format that vlv reads"),
        "bomb.png": (_long_png(20_000), "20000"),
    }
    for name, (content, _) in bad.items():
        (folder / name).write_bytes(content)
    output = tmp_path / "z.safetensors"
    result = vlv("embed", folder, "-o", output, "--model", tiny_folder)
    assert result.code == 2
    for name, (_, message) in bad.items():
        (line,) = [line for line in result.err.splitlines() if name in line]
        assert line.startswith("failed: ")
        assert message in line
    assert "done 1, skipped 0, failed 4" in result.err
    assert load_file(output)["z"].shape[0] == 1


def _long_png(height: int) -> bytes:
    """A tiny file that claims 1 x `height` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 1, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0\0\0\0" * height, 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_unusual_files_give_the_right_pixels(vlv: Vlv, tiny_folder: Path, tmp_path: Path) -> None:
    """The embedding of each file is that of the same picture as a plain PNG."""
    plain = Image.fromarray(flat_pixels())
    folder = tmp_path / "in"
    folder.mkdir()
    plain.save(folder / "0-plain.png")
    plain.quantize(8).save(folder / "1-palette.png")
    plain.save(
        folder / "2-animated.gif",
        save_all=True,
        append_images=[Image.new("RGB", plain.size)],
        loop=0,
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    plain.transpose(Image.Transpose.ROTATE_90).save(folder / "3-rotated.png", exif=exif)
    plain.convert("CMYK").save(folder / "4-cmyk.tif")
    _on_white(plain).save(folder / "5-alpha.png")
    output = tmp_path / "z.safetensors"
    assert vlv("embed", folder, "-o", output, "--model", tiny_folder).code == 0
    z = load_file(output)["z"]
    for number in range(1, 6):
        torch.testing.assert_close(z[number], z[0], atol=2e-3, rtol=0)


def _on_white(image: Image.Image) -> Image.Image:
    """The same picture with its yellow made of half-transparent pixels over white."""
    pixels = np.asarray(image).astype(int)
    alpha = np.where(pixels[..., :1] == 250, 128, 255)
    colours = ((pixels - 255) * 255 / alpha + 255).round().clip(0, 255)
    return Image.fromarray(np.concatenate([colours, alpha], 2).astype(np.uint8))


@pytest.mark.slow
def test_16_bits_are_scaled(vlv: Vlv, tiny_folder: Path, tmp_path: Path) -> None:
    grey = flat_pixels()[..., 0]
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(grey).save(folder / "0.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "1.png")
    output = tmp_path / "z.safetensors"
    vlv("embed", folder, "-o", output, "--model", tiny_folder)
    z = load_file(output)["z"]
    torch.testing.assert_close(z[1], z[0])


# --- models ----------------------------------------------------------------------------------------


def test_unknown_model(vlv: Vlv, photos: Path) -> None:
    result = vlv("caption", photos, "--model", "no such model")
    assert result.code == 1
    assert 'there is no model "no such model"' in result.err


def test_folder_that_is_no_model(vlv: Vlv, photos: Path) -> None:
    for command in (("caption", photos, "--model", photos), ("info", photos)):
        result = vlv(*command)
        assert result.code == 1
        assert "model_index.json is missing" in result.err


@pytest.mark.slow
def test_model_without_the_part(vlv: Vlv, photos: Path, tiny_folder: Path, tmp_path: Path) -> None:
    from vlv.models.pipeline import VLVPipeline

    half = tmp_path / "half"
    VLVPipeline.from_pretrained(tiny_folder, parts=["reconstruct"]).save_pretrained(half)
    result = vlv("caption", photos, "--model", half)
    assert result.code == 1
    assert "has no caption_decoder" in result.err
    assert vlv("reconstruct", photos, "--model", half, "-o", tmp_path / "r", "--steps", 1).code == 0


def test_damaged_weights(vlv: Vlv, photos: Path, tiny_folder: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    weights = broken / "encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for command in (("caption", photos, "--model", broken), ("info", broken)):
        result = vlv(*command)
        assert result.code == 1
        assert "encoder" in result.err


# --- usage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("capton",), "capton"),
        (("caption",), "Missing argument"),
        (("caption", "--lenght", "3"), "--lenght"),
        (("train", "quick-stage1"), "--run-dir"),
        (("reconstruct", "a.png"), "--output"),
    ],
)
def test_wrong_usage(vlv: Vlv, arguments: tuple[str, ...], message: str) -> None:
    result = vlv(*arguments)
    assert result.code == 1
    assert message in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("command", ["caption", "reconstruct", "generate", "embed", "mix", "info"])
def test_help(vlv: Vlv, command: str) -> None:
    result = vlv(command, "--help")
    assert result.code == 0
    assert "Usage" in result.out


# --- tables with names of their own ----------------------------------------------------------------


@pytest.mark.slow
def test_columns_of_other_names(vlv: Vlv, tiny_folder: Path, tmp_path: Path) -> None:
    """A table whose columns have other names gives what the image gives by itself."""
    photo, table = write_image(tmp_path / "a.png"), tmp_path / "a.parquet"
    row = {"id": "a", "photo": photo.read_bytes(), "said": "a red cube", "caption": "no"}
    parquet.write_table(pyarrow.Table.from_pylist([row]), table)
    assert "names an image" in vlv("caption", table, "--dry-run").err
    named, model = ("--image-column", "photo"), ("--model", tiny_folder)
    for command in (("caption",), ("reconstruct", "-o", tmp_path / "r", "--steps", 1)):
        from_table = vlv(*command, table, *named, *model)
        assert from_table.code == 0, from_table.err
    assert vlv("caption", table, *named, *model).out == vlv("caption", photo, *model).out
    embeddings = []
    for number, words in enumerate(((table, *named), (photo,))):
        file = tmp_path / f"{number}.safetensors"
        assert vlv("embed", *words, *model, "-o", file).code == 0
        embeddings += load_file(file).values()
    assert torch.equal(*embeddings)
    look = tmp_path / "look.md"
    look.write_text("Known as {caption}.")
    teacher = ("--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--prompt", f"@{look}")
    args = ("data", "caption", table, "-o", tmp_path / "o", *named, *teacher, "--dry-run")
    shown = vlv(*args, "--caption-column", "said")
    assert "Known as a red cube." in shown.out + shown.err
