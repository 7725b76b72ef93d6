"""One image file in, the right pixels out: limits, orientation, colour, crop.

`Image.convert("RGB")` alone gives wrong pixels for rotated, transparent, 16-bit and
colour-managed files; `load_image` is the one place where each of these is put right.
Shapes: H W pixels, S side of a square image.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from vlv.data.foreign import open_regular, printable, read_up_to
from vlv.data.image_costs import (
    BAND_PIXELS,
    MAX_PIECES,
    MAX_STRIPS,
    Pieces,
    count_strips,
    limit_cost,
    orientation,
    predicted_memory,
)
from vlv.errors import ImageError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITE = (255, 255, 255)
_NUMPY = b"\x93NUMPY"
_SMALLEST_SIDE = 16  # of bare pixels: a few bytes of rubbish are no image
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")
_FROM_16_BIT = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)  # rounded, not cut

ImageSource = str | os.PathLike[str] | bytes | BinaryIO
T = TypeVar("T")


@dataclass(frozen=True)
class ImageLimits:
    """What is refused, before a single pixel is decoded."""

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_side: int = 16_384
    max_ratio: float = 20.0  # long side over short side
    max_memory: int = 300 * 2**20  # bytes of the pixels while they are decoded, with all copies
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


DEFAULT_LIMITS = ImageLimits()


def load_image(
    source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS, name: str | None = None
) -> Image.Image:
    """Open one image as upright RGB of 8 bits.

    EXIF orientation is applied; transparency is laid over white; 16 bits are scaled to 8, not
    clipped; an embedded colour profile is converted to sRGB (a broken profile is ignored); of an
    animation the first frame is taken.

    Args:
        source: A path, the bytes of a file, or a binary file object.
        limits: Checked against file and header before decoding.
        name: What to call the image in an error; the path by default.

    Returns:
        A PIL image of mode RGB.

    Raises:
        ImageError: The file is missing, empty, damaged, of another format or over a limit.
    """
    name = name or _name_of(source)
    data = _read(source, limits, name)
    image = _open(data, limits, name)
    reason = _guard(name, lambda: limit_cost(image, data, limits.max_memory))
    if reason is not None:
        raise ImageError(f"{name}: {reason}")
    return _guard(name, lambda: _upright_rgb(image, limits.max_memory, data))


def load_bytes(
    data: bytes,
    *,
    raw_pixels: bool = False,
    limits: ImageLimits = DEFAULT_LIMITS,
    name: str = "image",
) -> Image.Image:
    """An image from the bytes of a file or, out of a table, of an array that `numpy.save` wrote, or of bare pixels.

    Args:
        data: The bytes.
        raw_pixels: They come from a table, which may hold an array instead of a file, or pixels, as the VLV authors' set
            does: uint8 (3,S,S), recognised by their number, 3 S S, unless a known format begins like that.
        limits: What is refused.
        name: What to call the image in an error.

    Returns:
        A PIL image of mode RGB.

    Raises:
        ImageError: The bytes are damaged, of another format or over a limit.
    """
    if not raw_pixels or not _is_pixels(data):
        return load_image(data, limits=limits, name=name)
    if data.startswith(_NUMPY):
        return _from_array(data, limits, name)
    side = math.isqrt(len(data) // 3)
    _check_size(side, side, limits, name)
    return _from_pixels(np.frombuffer(data, np.uint8).reshape(3, side, side))


def pixels_as_png(data: bytes, name: str) -> bytes:
    """The bytes of an image file: those given, or a PNG where they are an array or bare pixels; see `load_bytes`.

    Raises:
        ImageError: The array is damaged or over a limit.
    """
    if not _is_pixels(data):
        return data
    buffer = BytesIO()
    load_bytes(data, raw_pixels=True, name=name).save(buffer, "PNG")
    return buffer.getvalue()


def _is_pixels(data: bytes) -> bool:
    side = math.isqrt(len(data) // 3)
    is_square = side >= _SMALLEST_SIDE and 3 * side * side == len(data)
    return data.startswith(_NUMPY) or (is_square and not _is_file(data))


def _is_file(data: bytes) -> bool:
    """Whether bytes begin like an image file of a format that `load_image` reads."""
    return (
        data.startswith(_SIGNATURES)
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
        or data[4:8] == b"ftyp"
        or (data[:2] == b"BM" and int.from_bytes(data[2:6], "little") == len(data))
    )


def _from_array(data: bytes, limits: ImageLimits, name: str) -> Image.Image:
    """Pixels of a `.npy`; its header is believed only as far as bytes follow it."""
    stream = BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0
        read = read if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(stream)
    except Exception as error:  # of a parser of Python literals
        raise ImageError(f"{name}: the array cannot be read ({_first_line(error)})") from error
    if dtype.hasobject:
        raise ImageError(f"{name}: the array cannot be read (it holds Python objects)")
    if dtype != np.uint8 or len(shape) != 3 or 3 not in (shape[0], shape[2]):
        raise ImageError(
            f"{name}: the array is {dtype} {shape}, but pixels are uint8 (3, H, W) or (H, W, 3)"
        )
    height, width = shape[1:] if shape[0] == 3 else shape[:2]
    _check_size(width, height, limits, name)
    values = np.frombuffer(data, np.uint8, offset=stream.tell())
    if values.size != 3 * height * width:
        raise ImageError(f"{name}: the array cannot be read (it is not as long as it says)")
    pixels = values.reshape(shape, order="F" if by_columns else "C")
    return _from_pixels(pixels if shape[0] == 3 else pixels.transpose(2, 0, 1))


def _from_pixels(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image file says of itself before a pixel is decoded.

    Attributes:
        width: In pixels, once the image is upright.
        height: In pixels, once the image is upright.
        format: Of the file, such as JPEG.
    """

    width: int
    height: int
    format: str


