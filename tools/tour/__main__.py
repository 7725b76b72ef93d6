"""Write docs/tour.md and its pictures: `python -m tools.tour`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.tour.page import TourSettings, write_tour
from vlv.models.pipeline import VLVPipeline


def main(arguments: list[str] | None = None) -> int:
    """Follow one image through a model; print the page written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vlv-tiny", help="name or folder of a model")
    parser.add_argument("--steps", type=int, default=20, help="steps of the sampler")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", "-o", type=Path, default=Path("docs"), help="folder of the page"
    )
    options = parser.parse_args(arguments)
    settings = TourSettings(options.model, options.seed, options.steps, options.guidance)
    pipe = VLVPipeline.from_pretrained(options.model)
    print(write_tour(pipe, options.output, settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
