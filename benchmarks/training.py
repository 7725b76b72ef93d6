"""How much faster is a training step than the straightforward way?

    python benchmarks/training.py --json benchmarks/results/training-cpu.json
    python benchmarks/training.py --stage 2 --json benchmarks/results/training-cpu.json    # keeps stage 1 of that file

Stage 1 takes about ten minutes on two quiet cores, half of which is compilation; stage 2 takes three.

Both train the same weights on the same images and captions, in turn, in one run; see `benchmarks/baseline.py` for what the
straightforward way is, and `benchmarks/ours.py` for ours, which has processes of its own. A step is forward and backward
pass, clipping and AdamW, of one global batch; two processes exchange their gradients within it and have half of the threads
each. Where the arithmetic is the same (fp32), the first losses have to agree to 1e-4, or the script stops.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from baseline import BaselineStage1, BaselineStage2
from contest import Contest, compete, joined, others, write
from ours import STEP, Processes, Variant, make_batches

from models import SIZES, Models, make_models
from vlv.models.draws import RowGenerator
from vlv.training.microbatches import num_rows

if TYPE_CHECKING:
    from collections.abc import Callable

TOLERANCE = 1e-4
CACHES = {
    "live": "",
    "latents": ", latents cached",
    "features": ", latents and features cached",
}


def agree(name: str, found: float, expected: float) -> None:
    """Stop unless two losses are the same."""
    if abs(found - expected) > TOLERANCE:
        raise SystemExit(
            f"{name}: the loss is {found:.6f}, the baseline's {expected:.6f}: not the same work"
        )


def draws(seed: int, rows: int) -> RowGenerator:
    """The random numbers of every step."""
    return RowGenerator(seed, STEP, range(rows))


def stage(models: Models, base: Variant, repeats: int, threads: int) -> Contest:
    """All ways to make a step of a stage; stage 1 also with its caches."""
    title = f"stage {base.stage}"
    batches = make_batches(models, base)
    batch = batches["live"]
    rows, calls = num_rows(batch), SIZES[base.models].steps
    baseline = (BaselineStage1 if base.stage == 1 else BaselineStage2)(models)
    first: dict[str, Callable[[], object]] = {
        "baseline": lambda: baseline.step(batch, draws(base.seed, rows))
    }
    expected = baseline.step(batch, draws(base.seed, rows))
    notes, contests = {"baseline": {"loss": expected}}, []
    for name, variant, count in variants(base, threads):
        # Only one at a time is there beside the baseline: short memory would slow down who needs fresh pages.
        with closing(Processes(variant, count, threads // count)) as who:
            loss = who.step("live")
            notes[name] = {"loss": loss}
            if variant.precision == "fp32":
                agree(f"{title}, {name}", loss, expected)
            actions = first | {
                name + CACHES[kind]: lambda who=who, kind=kind: who.step(kind)
                for kind in batches
                if kind == "live" or variant.vae_precision == "fp32"  # caches are of the fp32 VAE
            }
            unit = f"a step of {rows} images"
            contests.append(
                compete(title, unit, actions, repeats=repeats, calls=calls, notes=notes)
            )
    return joined(contests)


def variants(base: Variant, threads: int) -> list[tuple[str, Variant, int]]:
    """Name, variant, and over how many processes it is spread: one, or one for each of two threads."""
    half = replace(base, precision="bf16")
    if base.stage == 1:
        found = {"fp32": base, "bf16": half, "bf16, VAE too": replace(half, vae_precision="bf16")}
        spread = {**found, "bf16, compiled": replace(half, compiled=True)}
    else:
        packed = {
            "fp32, packed": replace(base, batching="packed"),
            "bf16, packed": replace(half, batching="packed"),
        }
        found = {"fp32, bucketed": replace(base, batching="bucketed"), **packed}
        spread = {"fp32": base, "bf16": half}
    alone = [(name, variant, 1) for name, variant in found.items()]
    if threads == 1:
        return alone
    return alone + [(f"{name}, two processes", variant, 2) for name, variant in spread.items()]


def main() -> None:
    """Time, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", choices=sorted(SIZES), default="mid")
    parser.add_argument(
        "--stage", type=int, choices=(1, 2), help="only this one; the file keeps its other stage"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of images, captions and noise")
    parser.add_argument("--threads", type=int, help="of torch; all cores by default")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    numbers = (1, 2) if options.stage is None else (options.stage,)
    titles = [f"stage {number}" for number in numbers]
    kept = [] if options.json is None else others(options.json, options.models, titles)
    models, contests = make_models(options.models), []
    for number in numbers:
        base = Variant(options.models, number, "fp32", seed=options.seed)
        contests.append(stage(models, base, options.repeats, torch.get_num_threads()))
        print(contests[-1], flush=True)
    if options.json is not None:
        write(options.json, options.models, sorted(kept + contests, key=lambda each: each.title))


if __name__ == "__main__":
    main()
