import contextlib
import io
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from tests.data import files
from vlv.data.images import (
    ImageLimits,
    center_crop_resize,
    load_image,
    to_pil,
    to_tensor,
)
from vlv.errors import ImageError


def pixels(data: bytes) -> np.ndarray:
    image = load_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# Orientation


@pytest.mark.parametrize("tag", range(9))
@pytest.mark.parametrize("size", [(48, 32), (32, 48)], ids=["landscape", "portrait"])
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
    ids=["png", "jpeg", "webp", "tiff", "tiff-lzw"],
)
def test_every_exif_orientation_comes_out_upright(tag, size, format, options):
    upright = files.quadrants(*size)
    loaded = pixels(files.rotated(upright, tag, format, **options))
    expected = np.asarray(upright).astype(int)
    assert loaded.shape == expected.shape
    assert np.abs(loaded - expected).mean() < 4  # JPEG blurs the edges between the quarters


def test_an_orientation_that_does_not_exist_is_ignored():
    assert load_image(files.rotated(files.quadrants(), 9, "PNG")).size == (48, 32)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_lose_the_image():
    data = files.encode(files.quadrants(), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert pixels(data).shape == (32, 48, 3)


# Transparency lies over white

CLEAR_RED = (255, 0, 0, 0)


def half_clear(mode: str) -> Image.Image:
    image = Image.new("RGBA", (8, 4), (0, 0, 200, 255))
    image.paste(CLEAR_RED, (0, 0, 4, 4))
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_alpha_is_laid_over_white(format):
    options = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "AVIF": {"quality": 100}}[format]
    loaded = pixels(files.encode(half_clear("RGBA"), format, **options))
    np.testing.assert_allclose(loaded[:, 0], 255, atol=2)
    np.testing.assert_allclose(loaded[:, 7], [[0, 0, 200]] * 4, atol=3)


def test_half_transparent_is_mixed_with_white():
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    np.testing.assert_allclose(pixels(files.encode(image, "PNG")), 127, atol=1)


def test_grey_with_alpha():
    loaded = pixels(files.encode(half_clear("LA"), "PNG"))
    assert (loaded[:, 0] == 255).all()
    assert (loaded[:, 7] < 60).all()


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"], ids=["one colour", "table"])
def test_palette_with_transparency(transparency):
    image = Image.new("P", (8, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 200])
    image.paste(0, (0, 0, 4, 4))
    loaded = pixels(files.encode(image, "PNG", transparency=transparency))
    assert (loaded[:, 0] == 255).all()
    assert (loaded[:, 7] == [0, 0, 200]).all()


def test_palette_without_transparency():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 10, 20, 200])
    assert (pixels(files.encode(image, "PNG")) == [10, 20, 200]).all()


@pytest.mark.parametrize(
    ("mode", "clear", "solid"),
    [("L", 40, 90), ("RGB", (255, 0, 0), (0, 0, 200)), ("1", 0, 1)],
)
def test_one_colour_declared_transparent(mode, clear, solid):
    image = Image.new(mode, (8, 4), solid)
    image.paste(clear, (0, 0, 4, 4))
    loaded = pixels(files.encode(image, "PNG", transparency=clear))
    assert (loaded[:, 0] == 255).all()
    expected = np.asarray(Image.new(mode, (1, 1), solid).convert("RGB"))
    assert (loaded[:, 7] == expected[0]).all()


def test_one_colour_declared_transparent_in_16_bit_files():
    grey = np.full((4, 8), 300, np.uint16)
    grey[:, 4:] = 40000
    loaded = pixels(files.png_16_bit(grey, (300).to_bytes(2, "big")))
    assert (loaded[:, 0] == 255).all()
    assert (loaded[:, 7] == round(40000 / 257)).all()
    color = np.zeros((4, 8, 3), np.uint16)
    color[:, :4] = (65535, 300, 0)
    color[:, 4:] = (0, 0, 51400)
    loaded = pixels(files.png_16_bit(color, color[0, 0].astype(">u2").tobytes()))
    assert (loaded[:, 0] == 255).all()
    assert (loaded[:, 7] == [0, 0, 200]).all()


# Depth and colour spaces


def test_16_bit_grey_is_scaled_not_clipped():
    gradient = np.tile(np.linspace(0, 65535, 256).round().astype(np.uint16), (16, 1))
    expected = np.tile(np.arange(256)[:, None], (1, 3))
    assert (pixels(files.png_16_bit(gradient))[0] == expected).all()
    assert (pixels(files.encode(Image.fromarray(gradient), "TIFF"))[0] == expected).all()


