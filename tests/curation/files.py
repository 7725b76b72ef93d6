"""Small collections of images for the tests."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data.files import encode
from vlv.curation.engine import LocalEngine
from vlv.curation.job import ShardJob
from vlv.curation.summary import Summary
from vlv.curation.tables import read_table


def scene(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A picture of soft random blobs: unlike the others, and alike itself at any size."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def jpeg(seed: int, size: tuple[int, int] = (96, 80), quality: int = 90) -> bytes:
    return encode(scene(seed, size), "JPEG", quality=quality)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shard(
    path: Path,
    seeds: Sequence[int],
    size: tuple[int, int] = (96, 80),
    meta: Mapping[str, Any] | None = None,
) -> Path:
    """A shard with image, caption and metadata for every seed."""
    members = []
    for seed in seeds:
        members += [
            (f"{seed:06d}.jpg", jpeg(seed, size)),
            (f"{seed:06d}.txt", f"a caption of {seed}".encode()),
            (
                f"{seed:06d}.json",
                json.dumps({"pwatermark": 0.1, "seed": seed, **(meta or {})}).encode(),
            ),
        ]
    return write_tar(path, members)


def write_folder(folder: Path, seeds: Sequence[int], size: tuple[int, int] = (96, 80)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (folder / f"{seed:03d}.jpg").write_bytes(jpeg(seed, size))
        (folder / f"{seed:03d}.txt").write_text(f"a caption of {seed}")
    return folder


def run(job: ShardJob, workers: int = 1) -> Summary:
    with LocalEngine(workers) as engine:
        return job.run(engine)


def index_of(folder: Path) -> list[dict[str, Any]]:
    return read_table(folder / "index.parquet")


def dropped_of(folder: Path) -> dict[str, str]:
    """Id to reason."""
    return {row["id"]: row["reason"] for row in read_table(folder / "dropped.parquet")}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
