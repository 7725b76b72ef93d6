"""How fast do images come off the disk? Each form of a data set, with 0, 1 and 2 threads, beside a plain loop.

    python benchmarks/data_path.py --json benchmarks/results/data-path-cpu.json
    python benchmarks/data_path.py --num 2000 --sides 1024:384 --training benchmarks/results/training-cpu.json

The first takes about two minutes on two quiet cores.

With `--against CHECKOUT` only the opening of files is compared: this checkout's `load_image`, and that of another one, in turn:

    python benchmarks/data_path.py --against ../old

The plain loop does what the VLV authors' code does: it opens, crops and prepares image by image, in the process that trains.
Photographs of the paper's size are compared with training at middle size, whose crops are smaller, and pictures of the toy
world's size with training of the shipped miniature: at what multiple of its rate the data path alone feeds its fastest step
that reads pixels. It should be 1.5 or more.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from contest import Contest, Row, compete, note
from contest import write as write_figures
from photographs import photograph
from PIL import Image

from vlv.data.framing import frame
from vlv.data.images import load_image
from vlv.data.loader import Listed, Loader, LoaderSettings, Streamed
from vlv.data.shards import TarShardWriter
from vlv.data.source import Source, find_records

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
THREADS = (0, 1, 2)
RESULTS = Path(__file__).parent / "results"
TRAINING = [RESULTS / "training-cpu.json", RESULTS / "training-miniature-cpu.json"]


def main() -> None:
    """Write the same pictures in every form, read them, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--num", type=int, default=320, help="pictures")
    parser.add_argument(
        "--sides",
        nargs="+",
        default=["512:384", "64:64"],
        metavar="STORED:READ",
        help="pixels of the JPEG files and of the squares that come out",
    )
    parser.add_argument(
        "--training", nargs="+", type=Path, default=TRAINING, help="figures for each of --sides"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    options = parser.parse_args()
    if options.against is not None:
        for contest in compare_opening(options.against, options):
            print(contest, flush=True)
        return
    if len(options.sides) != len(options.training):
        parser.error(f"--training needs a file for each of {' '.join(options.sides)}")
    needed = [training_rates(file) for file in options.training]
    contests = []
    for sides, rates in zip(options.sides, needed, strict=True):
        contests.append(race(sides, rates, options))
        print(contests[-1], flush=True)
    if options.json is not None:
        write_figures(options.json, None, contests)


def compare_opening(checkout: Path, options: argparse.Namespace) -> Iterator[Contest]:
    """How long two checkouts take to open the same good files, in seconds of the processor."""
    spec = importlib.util.spec_from_file_location("other", checkout / "src/vlv/data/images.py")
    assert spec is not None
    assert spec.loader is not None
    other = sys.modules["other"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    for side in (64, 512, 2048):
        image, _ = photograph(np.random.default_rng(side), side)
        calls = max(2, options.num * 64 // side)
        for name, settings in (
            ("JPEG", {"quality": 90}),
            ("JPEG, progressive", {"quality": 90, "progressive": True}),
            ("PNG", {}),
            ("WEBP", {}),
        ):
            file = io.BytesIO()
            image.save(file, name.partition(",")[0], **settings)
            data = file.getvalue()
            yield compete(
                f"{name} of {side} pixels",
                "one opened",
                {
                    str(checkout): lambda data=data: other.load_image(data),
                    "this checkout": lambda data=data: load_image(data),
                },
                repeats=options.repeats,
                calls=calls,
                clock=time.process_time,
            )


def training_rates(file: Path) -> dict[str, float]:
    """Images per second of the fastest step of each stage that reads pixels.

    Raises:
        SystemExit: Training was not measured.
    """
    if not file.is_file():
        raise SystemExit(f"{file} is missing; measure first: python benchmarks/training.py")
    rates = {}
    for contest in json.loads(file.read_text(encoding="utf-8"))["contests"]:
        images = next(int(word) for word in contest["unit"].split() if word.isdigit())
        seconds = [
            statistics.median(row["seconds"])
            for row in contest["rows"]
            if "cached" not in row["name"]
        ]
        rates[contest["title"]] = images / min(seconds)
    return rates


def race(sides: str, rates: dict[str, float], options: argparse.Namespace) -> Contest:
    """All forms of one data set in turn, an epoch in each round."""
    side, size = (int(text) for text in sides.split(":"))
    images = options.num // options.batch_size * options.batch_size
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.num, side, size)
        contest = compete(
            f"files of {side} pixels to squares of {size}",
            f"{images} images",
            readers(Path(folder), size, options),
            repeats=options.repeats,
        )

    def notes(row: Row) -> dict[str, float]:
        speed = images / statistics.median(row.seconds)
        times = {f"times training, {title}": speed / rate for title, rate in rates.items()}
        return {"images/s": speed, **times}

    return note(contest, notes)


def write(folder: Path, num: int, side: int, size: int) -> None:
    """A folder of JPEG files, two tars, and Parquet of files and of bare pixels."""
    draws = np.random.default_rng(0)
    files, raw = [], []
    (folder / "folder").mkdir()
    for number in range(num):
        image, file = photograph(draws, side)
        files.append(file)
        raw.append(np.asarray(frame(image, size)).transpose(2, 0, 1).tobytes())
        (folder / "folder" / f"{number:06d}.jpg").write_bytes(file)
    with TarShardWriter(folder / "tar", per_shard=-(-num // 2)) as writer:
        for number, data in enumerate(files):
            writer.write(f"{number:06d}", {"jpg": data})
    for name, column in (("encoded", files), ("raw", raw)):
        (folder / name).mkdir()
        pq.write_table(pa.table({"image": column}), folder / name / "a.parquet", row_group_size=64)


def readers(folder: Path, size: int, options: argparse.Namespace) -> dict[str, Callable[[], int]]:
    """Names, and what reads an epoch and says how many images it was; the plain loop first."""
    found = {"plain loop": lambda: count(plain(folder / "folder", size, options))}
    for threads in THREADS:
        for name in ("folder", "tar"):
            found[f"{name}, {threads} threads"] = lambda n=name, t=threads: count(
                listed(folder / n, size, t, options)
            )
        for name in ("tar", "encoded", "raw"):
            label = {"tar": "tar", "encoded": "Parquet of files", "raw": "Parquet of pixels"}[name]
            found[f"{label}, streamed, {threads} threads"] = lambda n=name, t=threads: count(
                streamed(folder / n, size, t, options)
            )
    return found


def count(epoch: Iterator[torch.Tensor]) -> int:
    """Read to the end; how many images there were."""
    return sum(len(batch) for batch in epoch)


def plain(folder: Path, size: int, options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Image by image, normalised in floats, as the authors' training loop does."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    batch: list[torch.Tensor] = []
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            square = frame(image.convert("RGB"), size, "resize")
        batch.append(
            (torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255 - mean) / std
        )
        if len(batch) == options.batch_size:
            yield torch.stack(batch)
            batch = []


def listed(
    folder: Path, size: int, threads: int, options: argparse.Namespace
) -> Iterator[torch.Tensor]:
    """An epoch of the loader of listed records."""
    records = find_records([folder])
    settings = LoaderSettings(batch_size=options.batch_size, image_size=size, num_workers=threads)
    with Loader(Listed(records, keep_in_memory=False), settings) as loader:
        for _ in range(len(records) // options.batch_size):
            yield next(loader)["pixels"]


def streamed(
    folder: Path, size: int, threads: int, options: argparse.Namespace
) -> Iterator[torch.Tensor]:
    """An epoch of the loader of streams."""
    shards = Source([folder]).shards()
    settings = LoaderSettings(batch_size=options.batch_size, image_size=size, num_workers=threads)
    with Loader(Streamed(shards, buffer=64), settings) as loader:
        for _ in range(options.num // options.batch_size):
            yield next(loader)["pixels"]


if __name__ == "__main__":
    main()
