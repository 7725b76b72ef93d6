"""What does a step cost with more queries, images or caption tokens, and what do two processes gain over one?

    python benchmarks/scaling.py --json benchmarks/results/scaling-cpu.json --plot docs/images/scaling.png

Middle-size random weights. Two processes have one thread each and half the batch each, one process has both; they exchange
gradients over gloo, as under `torchrun`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from contest import Contest, Row, write

from models import SIZES, Models, make_batch, make_models
from training import Ours, seed
from vlv.config import LoopConfig, Stage1Config, Stage2Config
from vlv.training.distributed import join_world
from vlv.training.optim import trainable_parameters
from vlv.training.passes import Passes, rows_of
from vlv.training.stages import Stage1, Stage2
from vlv.training.weights import set_train_mode

QUERIES = (16, 32, 48, 77)
BATCHES = (2, 4, 8)
TOKENS = (60, 120, 227)


def stage1_seconds(
    models: Models, repeats: int, *, queries: int = 77, batch: int = 8
) -> list[float]:
    """Seconds of a stage-1 step with cached latents, so that what grows is seen."""
    own = copy.deepcopy(models)
    own.encoder.queries = torch.nn.Parameter(own.encoder.queries[:, :queries].clone())
    rows = rows_of(_batch(models), slice(batch))
    with torch.no_grad():
        posterior = own.decoder.posterior(rows["pixels"])
    rows |= {"latents_mean": posterior.mean, "latents_std": posterior.std}
    return _times(Ours(Stage1(own.encoder, own.decoder, Stage1Config()), "fp32"), rows, repeats)


def stage2_seconds(models: Models, repeats: int, tokens: int) -> list[float]:
    """Seconds of a stage-2 step with captions of so many tokens on average."""
    own = copy.deepcopy(models)
    own.decoder.unet = own.decoder.vae = None
    objective = Stage2(own.encoder, own.decoder, own.caption_decoder, Stage2Config())
    return _times(Ours(objective, "fp32"), _batch(models, tokens), repeats)


def _batch(models: Models, mean_tokens: int = 227) -> dict[str, Any]:
    return make_batch(SIZES["mid"], models.caption_decoder.tokenizer, mean_tokens=mean_tokens)


def _times(ours: Ours, batch: dict[str, Any], repeats: int) -> list[float]:
    ours.step(batch, seed())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        ours.step(batch, seed())
        found.append(time.perf_counter() - start)
    return found


# --- processes -------------------------------------------------------------------------------------


def processes_seconds(processes: int, repeats: int) -> list[float]:
    """Seconds of the gradient of one global batch of stage 1 in so many processes."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), str(Path(__file__))),
        *("--worker", str(repeats)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{processes} processes failed: {done.stderr.strip()[-500:]}")
    found: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def work(repeats: int) -> None:
    """One process's share; the first one prints the seconds."""
    world = join_world()
    models = make_models("mid")
    whole = _batch(models)
    size = SIZES["mid"].batch_size // world.num_ranks
    objective = Stage1(models.encoder, models.decoder, Stage1Config())
    set_train_mode(objective.module)
    loop = LoopConfig(steps=9, batch_size=size)
    passes = Passes(objective, world, loop, trainable_parameters(objective.module))
    mine = passes.counted(rows_of(whole, slice(world.rank * size, (world.rank + 1) * size)))
    found = []
    for step in range(repeats + 2):  # the first shows what is used, the second spreads it
        start = time.perf_counter()
        passes.gradients([mine], step)
        found.append(time.perf_counter() - start)
        objective.module.zero_grad()
    if world.rank == 0:
        print(json.dumps(found[2:]))


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
        axis.plot(x, [statistics.median(row.seconds) for row in each.rows], marker="o")
        axis.set(title=each.title, xlabel=each.rows[0].name.split(maxsplit=1)[1], ylim=(0, None))
        axis.set_xticks(x)
    axes[0].set_ylabel("seconds per step")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Time, print, draw, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw them into this file")
    parser.add_argument("--worker", type=int, metavar="REPEATS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker)
        return
    models, n = make_models("mid"), options.repeats
    contests = [
        contest(
            "stage 1 and queries",
            "a step of 8 images, latents cached",
            {f"{q} queries": stage1_seconds(models, n, queries=q) for q in QUERIES},
        ),
        contest(
            "stage 1 and images",
            "a step, latents cached",
            {f"{b} images": stage1_seconds(models, n, batch=b) for b in BATCHES},
        ),
        contest(
            "stage 2 and captions",
            "a step of 8 images",
            {f"{t} tokens per caption": stage2_seconds(models, n, t) for t in TOKENS},
        ),
        contest(
            "stage 1 and processes",
            "forward and backward pass of 8 images",
            {f"{p} processes": processes_seconds(p, n) for p in (1, 2)},
        ),
    ]
    for each in contests:
        print(each)
    if options.plot is not None:
        plot(contests, options.plot)
    if options.json is not None:
        write(options.json, "mid", contests)


if __name__ == "__main__":
    main()
