"""What does each trick of `loop.cpu_tricks` save of a training step on a CPU?

    OMP_NUM_THREADS=1 python benchmarks/cpu_tricks.py --models mid --repeats 5

With and without it in turn, on the same weights and batch, by the processor's time and not the clock's, so that other
programs on the machine do not count. A trick that saves less than five per cent has no place in `vlv.training.cpu`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from ours import Ours, Variant, make_ours

from models import SIZES, make_models
from vlv.training.cpu import kept_memory
from vlv.training.journal import versions

CASES = [
    ("memory", 1, "fp32"),
    ("memory", 2, "fp32"),
    ("attention", 1, "bf16"),
    ("attention", 2, "bf16"),
]
"""Trick, stage and precision; attention concerns bf16 alone."""


def main() -> None:
    """Print one row for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", choices=SIZES, default="mid")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    models, rows = make_models(options.models), []
    for trick, stage, precision in CASES:
        ours = make_ours(models, Variant(options.models, stage, precision))
        without, with_it = (
            statistics.median(times) for times in _measure(ours, trick, options.repeats)
        )
        row = {"trick": trick, "stage": stage, "precision": precision}
        rows.append(row | {"without_s": without, "with_s": with_it, "saves": 1 - with_it / without})
        print(
            f"{trick:<10} stage {stage} {precision}: {without:.2f} s without, {with_it:.2f} s with, "
            f"saves {rows[-1]['saves']:.0%}",
            flush=True,
        )
    if options.json:
        found = {"models": options.models, "rows": rows, "versions": versions()}
        options.json.write_text(json.dumps(found, indent=1))


def _measure(ours: Ours, trick: str, repeats: int) -> tuple[list[float], list[float]]:
    """Processor seconds of a step without and with the trick; the first of each warms up."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for enabled in (False, True):
            ours.training_step.on_cpu = enabled or trick == "memory"
            with kept_memory(enabled=enabled or trick == "attention"):
                ours.step("live")  # memory is kept from one step to the next
                begun = time.process_time()
                ours.step("live")
                seconds = time.process_time() - begun
            if repeat:
                times[enabled].append(seconds)
    return times


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
