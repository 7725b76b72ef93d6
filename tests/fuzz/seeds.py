"""Small good files of every format that vlv reads; cases are made from them."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save

from tests import tiny
from tests.data.files import encode, noise_png, swapping_profile

TEXT = 'a red cube "left" of a blue sphere\u2028, è'


def images() -> list[bytes]:
    """Every format, with what makes decoders take other ways: palettes, depths, profiles, scans, frames, tiles."""
    colours = Image.effect_noise((48, 33), 90).convert("RGB")
    clear = colours.convert("RGBA")
    clear.putalpha(Image.effect_noise((48, 33), 60))
    palette = colours.quantize(16)
    numbers = np.random.default_rng(0).random((33, 48))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    frames = {"save_all": True, "append_images": [palette.rotate(90), palette.rotate(180)]}
    found = [
        encode(colours, "JPEG", icc_profile=swapping_profile(), exif=exif.tobytes()),
        encode(colours, "JPEG", progressive=True, subsampling=0),
        encode(colours.convert("CMYK"), "JPEG"),
        encode(colours.convert("L"), "JPEG", optimize=True, restart_marker_blocks=2),
        encode(colours, "PNG", icc_profile=swapping_profile(), exif=exif.tobytes()),
        encode(clear, "PNG"),
        encode(palette, "PNG", transparency=3),
        encode(Image.fromarray((numbers * 65535).astype(np.uint16)), "PNG"),
        encode(colours.convert("1"), "PNG"),
        encode(palette, "GIF", transparency=2, **frames),
        encode(colours, "WEBP", quality=50, exif=exif.tobytes()),
        encode(clear, "WEBP", lossless=True),
        encode(clear, "WEBP", save_all=True, append_images=[clear.rotate(180)]),
        encode(colours, "BMP"),
        encode(palette, "BMP"),
        encode(colours, "AVIF", speed=10),
    ]
    for image, compression in (
        (colours, "raw"),
        (colours, "tiff_lzw"),
        (colours, "tiff_adobe_deflate"),
        (colours, "jpeg"),
        (clear, "packbits"),
        (colours.convert("1"), "group4"),
        (Image.fromarray((numbers * 9 - 3).astype(np.float32)), "raw"),
        (Image.fromarray((numbers * 90000).astype(np.int32)), "tiff_adobe_deflate"),
        (colours.convert("LAB"), "raw"),
    ):
        found.append(encode(image, "TIFF", compression=compression, exif=exif))
    return found


def arrays() -> list[bytes]:
    """Pixels as tables hold them."""
    found = [np.arange(3 * 20 * 20, dtype=np.uint32).astype(np.uint8).tobytes()]
    for array in (np.zeros((3, 20, 24), np.uint8), np.zeros((20, 24, 3), np.uint8).copy("F")):
        buffer = io.BytesIO()
        np.save(buffer, array)
        found.append(buffer.getvalue())
    return [*found, noise_png(0, 16)]


def tars() -> list[bytes]:
    """Of samples with texts, in three formats."""
    meta = json.dumps({"caption": TEXT, "width": 16, "height": 16, "sha256": "0" * 64}).encode()
    found = []
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
            for number, key in enumerate(("a", "b/c", "ü" if format != 0 else "u", "d" * 120)):
                for suffix, data in (
                    ("png", noise_png(number, 4)),
                    ("txt", TEXT.encode()),
                    ("json", meta),
                ):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    if len(info.name) <= 100 or format != tarfile.USTAR_FORMAT:
                        tar.addfile(info, io.BytesIO(data))
        found.append(buffer.getvalue())
    return found


def parquets() -> list[bytes]:
    """Of plain cells, of structs, of pixels, and of paths."""
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": noise_png(0, 4), "path": None}, {"bytes": None, "path": "x.png"}, None]
    tables = [
        {"jpg": [noise_png(n, 4) for n in range(3)], "caption": [TEXT, None, "x"], "n": [1, 2, 3]},
        {"image": pa.array(cells, struct), "id": ["a", "b", "c"], "s": [0.5, float("nan"), 2.0]},
        {"image": [bytes(768)] * 3, "text": ["a", "b", "c"], "l": [[1], [], None]},
        {"file_name": ["x.png", "../x.png", "/etc/hostname"], "url": ["u"] * 3},
    ]
    found = []
    for number, columns in enumerate(tables):
        buffer = io.BytesIO()
        options = {"compression": ["snappy", "zstd", "none", "gzip"][number], "row_group_size": 2}
        pq.write_table(pa.table(columns), buffer, **options)
        found.append(buffer.getvalue())
    return found


def lines() -> list[bytes]:
    """JSON lines, as people and as vlv write them."""
    rows = [
        {"file_name": "x.png", "caption": TEXT, "width": 16, "nested": {"a": [1, 2.5, None, True]}},
        {"path": "../x.png", "text": "\ud83d", "id": 7, "score": 1e300},
        {"id": "a/b", "file_name": "x.png", "caption": None, "error": "bad", "url": "http://h/"},
    ]
    return ["".join(json.dumps(row) + "\n" for row in rows).encode()]


def sheets() -> list[bytes]:
    """CSV tables, as vlv writes them."""
    return [b'id,file_name,caption,n\na,x.png,"one, ""two""\n three",5\nb,y.png,,\n']


def embeddings() -> list[bytes]:
    """Files of `vlv embed`."""
    about = {"images": json.dumps([{"id": "a", "file_name": "a.png"}, {"id": "b"}]), "model": "m"}
    return [save({"z": torch.zeros(2, 3, 4)}, metadata=about), save({"z": torch.zeros(2, 3, 4)})]


def answers() -> list[bytes]:
    """Bodies of an endpoint's responses."""
    message = {"role": "assistant", "content": TEXT}
    body = {
        "id": "x",
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20},
    }
    parts: Mapping[str, object] = {
        "choices": [{"message": {"content": [{"type": "text", "text": "a"}], "refusal": "no"}}]
    }
    return [json.dumps(body).encode(), json.dumps(parts).encode(), b'{"error": {"message": "no"}}']


