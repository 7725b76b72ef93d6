"""How fast are whole batches resized, beside Pillow image by image?

    python benchmarks/resizing.py --threads 1
    python benchmarks/resizing.py --device cuda --batch-size 64

Both give the same levels to the bit, which is checked before they are timed, in turn, on the same images. Pillow starts
from images that it has in its own form already. Times are medians per image; a ratio below 1 is faster than Pillow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlv.models.resizing import resize
from vlv.training.journal import versions

SIZES = [(384, 768), (512, 768), (768, 384), (512, 224)]
"""From and to: what Florence-2 sees of the paper's images, of larger ones, and what smaller backbones see."""


def main() -> None:
    """Print one row for each pair of sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", nargs="*", help="such as 384:768", metavar="FROM:TO")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = [tuple(map(int, pair.split(":"))) for pair in options.sizes or []] or SIZES
    print(f"batch {options.batch_size}, {options.device}, {options.threads} threads")
    print(
        "| from | to | ours, ms per image | Pillow, ms per image | ratio |\n|---|---|---|---|---|"
    )
    rows = []
    for old, new in sizes:
        ours, pillow = compare(old, new, options.batch_size, options.device, options.repeats)
        row = {"from": old, "to": new, "ours_ms": ours, "pillow_ms": pillow}
        rows.append(row | {"ratio": ours / pillow})
        print(f"| {old} | {new} | {ours:.2f} | {pillow:.2f} | {ours / pillow:.2f} |", flush=True)
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items()}
        report = {"settings": settings, "versions": versions(), "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def compare(old: int, new: int, batch_size: int, device: str, repeats: int) -> tuple[float, float]:
    """Milliseconds per image of both, measured in turn."""
    levels = np.random.default_rng(0).integers(0, 256, (batch_size, old, old, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in levels]
    batch = torch.from_numpy(levels).permute(0, 3, 1, 2).contiguous().to(device)

    def ours() -> Tensor:
        resized = resize(batch, new, new)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return resized

    def pillow() -> list[Image.Image]:
        return [image.resize((new, new), Image.Resampling.BICUBIC) for image in images]

    expected = torch.from_numpy(np.stack([np.asarray(image) for image in pillow()]))
    if not torch.equal(ours().cpu(), expected.permute(0, 3, 1, 2)):
        raise SystemExit(f"from {old} to {new} the levels differ from Pillow's")
    times = [(_seconds(ours), _seconds(pillow)) for _ in range(repeats)]
    first, second = (
        statistics.median(side) * 1e3 / batch_size for side in zip(*times, strict=True)
    )
    return first, second


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