def read_header(
    data: bytes, *, limits: ImageLimits = DEFAULT_LIMITS, name: str = "image"
) -> ImageHeader:
    """Size and format of an image file; nothing is decoded.

    Raises:
        ImageError: The file is empty, of another format or over a limit.
    """
    image = _open(_read(data, limits, name), limits, name)
    width, height = image.size
    if orientation(image) >= 5:  # stored on its side
        width, height = height, width
    return ImageHeader(width, height, str(image.format))


def to_rgb(
    image: Image.Image, *, limits: ImageLimits = DEFAULT_LIMITS, name: str = "image"
) -> Image.Image:
    """An image that Pillow has already opened, as upright RGB of 8 bits; see `load_image`.

    Raises:
        ImageError: It is damaged or over a limit.
    """
    _check_size(*image.size, limits, name)
    return _guard(name, lambda: _upright_rgb(image, limits.max_memory))


def center_crop_resize(image: Image.Image, size: int) -> Image.Image:
    """Cut the largest centred square and resize it to `size` by `size` pixels (bicubic, antialias).

    The square is cut first: resizing a 1 x 20000 image by its short side would need gigabytes.
    (`resize(box=...)` is no substitute, for its kernel reads beyond the box.)
    """
    width, height = image.size
    if (width, height) == (size, size):
        return image
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """The pixels of an RGB image as uint8 (3,H,W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """Pixels (3,H,W), float in [0,1] (clamped, rounded) or uint8, as an RGB image.

    Raises:
        ValueError: The tensor has another shape.
    """
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"pixels must have the shape (3,H,W), not {tuple(pixels.shape)}")
    pixels = pixels.detach().cpu()
    if pixels.dtype != torch.uint8:
        pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _open(data: bytes, limits: ImageLimits, name: str) -> Image.Image:
    """Read the header of a file."""
    if count_strips(data) > MAX_STRIPS:
        raise ImageError(f"{name}: it has more than {MAX_STRIPS} strips or tiles")
    file = Pieces(data) if len(data) > MAX_PIECES else BytesIO(data)  # which reads faster
    image = _guard(name, lambda: Image.open(file, formats=limits.formats))
    _check_size(*image.size, limits, name)
    return image


def _guard(name: str, action: Callable[[], T]) -> T:
    """Run a step of Pillow; whatever it finds wrong becomes an ImageError that names the image."""
    try:
        return action()
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: this is no image of a format that vlv reads") from error
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        raise ImageError(f"{name}: cannot be decoded ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _name_of(source: ImageSource) -> str:
    if isinstance(source, str | os.PathLike):
        return printable(source)
    return "image" if isinstance(source, bytes) else str(getattr(source, "name", "image"))


def _read(source: ImageSource, limits: ImageLimits, name: str) -> bytes:
    try:
        data = _read_up_to(source, limits.max_bytes + 1)
    except FileNotFoundError as error:
        raise ImageError(f"{name}: there is no such file") from error
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror or error})") from error
    if not data:
        raise ImageError(f"{name}: the file is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise ImageError(f"{name}: the file is larger than the limit of {limits.max_bytes} bytes")
    return data


def _read_up_to(source: ImageSource, count: int) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | os.PathLike):
        with open_regular(source) as file:
            return read_up_to(file, count, os.fstat(file.fileno()).st_size)
    return source.read(count) or b""


def _check_size(width: int, height: int, limits: ImageLimits, name: str) -> None:
    short, long = sorted((width, height))
    if short < 1:
        raise ImageError(f"{name}: {width} x {height} holds no pixels")
    if long > limits.max_side:
        raise ImageError(
            f"{name}: {width} x {height} exceeds the limit of {limits.max_side} a side"
        )
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} exceeds the limit of {limits.max_pixels} pixels"
        )
    if long > limits.max_ratio * short:
        raise ImageError(
            f"{name}: {width} x {height} is more elongated than {limits.max_ratio:g}:1; crop it first"
        )


def _upright_rgb(image: Image.Image, max_memory: int, data: bytes = b"") -> Image.Image:
    """An image as upright RGB; with the data of its file it is nobody else's, and may be changed."""
    image.load()
    turn = orientation(image)
    profile = image.info.get("icc_profile")
    upright = image
    if image.mode != "RGB" or profile or "transparency" in image.info:
        upright = _flattened(image, profile, data)
        upright.info = {}  # Pillow copies the tags, and whoever meets them next would apply them again
    if turn in _UPRIGHT:
        if predicted_memory(image, is_turned=True) > max_memory:  # PNG has said it just now
            raise ImageError(f"its pixels need more than the limit of {max_memory} bytes")
        upright = upright.transpose(_UPRIGHT[turn])
        upright.info = {}
    return upright


