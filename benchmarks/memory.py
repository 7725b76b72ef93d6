"""How much memory do the presets' models need? The table of docs/real-models.md, as Markdown.

    python benchmarks/memory.py
    python benchmarks/memory.py paper-0.5b --batch-size 4

Predicted from shapes alone: nothing is downloaded, and no GPU is asked. A preset takes half a minute.
"""

from __future__ import annotations

import argparse
from itertools import chain

from vlv.config import load_config, load_models, model_preset_names
from vlv.jobs.plans import STAGES, describe_preset, plan_training, plan_uses

HALF = "loop.precision=bf16"


def main() -> None:
    """Print one row for each use of each preset, in gigabytes (1e9 bytes)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="*", default=model_preset_names())
    parser.add_argument("--batch-size", type=int)
    options = parser.parse_args()
    size = options.batch_size
    changes = [HALF, *([] if size is None else [f"loop.batch_size={size}"])]
    print(
        "| models | use | batch | precision | weights | gradients | optimiser | activations | peak |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.presets:
        preset = load_models(name)
        download = sum(part.download for part in describe_preset(preset)) / 1e9
        half = plan_training(preset, "stage 1", load_config(STAGES["stage 1"], changes))
        for use in chain(plan_uses(preset, batch_size=size), [half]):
            found = use.footprint
            parts = (found.weights, found.gradients, found.optimizer, found.activations, found.peak)
            row = " | ".join(f"{part / 1e9:.1f}" for part in parts)
            print(
                f"| {name} ({download:.1f} GB) | {use.name} | {use.batch_size} | {use.precision} | {row} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
