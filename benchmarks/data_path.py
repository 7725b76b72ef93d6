"""How fast do images come off the disk? Each form of a data set, with 0, 1 and 2 threads, beside a plain loop.

    python benchmarks/data_path.py
    python benchmarks/data_path.py --num 2000 --side 512 --size 384 --json data_path.json

The plain loop does what the VLV authors' code does: it opens, crops and prepares image by image, in the process that trains.
Every figure is the median of the repeats, in images per second; the ratio is that to the plain loop.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from vlv.data.batches import BatchLoader
from vlv.data.framing import frame
from vlv.data.records import TarShardWriter, find_records
from vlv.data.streaming import StreamLoader
from vlv.data.streams import list_shards

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
THREADS = (0, 1, 2)


def main() -> None:
    """Write the same pictures in every form, read them, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=400, help="pictures")
    parser.add_argument("--side", type=int, default=512, help="of the stored JPEG files")
    parser.add_argument("--size", type=int, default=384, help="of the squares that come out")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.num, options.side, options.size)
        figures = measure(Path(folder), options)
    base = figures["plain loop"]
    print("| form | images/s | ratio |\n|---|---|---|")
    for name, value in figures.items():
        print(f"| {name} | {value:.1f} | {value / base:.2f} |")
    if options.json:
        options.json.write_text(
            json.dumps({"settings": vars(options) | {"json": None}, "images_per_second": figures})
        )


def write(folder: Path, num: int, side: int, size: int) -> None:
    """A folder of JPEG files, two tars, and Parquet of files and of bare pixels."""
    draws = np.random.default_rng(0)
    files, raw = [], []
    (folder / "folder").mkdir()
    for number in range(num):
        rough = draws.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
        image = Image.fromarray(rough).resize((side, side), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
        raw.append(np.asarray(frame(image, size)).transpose(2, 0, 1).tobytes())
        (folder / "folder" / f"{number:06d}.jpg").write_bytes(buffer.getvalue())
    with TarShardWriter(folder / "tar", per_shard=-(-num // 2)) as writer:
        for number, data in enumerate(files):
            writer.write(f"{number:06d}", {"jpg": data})
    for name, column in (("encoded", files), ("raw", raw)):
        (folder / name).mkdir()
        pq.write_table(pa.table({"image": column}), folder / name / "a.parquet", row_group_size=64)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Name to images per second."""
    found = {"plain loop": rate(lambda: plain(folder / "folder", options), options)}
    for threads in THREADS:
        for name in ("folder", "tar"):
            found[f"{name}, {threads} threads"] = rate(
                lambda n=name, t=threads: listed(folder / n, t, options), options
            )
        for name in ("tar", "encoded", "raw"):
            label = {"tar": "tar", "encoded": "Parquet of files", "raw": "Parquet of pixels"}[name]
            found[f"{label}, streamed, {threads} threads"] = rate(
                lambda n=name, t=threads: streamed(folder / n, t, options), options
            )
    return found


def rate(make: Callable[[], Iterator[Any]], options: argparse.Namespace) -> float:
    """Images per second of one epoch: the median of the repeats."""
    values = []
    for _ in range(options.repeats):
        start, count = time.perf_counter(), 0
        for batch in make():
            count += len(batch)
        values.append(count / (time.perf_counter() - start))
    return statistics.median(values)


def plain(folder: Path, options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Image by image, normalised in floats, as the authors' training loop does."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    batch: list[torch.Tensor] = []
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            square = frame(image.convert("RGB"), options.size, "resize")
        batch.append(
            (torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255 - mean) / std
        )
        if len(batch) == options.batch_size:
            yield torch.stack(batch)
            batch = []


def listed(folder: Path, threads: int, options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """An epoch of the loader of listed records."""
    records = find_records([folder])
    with BatchLoader(
        records, options.batch_size, options.size, seed=0, num_workers=threads, keep_in_memory=False
    ) as loader:
        for _ in range(len(records) // options.batch_size):
            yield next(loader)["pixels"]


def streamed(folder: Path, threads: int, options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """An epoch of the loader of streams."""
    with StreamLoader(
        list_shards([folder]),
        options.batch_size,
        options.size,
        seed=0,
        buffer=64,
        num_workers=threads,
    ) as loader:
        for _ in range(options.num // options.batch_size):
            yield next(loader)["pixels"]


if __name__ == "__main__":
    main()
