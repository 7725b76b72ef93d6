"""What does a step cost with more queries, images or caption tokens, and what do two processes gain over one?

    python benchmarks/scaling.py --json benchmarks/results/scaling-cpu.json --plot docs/images/scaling.png

It takes about three minutes on two quiet cores.

Middle-size random weights. Two processes have one thread each and half the batch each, one process has both; they exchange
gradients over gloo, as under `torchrun`.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from contest import Contest, Row, write
from ours import Ours, Processes, Variant, make_batches

from models import SIZES, Models, make_batch, make_models
from vlv.config import Stage1Config, Stage2Config
from vlv.training.microbatches import rows_of
from vlv.training.stages import Stage1, Stage2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlv.training.objective import Batch

QUERIES = (16, 32, 48, 77)
BATCHES = (2, 4, 8)
TOKENS = (60, 120, 227)


def stage1_seconds(
    models: Models, whole: Batch, repeats: int, *, queries: int = 77, batch: int = 8
) -> list[float]:
    """Seconds of a stage-1 step on some of a batch, with cached latents, so that what grows is seen."""
    own = copy.deepcopy(models)
    own.encoder.queries = torch.nn.Parameter(own.encoder.queries[:, :queries].clone())
    rows = {"rows": rows_of(whole, slice(batch))}
    return _times(
        Ours(Stage1(own.encoder, own.decoder, Stage1Config()), "fp32", rows), "rows", repeats
    )


def stage2_seconds(models: Models, repeats: int, rng_seed: int, tokens: int) -> list[float]:
    """Seconds of a stage-2 step with captions of so many tokens on average."""
    own = copy.deepcopy(models)
    own.decoder.unet = own.decoder.vae = None
    objective = Stage2(own.encoder, own.decoder, own.caption_decoder, Stage2Config())
    tokenizer, sizes = models.caption_decoder.tokenizer, SIZES["mid"]
    batch = make_batch(sizes, tokenizer, mean_tokens=tokens, seed=rng_seed)
    rows = {"rows": rows_of(batch, slice(sizes.captions))}
    return _times(Ours(objective, "fp32", rows), "rows", repeats)


def _times(who: Ours | Processes, name: str, repeats: int) -> list[float]:
    who.step(name)
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        who.step(name)
        found.append(time.perf_counter() - start)
    return found


def processes_seconds(count: int, repeats: int, rng_seed: int) -> list[float]:
    """Seconds of a stage-1 step of one global batch in so many processes, which share the cores."""
    threads = max(1, (os.cpu_count() or 1) // count)
    processes = Processes(Variant("mid", 1, "fp32", seed=rng_seed), count, threads)
    try:
        processes.step("latents")  # the first shows what is used, the second spreads it
        return _times(processes, "latents", repeats)
    finally:
        processes.close()


# --- the script ------------------------------------------------------------------------------------


def contest(title: str, unit: str, seconds: dict[str, list[float]]) -> Contest:
    """Costs in units of the first one's."""
    first = statistics.median(next(iter(seconds.values())))
    return Contest(
        title, unit, [Row(name, mine, [first / s for s in mine]) for name, mine in seconds.items()]
    )


def plot(contests: list[Contest], file: Path) -> None:
    """Seconds per step against what grows."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(contests), figsize=(4 * len(contests), 3.2))
    for axis, each in zip(axes, contests, strict=True):
        x = [int(row.name.split()[0]) for row in each.rows]
        seconds = [statistics.median(row.seconds) for row in each.rows]
        axis.plot(x, seconds, marker="o")
        axis.set(title=each.title, xlabel=each.rows[0].name.split(maxsplit=1)[1])
        axis.set_ylim(0, 1.1 * max(seconds))
        axis.set_xticks(x)
    axes[0].set_ylabel("seconds per step")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def measure(repeats: int, rng_seed: int) -> Iterator[Contest]:
    """One contest for each thing that grows."""
    models = make_models("mid")
    whole = make_batches(models, Variant("mid", 1, "fp32", seed=rng_seed))["latents"]
    yield contest(
        "stage 1 and queries",
        "a step of 8 images, latents cached",
        {f"{q} queries": stage1_seconds(models, whole, repeats, queries=q) for q in QUERIES},
    )
    yield contest(
        "stage 1 and images",
        "a step, latents cached",
        {f"{b} images": stage1_seconds(models, whole, repeats, batch=b) for b in BATCHES},
    )
    yield contest(
        "stage 2 and captions",
        f"a step of {SIZES['mid'].captions} images",
        {f"{t} tokens per caption": stage2_seconds(models, repeats, rng_seed, t) for t in TOKENS},
    )
    yield contest(
        "stage 1 and processes",
        "a step of 8 images, latents cached",
        {f"{p} processes": processes_seconds(p, repeats, rng_seed) for p in (1, 2)},
    )


def main() -> None:
    """Time, print, draw, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw them into this file")
    parser.add_argument("--seed", type=int, default=0, help="of images, captions and noise")
    options = parser.parse_args()
    contests = []
    for each in measure(options.repeats, options.seed):
        contests.append(each)
        print(each, flush=True)
    if options.plot is not None:
        plot(contests, options.plot)
    if options.json is not None:
        write(options.json, "mid", contests)


if __name__ == "__main__":
    main()