def indexes() -> list[bytes]:
    """`model_index.json` of a model folder."""
    index = {
        "_class_name": "VLVPipeline",
        "encoder": ["vlv", "VLVEncoder"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": {"repo": "some/where", "subfolder": "unet", "revision": None},
        "image_size": 64,
        "framing": "cut",
    }
    return [json.dumps(index).encode()]


@cache
def model_folder() -> Path:
    """A miniature model on the disk, removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="vlv-fuzz-model-")
    _KEPT.append(folder)
    tiny.make_pipeline().save_pretrained(folder.name)
    return Path(folder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def model_files() -> list[Path]:
    """The files of its components that are not large."""
    found = sorted(
        path
        for path in model_folder().rglob("*")
        if path.is_file() and path.parent != model_folder()
    )
    return [path for path in found if path.suffix in {".json", ".safetensors", ".txt"}]


def components() -> list[bytes]:
    """Each file of a model folder, after a byte that says which one it is."""
    return [bytes([number]) + path.read_bytes() for number, path in enumerate(model_files())]


def adapters() -> list[bytes]:
    """`vlv.json`, `adapter_config.json` and `adapter_model.safetensors` of an adapter."""
    base = {"name": "a", "weights": {"encoder": "0" * 64}}
    about = {"format": 1, "base": base, "caption_decoder": {"styles": {"short": "Short:"}}}
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8.0, "target_modules": ["q_proj"]}
    weights = save({"base_model.model.q_proj.lora_A.weight": torch.ones(4, 2)})
    return [json.dumps(about).encode(), json.dumps(settings).encode(), weights]


def states() -> list[bytes]:
    """`manifest.json` and `state.json` of a checkpoint."""
    digest = {
        "bytes": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    return [
        json.dumps({"format": 1, "files": {"state.json": digest}}).encode(),
        json.dumps({"step": 3, "loader": {"epoch": 1}, "best": [1, 0.5]}).encode(),
    ]
