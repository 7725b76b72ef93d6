"""What would cost minutes or gigabytes is refused at once; good images of every kind come out as before."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.data.files import encode, swapping_profile
from tests.memory import IS_MEASURED, peak_growth
from vlv.data import images
from vlv.data.image_costs import count_strips, predicted_memory
from vlv.data.images import ImageLimits, load_bytes, load_image, to_rgb
from vlv.errors import ImageError

SMALL = Image.effect_noise((40, 32), 90).convert("RGB")


def with_scans(more: int, size: tuple[int, int] = (1000, 1000)) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encode(Image.new("RGB", size, (10, 200, 30)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * more + data[-2:]


def in_colours_apart(more: int) -> bytes:
    """A sequential JPEG that calls itself one of three colours, and has the scan of one again and again."""
    data = bytearray(encode(Image.new("L", (200, 200), 120), "JPEG"))
    scan = bytes(data[data.rindex(b"\xff\xda") : -2])
    frame = data.index(b"\xff\xc0")
    three = b"\xff\xc0\x00\x11" + data[frame + 4 : frame + 9] + b"\x03"
    three += b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    return bytes(data[:frame]) + three + bytes(data[frame + 13 : -2]) + scan * more + b"\xff\xd9"


def png_of_chunks(count: int) -> bytes:
    data, name = encode(SMALL, "PNG"), b"teSt"
    chunk = struct.pack(">I", 0) + name + struct.pack(">I", zlib.crc32(name))
    return data[:33] + chunk * count + data[33:]


def tiff_of_tiles(count: int) -> bytes:
    tags = [(256, 16000), (257, 3000), (258, 8), (259, 1), (262, 1), (277, 1), (322, 16), (323, 16)]
    head = b"II*\0" + struct.pack("<IH", 8, 9)
    head += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head += struct.pack("<HHII", 324, 4, count, 8 + 2 + 9 * 12 + 4) + bytes(4)
    return head + bytes(4 * count)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_scans(2000), "it has 2010 scans, above the limit of 100"),
        (lambda: in_colours_apart(2000), "it has 2001 scans, above the limit of 100"),
        (lambda: with_scans(30, (7000, 7000)), "it has 40 scans, above the limit of 20"),
        (lambda: png_of_chunks(200_000), "more than 100000 pieces"),
        (lambda: jpeg_of(b"\xff\xe1\0\2" * 500_000), "more than 100000 pieces"),
        (lambda: jpeg_of(b"\xff" * 5_000_000), "more than 100000 pieces"),
        (lambda: tiff_of_tiles(500_000), "more than 65536 strips or tiles"),
    ],
    ids=["scans", "colours", "large scans", "chunks", "segments", "padding", "tiles"],
)
def test_what_would_take_long_is_refused_at_once(make: Callable[[], bytes], message: str) -> None:
    data = make()
    began = time.process_time()
    with pytest.raises(ImageError, match=message):
        load_image(data)
    assert time.process_time() - began < 1


def jpeg_of(more: bytes) -> bytes:
    data = encode(SMALL, "JPEG")
    return data[:2] + more + data[2:]


def test_ordinary_progressive_files_are_read() -> None:
    assert load_image(with_scans(0)).size == (1000, 1000)
    assert load_image(with_scans(50)).size == (1000, 1000)


def test_the_memory_of_the_pixels_is_limited() -> None:
    small = ImageLimits(max_memory=40 * 32 * 16)
    for format in ("PNG", "JPEG", "WEBP"):
        assert load_image(encode(SMALL, format), limits=small).size == (40, 32)
    clear = encode(half_clear(), "WEBP")
    with pytest.raises(ImageError, match="its pixels need 56320 bytes, above the limit of 20480"):
        load_image(clear, limits=small)
    turned = {"exif": turned_by(6)}
    lower = ImageLimits(max_memory=40 * 32 * 7)
    for options in ({"format": "PNG"}, {"format": "TIFF", "compression": "raw"}):
        data = encode(SMALL, **options)
        assert load_image(data, limits=lower).size == (40, 32)
        with pytest.raises(ImageError, match="its pixels need"):
            load_image(encode(SMALL, **options, **turned), limits=lower)


def turned_by(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif.tobytes()


def test_a_jpeg_file_that_would_need_too_much_memory_is_decoded_smaller() -> None:
    image = Image.linear_gradient("L").convert("RGB").resize((600, 400))
    data = encode(image, "JPEG", quality=95)
    expected = np.asarray(image.reduce(2), np.int16)
    small = ImageLimits(max_memory=600 * 400)  # a byte of four: half the sides
    half = load_image(data, limits=small)
    assert half.size == (300, 200)
    assert np.abs(np.asarray(half) - expected).max() <= 3
    quarter = ImageLimits(max_memory=600 * 400 // 4)
    assert load_image(data, limits=quarter).size == (150, 100)
    turned = encode(image, "JPEG", exif=turned_by(6))
    assert load_image(turned, limits=small).size == (100, 150)
    with pytest.raises(ImageError, match="its pixels need 960000 bytes, above the limit of 59999"):
        load_image(data, limits=ImageLimits(max_memory=quarter.max_memory - 1))
    gradual = encode(image, "JPEG", progressive=True)  # what its scans hold stays: 3 bytes a pixel
    with pytest.raises(ImageError, match="its pixels need 1680000 bytes"):
        load_image(gradual, limits=small)
    more = ImageLimits(max_memory=4 * small.max_memory)
    assert load_image(data, limits=more).size == (600, 400)
    assert load_image(gradual, limits=more).size == (300, 200)


@pytest.mark.slow
def test_ordinary_large_photographs_are_read_as_they_are() -> None:
    """Of 24 megapixels, with a profile and lying on their side."""
    image = Image.new("RGB", (6000, 4000), (10, 200, 30))
    data = encode(image, "JPEG", exif=turned_by(8), icc_profile=srgb())
    assert load_image(data).size == (4000, 6000)


def test_an_image_of_somebody_else_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "BAND_PIXELS", 40 * 5)
    image = SMALL.copy()
    image.info["icc_profile"] = swapping_profile()
    made = to_rgb(image)
    assert np.array_equal(np.asarray(image), np.asarray(SMALL))
    assert np.abs(np.asarray(made)[..., 0].astype(int) - np.asarray(SMALL)[..., 2]).mean() < 30
    assert "icc_profile" in image.info
    assert not made.info


def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sequential": ("RGB", {"format": "JPEG"}),
    "progressive": ("RGB", {"format": "JPEG", "progressive": True, "subsampling": 0}),
    "progressive, four inks": ("CMYK", {"format": "JPEG", "progressive": True}),
    "profile": ("RGB", {"format": "JPEG", "icc_profile": srgb(), "exif": turned_by(3)}),
    "alpha": ("RGBA", {"format": "PNG"}),
    "one clear colour": ("RGB", {"format": "PNG", "transparency": (1, 2, 3)}),
    "grey": ("L", {"format": "PNG"}),
    "16 bits": ("I;16", {"format": "PNG"}),
    "WebP": ("RGB", {"format": "WEBP", "method": 0}),
    "WebP with alpha": ("RGBA", {"format": "WEBP", "method": 0, "lossless": True, "quality": 0}),
    "GIF": ("P", {"format": "GIF"}),
    "floats": ("F", {"format": "TIFF", "compression": "tiff_lzw", "strip_size": 2**30}),
    "LAB": ("LAB", {"format": "TIFF", "compression": "tiff_lzw"}),
    "bits": ("1", {"format": "TIFF", "compression": "group4"}),
}


@pytest.mark.skipif(not IS_MEASURED, reason="the system does not say how much memory is used")
@pytest.mark.parametrize("form", FORMS)
def test_decoding_takes_no_more_memory_than_was_predicted(form: str) -> None:
    mode, options = FORMS[form]
    data = encode(Image.new(mode, (3000, 2000)), **options)
    with Image.open(io.BytesIO(data)) as image:
        predicted = predicted_memory(image, is_turned=True)
        predicted += 6_000_000 * 2 * len(image.getbands()) * ("progressive" in image.info)
    with peak_growth() as growth:
        assert sorted(load_image(data).size) == [2000, 3000]
    assert growth[0] < predicted + 8 * 2**20


def test_a_tile_larger_than_its_image_counts_whole() -> None:
    width = 12_000  # 432 MB in one of 2 MB
    tags = [
        (256, 16), (257, 16), (258, 8), (259, 8), (262, 2), (277, 3), (322, width), (323, width),
        (324, 134), (325, 0),
    ]  # fmt: skip
    packer = zlib.compressobj(1)
    tile = b"".join(packer.compress(bytes(3 * width)) for _ in range(width)) + packer.flush()
    tags[-1] = (325, len(tile))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    head += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4)
    assert len(head) == 134
    with pytest.raises(ImageError, match="its pixels need 432001024 bytes, above the limit"):
        load_image(head + tile)


@pytest.mark.parametrize("big_endian", [False, True])
def test_strips_are_counted_by_the_directory(big_endian: bool) -> None:
    order, mark = (">", b"MM\0*") if big_endian else ("<", b"II*\0")
    entry = struct.pack(f"{order}HHII", 273, 4, 70_000, 0)
    data = mark + struct.pack(f"{order}IH", 8, 1) + entry
    assert count_strips(data) == 70_000
    assert count_strips(data[:12]) == count_strips(b"") == count_strips(encode(SMALL, "PNG")) == 0


def half_clear() -> Image.Image:
    image = SMALL.convert("RGBA")
    image.putalpha(Image.effect_noise((40, 32), 90))
    return image


def variants() -> dict[str, bytes]:
    numbers = np.random.default_rng(0).random((32, 40))
    whole = (numbers * 60000).astype(np.uint16)
    clear = half_clear()
    return {
        "palette": encode(SMALL.quantize(16), "PNG", transparency=3),
        "alpha": encode(clear, "PNG"),
        "grey alpha": encode(clear.convert("LA"), "PNG"),
        "float": encode(Image.fromarray(numbers.astype(np.float32) * 7 - 3), "TIFF"),
        "whole": encode(Image.fromarray((numbers * 90000).astype(np.int32)), "TIFF"),
        "16 bits": encode(Image.fromarray(whole), "PNG", transparency=int(whole[3, 3])),
        "CMYK": encode(SMALL.convert("CMYK"), "TIFF"),
        "LAB": encode(SMALL.convert("LAB"), "TIFF"),
        "black and white": encode(SMALL.convert("1"), "PNG"),
        "profile": encode(SMALL, "PNG", icc_profile=srgb()),
        "GIF": encode(SMALL.quantize(16), "GIF", transparency=2),
    }


@pytest.mark.parametrize("name", variants())
def test_large_images_are_made_rgb_by_bands_with_the_same_pixels(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = variants()[name]
    whole = np.asarray(load_image(data))
    monkeypatch.setattr(images, "BAND_PIXELS", 40 * 5)
    assert np.array_equal(np.asarray(load_image(data)), whole)


def test_arrays_have_the_limits_of_files() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((3, 20, 500), np.uint8))
    with pytest.raises(ImageError, match="500 x 20 is more elongated than 20:1"):
        load_bytes(buffer.getvalue(), raw_pixels=True)
    with pytest.raises(ImageError, match="exceeds the limit of 300 a side"):
        load_bytes(buffer.getvalue(), raw_pixels=True, limits=ImageLimits(max_side=300))
    with pytest.raises(ImageError, match="exceeds the limit of 9000 pixels"):
        load_bytes(buffer.getvalue(), raw_pixels=True, limits=ImageLimits(max_pixels=9000))
