"""How much faster is a training step than the straightforward way?

    python benchmarks/training.py --json benchmarks/results/training-cpu.json
    python benchmarks/training.py --stage 2 --json benchmarks/results/training-cpu.json    # keeps stage 1 of that file

It takes about three minutes for each stage on two quiet cores.

Both train the same weights on the same images and captions, in turn, in one run; see `benchmarks/baseline.py` for what the
straightforward way is, and `benchmarks/ours.py` for ours. A step is forward and backward pass, clipping and AdamW, of one
global batch; two processes exchange their gradients within it and have half of the threads each. Where the arithmetic is the
same (fp32), the first losses have to agree to 1e-4, or the script stops.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from baseline import BaselineStage1, BaselineStage2
from contest import Contest, compete, others, write
from ours import STEP, Ours, Processes, Variant, make_batches, make_ours

from models import SIZES, Models, make_models
from vlv.models.draws import RowGenerator
from vlv.training.passes import num_rows

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


def stage(
    models: Models, base: Variant, repeats: int, clock: Callable[[], float], *, processes: bool
) -> Contest:
    """All ways to make a step of a stage; stage 1 also with its caches."""
    title = f"stage {base.stage}"
    batches = make_batches(models, base)
    batch = batches["live"]
    rows = num_rows(batch)
    baseline = (BaselineStage1 if base.stage == 1 else BaselineStage2)(models)
    actions: dict[str, Callable[[], object]] = {
        "baseline": lambda: baseline.step(batch, draws(base.seed, rows))
    }
    losses = {"baseline": baseline.step(batch, draws(base.seed, rows))}
    with ExitStack() as stack:
        for name, variant, spread in variants(base, processes=processes):
            who: Ours | Processes = Processes(variant) if spread else make_ours(models, variant)
            if isinstance(who, Processes):
                stack.callback(who.close)
            losses[name] = float(who.step("live"))
            if variant.precision == "fp32":
                agree(f"{title}, {name}", losses[name], losses["baseline"])
            for kind in batches:
                actions[name + CACHES[kind]] = lambda who=who, kind=kind: who.step(kind)
        notes = {name: {"loss": loss} for name, loss in losses.items()}
        unit = f"a step of {rows} images"
        return compete(title, unit, actions, repeats=repeats, clock=clock, notes=notes)


def variants(base: Variant, *, processes: bool) -> list[tuple[str, Variant, bool]]:
    """Name, variant, and whether it is spread over two processes."""
    half = replace(base, precision="bf16")
    found = [("fp32", base, False), ("bf16", half, False)]
    if base.stage == 2:
        found = [
            ("fp32, bucketed", replace(base, batching="bucketed"), False),
            ("fp32, packed", replace(base, batching="packed"), False),
            ("bf16, packed", replace(half, batching="packed"), False),
        ]
    if processes:
        found += [("fp32, two processes", base, True), ("bf16, two processes", half, True)]
    return found


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
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count processor time, on a machine that others use; without the processes",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    clock = time.process_time if options.cpu_time else time.perf_counter
    numbers = (1, 2) if options.stage is None else (options.stage,)
    titles = [f"stage {number}" for number in numbers]
    kept = [] if options.json is None else others(options.json, options.models, titles)
    models, contests = make_models(options.models), []
    for number in numbers:
        base = Variant(options.models, number, "fp32", seed=options.seed)
        contests.append(stage(models, base, options.repeats, clock, processes=not options.cpu_time))
        print(contests[-1], flush=True)
    if options.json is not None:
        write(options.json, options.models, sorted(kept + contests, key=lambda each: each.title))


if __name__ == "__main__":
    main()