def test_16_bit_colour_is_scaled_not_clipped():
    gradient = np.tile((np.arange(256) * 257).astype(np.uint16)[:, None], (16, 1, 3))
    assert (pixels(files.png_16_bit(gradient))[0, :, 0] == np.arange(256)).all()


def test_float_and_32_bit_grey():
    unit = np.tile(np.linspace(0, 1, 256, dtype=np.float32), (16, 1))
    expected = np.arange(256)
    assert (pixels(files.encode(Image.fromarray(unit), "TIFF"))[0, :, 1] == expected).all()
    wide = np.tile((np.arange(256) * 1000 - 7).astype(np.int32), (16, 1))
    assert (pixels(files.encode(Image.fromarray(wide), "TIFF"))[0, :, 1] == expected).all()
    short = np.tile((np.arange(256) * 257).astype(np.int32), (16, 1))
    assert (pixels(files.encode(Image.fromarray(short), "TIFF"))[0, :, 1] == expected).all()


def test_numbers_that_are_none():
    nothing = np.full((4, 4), np.nan, np.float32)
    with pytest.raises(ImageError, match="no finite number"):
        load_image(files.encode(Image.fromarray(nothing), "TIFF"))
    nothing[0] = [0, 1, np.inf, -np.inf]
    assert pixels(files.encode(Image.fromarray(nothing), "TIFF"))[0, :, 0].tolist() == [
        0,
        255,
        255,
        0,
    ]


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format):
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255)]
    image = Image.new("CMYK", (80, 16))
    for i, ink in enumerate(inks):
        image.paste(ink, (16 * i, 0, 16 * i + 16, 16))
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
    loaded = pixels(files.encode(image, format, **options))[8, 8::16]
    expected = [[255, 255, 255], [0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]
    np.testing.assert_allclose(loaded, expected, atol=4)


def test_lab_and_ycbcr():
    lab = Image.new("LAB", (4, 4), (255, 128, 128))
    np.testing.assert_allclose(pixels(files.encode(lab, "TIFF")), 255, atol=2)
    ycbcr = files.quadrants().convert("YCbCr")
    expected = np.asarray(files.quadrants())
    np.testing.assert_allclose(pixels(files.encode(ycbcr, "TIFF")), expected, atol=3)


def test_black_and_white():
    image = Image.new("1", (8, 4), 1)
    assert (pixels(files.encode(image, "PNG")) == 255).all()


def test_an_embedded_profile_is_converted_to_srgb():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    data = files.encode(red, "PNG", icc_profile=files.swapping_profile())
    np.testing.assert_allclose(pixels(data)[0, 0], [0, 0, 255], atol=3)


def test_a_profile_applies_below_transparency():
    image = Image.new("RGBA", (8, 4), (255, 0, 0, 255))
    image.paste((255, 0, 0, 0), (0, 0, 4, 4))
    loaded = pixels(files.encode(image, "PNG", icc_profile=files.swapping_profile()))
    assert (loaded[:, 0] == 255).all()
    np.testing.assert_allclose(loaded[0, 7], [0, 0, 255], atol=3)


def test_an_srgb_profile_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = files.encode(files.quadrants(), "PNG", icc_profile=profile)
    np.testing.assert_allclose(pixels(data), np.asarray(files.quadrants()), atol=1)


@pytest.mark.parametrize("mode", ["RGB", "L"], ids=["damaged", "of another colour space"])
def test_a_useless_profile_is_ignored(mode):
    profile = b"no profile" if mode == "RGB" else files.swapping_profile()
    image = files.quadrants().convert(mode)
    data = files.encode(image, "PNG", icc_profile=profile)
    assert (pixels(data) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = files.encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (pixels(data) == [255, 0, 0]).all()


# What is refused


def test_sources(tmp_path):
    data = files.encode(files.quadrants(), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    expected = np.asarray(files.quadrants())
    for source in (path, str(path), data, io.BytesIO(data)):
        assert (np.asarray(load_image(source)) == expected).all()


def check_refused(source, match, **options):
    with pytest.raises(ImageError, match=match) as caught:
        load_image(source, **options)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_files(tmp_path):
    check_refused(tmp_path / "no.png", r"no\.png: there is no such file")
    check_refused(tmp_path, "cannot be read")
    (tmp_path / "empty.png").touch()
    check_refused(tmp_path / "empty.png", r"empty\.png: the file is empty")
    check_refused(b"", "image: the file is empty")
    check_refused(io.BytesIO(b""), "image: the file is empty")


@pytest.mark.parametrize(
    "data",
    [b"not an image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"%!PS-Adobe-3.0"],
)
def test_other_formats(data):
    check_refused(data, "this is no image of a format", name="photo")


@pytest.mark.parametrize("format", ["PPM", "TGA", "ICO", "SGI"])
def test_formats_of_pillow_that_are_not_allowed(format):
    check_refused(files.encode(files.quadrants(), format), "this is no image of a format")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_truncated_files(format, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "torn"
    path.write_bytes(files.encode(Image.fromarray(noise), format)[: 64 * 64 // 2])
    check_refused(path, "torn: ")


def test_limits():
    data = files.encode(files.quadrants(), "PNG")
    check_refused(data, "limit of 10 bytes", limits=ImageLimits(max_bytes=10))
    check_refused(io.BytesIO(data), "limit of 10 bytes", limits=ImageLimits(max_bytes=10))
    check_refused(
        data, "48 x 32 exceeds the limit of 1000 pix", limits=ImageLimits(max_pixels=1000)
    )
    check_refused(data, "48 x 32 exceeds the limit of 40 a side", limits=ImageLimits(max_side=40))
    check_refused(data, "more elongated than 1.2:1", limits=ImageLimits(max_ratio=1.2))
    assert load_image(data, limits=ImageLimits(max_bytes=len(data))).size == (48, 32)


def grey_png(width: int, height: int, num_rows: int) -> bytes:
    return files.raw_png(width, height, 8, 0, bytes(width + 1) * num_rows)


@pytest.mark.parametrize(
    ("width", "height", "num_rows"),
    [(1, 20_000, 20_000), (1, 200_000, 200_000), (1, 4_000, 4_000), (9_000, 9_000, 10)],
)
def test_bombs_are_refused_quickly_in_little_memory(width, height, num_rows):
    data = grey_png(width, height, num_rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    check_refused(data, f"{width} x {height}")
    assert time.process_time() - start < 0.1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [12_000, 40_000])
def test_sizes_that_pillow_itself_warns_of(side):
    check_refused(grey_png(side, side, 1), "image: ")


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_warning_turned_error_is_still_an_image_error():
    check_refused(grey_png(12_000, 12_000, 1), "decompression bomb")


ENCODED = {
    format: files.encode(files.quadrants(), format)
    for format in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
}


@settings(max_examples=100, deadline=None)
@given(
    format=st.sampled_from(sorted(ENCODED)),
    damage=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(1, 4000),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_an_rgb_image_or_an_image_error(format, damage, cut):
    data = bytearray(ENCODED[format][:cut])
    for place, value in damage:
        data[place % len(data)] = value
    with contextlib.suppress(ImageError):
        assert load_image(bytes(data)).mode == "RGB"


# Crop and tensors


def test_the_centre_square_is_cut_before_resizing():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("lime", (100, 0, 200, 100))
    small = center_crop_resize(image, 32)
    assert small.size == (32, 32)
    assert (np.asarray(small) == [0, 255, 0]).all()


def test_an_elongated_image_costs_little():
    image = Image.new("RGB", (1, 20_000), "red")
    start = time.process_time()
    assert center_crop_resize(image, 384).size == (384, 384)
    assert time.process_time() - start < 0.1


def test_the_wanted_size_is_left_alone():
    image = files.quadrants(32, 32)
    assert center_crop_resize(image, 32) is image


def test_resizing_is_antialiased():
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(center_crop_resize(Image.fromarray(stripes), 16)).astype(int)
    np.testing.assert_allclose(small[:, 2:-2], 127, atol=3)


def test_to_tensor_and_back():
    image = files.quadrants()
    tensor = to_tensor(image)
    assert tensor.shape == (3, 32, 48)
    assert tensor.dtype == torch.uint8
    assert tensor.is_contiguous()
    assert (np.asarray(to_pil(tensor)) == np.asarray(image)).all()
    assert (np.asarray(to_pil(tensor.float() / 255)) == np.asarray(image)).all()


def test_to_pil_rounds_and_clamps():
    values = torch.tensor([-0.5, 0.4999 / 255, 0.5001 / 255, 1.5]).expand(3, 1, 4)
    assert np.asarray(to_pil(values))[0, :, 0].tolist() == [0, 0, 1, 255]


def test_to_pil_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\(1, 4, 4\)"):
        to_pil(torch.zeros(1, 4, 4))


def test_the_name_in_messages(tmp_path: Path):
    check_refused(b"x", "^shard/7: ", name="shard/7")