def _flattened(image: Image.Image, profile: bytes | None, data: bytes) -> Image.Image:
    """An image of any mode as opaque sRGB of 8 bits."""
    is_16_bit_png = _is_16_bit_png(data)
    grey = image.mode in ("I", "F") or image.mode.startswith("I;")
    levels = _levels(image) if grey else None
    if image.width * image.height <= BAND_PIXELS:
        return _flat_rgb(_eight_bit(image, levels, is_16_bit_png=is_16_bit_png), profile)
    in_place = bool(data) and image.mode == "RGB"
    flat = image if in_place else Image.new("RGB", image.size)
    for top, band in _bands(image):
        eight_bit = _eight_bit(band, levels, is_16_bit_png=is_16_bit_png)
        flat.paste(_flat_rgb(eight_bit, profile), (0, top))
    return flat


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Some rows of an image at a time, with the number of the first."""
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(image.height, top + rows)))


def _is_16_bit_png(data: bytes) -> bool:
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10"  # bit depth in the header


def _eight_bit(
    image: Image.Image, levels: tuple[float, float] | None, *, is_16_bit_png: bool
) -> Image.Image:
    """Scale grey images of 16 or 32 bits, which have levels, to 8, and the transparent colour of 16-bit files too."""
    transparent = image.info.get("transparency")
    if levels is not None:
        values = np.asarray(image)
        grey = Image.fromarray(_scaled_grey(values, *levels))
        if isinstance(transparent, int):
            alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
            grey = Image.merge("LA", (grey, alpha))
        return grey
    if is_16_bit_png and isinstance(
        transparent, tuple
    ):  # Pillow keeps the high bytes of the pixels
        image.info["transparency"] = tuple(int(value) >> 8 for value in transparent)
    return image


def _levels(image: Image.Image) -> tuple[float, float]:
    """The least and the greatest finite number of a grey image."""
    low, high = math.inf, -math.inf
    for _, band in _bands(image):
        values = np.asarray(band)
        finite = values[np.isfinite(values)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if low > high:
        raise ValueError("it holds no finite number")
    return low, high


def _scaled_grey(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Grey values (H,W) of any type, of an image with these levels, as uint8.

    16-bit range stays 16-bit range; floats in [0,1] are times 255; everything else has no
    declared white, so that its own range is stretched.
    """
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        return np.asarray(_FROM_16_BIT[values], np.uint8)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    scaled = (values - low) * (255 / max(high - low, 1e-300))
    return np.asarray(np.rint(scaled), np.uint8)


def _flat_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours to sRGB first, then transparency over white."""
    alpha = None
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    image = _to_srgb(image, profile)
    if alpha is None:
        return image
    flat = Image.new("RGB", image.size, _WHITE)
    flat.paste(image, mask=alpha)
    return flat


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image of any 8-bit mode as RGB in sRGB; without a profile sRGB is assumed."""
    if image.mode == "LAB":
        return ImageCms.applyTransform(image, _lab_transform())  # type: ignore[return-value]
    if image.mode == "1":
        image = image.convert("L")
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if profile:
        try:
            converted = ImageCms.applyTransform(image, _icc_transform(profile, image.mode))
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            logger.debug("colour profile ignored: %s", error)
        else:
            return converted if converted is not None else image
    return image.convert("RGB")


@lru_cache(maxsize=32)
def _icc_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


@lru_cache(maxsize=1)
def _lab_transform() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
