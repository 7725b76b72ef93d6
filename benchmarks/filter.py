"""How fast `vlv data filter` is on this machine, and how much memory it takes.

    python benchmarks/filter.py --json benchmarks/results/filter-cpu.json --plot docs/images/filter.png

Works through tar shards of 384-pixel JPEGs from reading to the written shards: once with rules that need only
headers, once with full decoding and all checks of pixels; with one and with two worker processes. Starting the workers is
timed apart. Peak memory is that of the command with all its processes (proportional set size), over 10,000
and 100,000 images. About six minutes on two cores; --images makes it shorter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from PIL import Image

from vlv.curation.engine import LocalEngine
from vlv.curation.job import ShardJob
from vlv.curation.settings import FilterConfig

SIDE = 384
PER_SHARD = 1000
MEMORY_LIMIT_MB = 1000
GOALS = {"headers": 150, "decode": 40}

RULES = {
    "headers": FilterConfig(
        short_side_above=256, aspect_min=0.5, aspect_max=2, min_bytes_per_pixel=0.01
    ),
    "decode": FilterConfig(
        short_side_above=256,
        aspect_min=0.5,
        aspect_max=2,
        min_bytes_per_pixel=0.01,
        decode=True,
        min_contrast=4,
        exact_duplicates=True,
        near_duplicates=4,
    ),
}
SWITCHED_ON = ["short_side_above=256", "watermark=null", "min_bytes_per_pixel=0.01"]


def make_jpeg(rng: np.random.Generator) -> bytes:
    """A picture with large shapes and fine grain, about as large as a photograph of this size."""
    small, middle = (
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).resize(
            (SIDE, SIDE), Image.Resampling.BICUBIC
        )
        for side in (6, 48)
    )
    buffer = BytesIO()
    Image.blend(small, middle, 0.35).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_shards(folder: Path, jpegs: list[bytes], count: int) -> Path:
    """`count` images in shards of 1000; the shards of all but the first names are links to one file."""
    folder.mkdir()
    first = folder / "00000.tar"
    with tarfile.open(first, "w") as tar:
        for number in range(min(PER_SHARD, count)):
            data = jpegs[number % len(jpegs)]
            for suffix, content in (("jpg", data), ("txt", b"a caption of an image")):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
    for number in range(1, count // PER_SHARD):
        os.link(first, folder / f"{number:05d}.tar")
    return folder


def write_distinct(folder: Path, jpegs: list[bytes], count: int) -> Path:
    """`count` images whose bytes all differ: a comment is appended to each."""
    folder.mkdir()
    for start in range(0, count, PER_SHARD):
        with tarfile.open(folder / f"{start // PER_SHARD:05d}.tar", "w") as tar:
            for number in range(start, min(start + PER_SHARD, count)):
                data = jpegs[number % len(jpegs)] + str(number).encode()
                info = tarfile.TarInfo(f"{number:06d}.jpg")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    return folder


def nothing(task: int) -> int:
    """What starts the workers and does no more."""
    time.sleep(0.2)
    return task


def time_job(inputs: Path, output: Path, rules: FilterConfig, workers: int) -> dict[str, float]:
    """Seconds of the job, and of starting its workers."""
    with LocalEngine(workers) as engine:
        start = time.perf_counter()
        if workers > 1:
            list(engine.run(nothing, range(2 * workers)))
        ready = time.perf_counter()
        summary = ShardJob([str(inputs)], output, config=rules).run(engine)
        seconds = time.perf_counter() - ready
    shutil.rmtree(output)
    return {
        "seconds": seconds,
        "start_seconds": ready - start,
        "images": summary.images,
        "kept": summary.kept,
    }


def measure_speed(
    folder: Path, jpegs: list[bytes], counts: dict[str, int], repeats: int
) -> list[dict[str, Any]]:
    """Images per second by rules and number of workers."""
    speeds = []
    warm = write_distinct(folder / "warm", jpegs, 10)
    time_job(warm, folder / "out", RULES["decode"], 1)  # imports what is drawn and written with
    for name, rules in RULES.items():
        inputs = write_distinct(folder / name, jpegs, counts[name])
        for workers in (1, 2):
            runs = [time_job(inputs, folder / "out", rules, workers) for _ in range(repeats)]
            rates = [run["images"] / run["seconds"] for run in runs]
            speeds.append(
                {
                    "rules": name,
                    "workers": workers,
                    "images": counts[name],
                    "kept": runs[0]["kept"],
                    "images_per_second": median(rates),
                    "repeats": rates,
                    "start_seconds": median(run["start_seconds"] for run in runs),
                }
            )
            print(f"{name:<8} {workers} workers: {median(rates):8.0f} images/s", flush=True)
        shutil.rmtree(inputs)
    return speeds


def measure_memory(folder: Path, jpegs: list[bytes], count: int) -> dict[str, Any]:
    """Largest memory of the command and its processes while it filters `count` images."""
    inputs = write_shards(folder / "in", jpegs, count)
    command = [
        sys.executable,
        "-m",
        "vlv",
        "data",
        "filter",
        str(inputs),
        "-o",
        str(folder / "out"),
    ]
    command += ["--config", "paper", "--workers", "2"]
    for change in SWITCHED_ON:
        command += ["--set", change]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.1)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"the filter ended with exit code {process.returncode}")
    shutil.rmtree(folder / "out")
    shutil.rmtree(inputs)
    print(f"{count} images: at most {peak / 1e6:.0f} MB, {seconds:.0f} s", flush=True)
    return {"images": count, "peak_mb": peak / 1e6, "seconds": seconds, "workers": 2}


def tree_memory(pid: int) -> int:
    """Bytes of a process and all below it; what they share is counted once."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
        except psutil.Error:
            continue
    return total


