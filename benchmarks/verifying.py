"""What does `vlv caption --verify` cost, in units of plain captions?

    OMP_NUM_THREADS=1 python benchmarks/verifying.py --num 32

Rendered scenes are captioned plainly and verified in turn, by the processor's time and not the clock's, so that other programs on
the machine do not count; encoding the images is part of both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlv.models.pipeline import VLVPipeline
from vlv.models.verification import Verification
from vlv.toyworld.render import render
from vlv.toyworld.scene import sample_scene
from vlv.training.journal import versions

if TYPE_CHECKING:
    from PIL import Image

CASES = {
    "verify 8": Verification(8),
    "verify 8, enough 1": Verification(8, enough=1.0),
    "verify 16": Verification(16),
}


def main() -> None:
    """Print one row for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vlv-tiny")
    parser.add_argument("--num", type=int, default=32, help="scenes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pipe = VLVPipeline.from_pretrained(options.model)
    images = [render(sample_scene(0, i, "val"), pipe.image_size).image for i in range(options.num)]
    ways = {"greedy": None, **CASES}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(options.repeats + 1):
        for name, way in ways.items():
            taken = _seconds(pipe, images, way, options.max_new_tokens)
            if repeat:  # the first warms up
                seconds[name].append(taken)
    rows = []
    for name, found in seconds.items():
        each = statistics.median(found) / options.num
        cost = each / (statistics.median(seconds["greedy"]) / options.num)
        rows.append({"way": name, "seconds_per_image": each, "cost": cost})
        print(f"{name:<20} {1000 * each:7.1f} ms an image, {cost:5.2f} x greedy", flush=True)
    if options.json:
        found = {"model": options.model, "num": options.num, "rows": rows, "versions": versions()}
        options.json.write_text(json.dumps(found, indent=1))


def _seconds(
    pipe: VLVPipeline, images: list[Image.Image], way: Verification | None, tokens: int | None
) -> float:
    begun = time.process_time()
    pipe.caption(images, verify=way, batch_size=16, max_new_tokens=tokens)
    return time.process_time() - begun


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