def draw(figures: dict[str, Any], path: Path) -> None:
    """Speed and memory as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [
        f"{s['rules']}, {s['workers']} worker{'s' * (s['workers'] > 1)}" for s in figures["speeds"]
    ]
    values = [speed["images_per_second"] for speed in figures["speeds"]]
    bars = left.barh(names, values, color=["#4a6fa5", "#4a6fa5", "#3b7d4f", "#3b7d4f"])
    left.bar_label(bars, [f"{value:,.0f}" for value in values], padding=4)
    goals = [GOALS[speed["rules"]] * speed["workers"] for speed in figures["speeds"]]
    left.scatter(goals, names, marker="|", s=500, color="#c8553d", label="goal", zorder=3)
    left.invert_yaxis()
    left.set(xlabel="images per second (384-pixel JPEGs, to written shards)", xscale="log")
    left.set_xlim(10, max(values) * 3)
    left.legend(frameon=False, loc="lower right", markerscale=0.5)
    memory = figures["memory"]
    bars = right.bar(
        [f"{run['images']:,}" for run in memory],
        [run["peak_mb"] for run in memory],
        0.5,
        color="#4a6fa5",
    )
    right.bar_label(bars, [f"{run['peak_mb']:.0f} MB" for run in memory])
    right.axhline(MEMORY_LIMIT_MB, color="#c8553d", linestyle="--", label="goal: below 1 GB")
    right.set(xlabel="images", ylabel="peak memory, all processes (MB)", ylim=(0, 1300))
    right.legend(frameon=False, loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=20_000, help="of the timing of headers")
    parser.add_argument("--decode-images", type=int, default=6000, help="of the timing of decoding")
    parser.add_argument("--memory-images", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw them into this PNG")
    parser.add_argument("--folder", type=Path, help="where 3 GB of images may lie for a while")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    jpegs = [make_jpeg(rng) for _ in range(PER_SHARD)]
    counts = {"headers": arguments.images, "decode": arguments.decode_images}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        speeds = measure_speed(Path(name), jpegs, counts, arguments.repeats)
        memory = [measure_memory(Path(name), jpegs, count) for count in arguments.memory_images]
    figures = {
        "command": "python benchmarks/filter.py",
        "machine": {"processors": os.cpu_count(), "architecture": platform.machine()},
        "jpeg": {"side": SIDE, "mean_bytes": float(np.mean([len(data) for data in jpegs]))},
        "speeds": speeds,
        "speedup": {
            name: median(
                s["images_per_second"] for s in speeds if (s["rules"], s["workers"]) == (name, 2)
            )
            / median(
                s["images_per_second"] for s in speeds if (s["rules"], s["workers"]) == (name, 1)
            )
            for name in RULES
        },
        "goals": {**GOALS, "memory_mb": MEMORY_LIMIT_MB, "speedup": 1.7},
        "memory": memory,
    }
    print(json.dumps(figures["speedup"]))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        draw(figures, arguments.plot)


if __name__ == "__main__":
    main()
