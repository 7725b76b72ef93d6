"""What training as in the paper takes at the rates that were measured on one GPU: hours and USD, with what is assumed.

    python benchmarks/cost.py --run-dir out/cost    # docs/results/cost.json is its result.json

Rates are those of `full_size.py` in benchmarks/results, for the paper's models, sizes and batches. Assumed are the paper's numbers of
images, no time lost between many GPUs, no interruption and no trial run; only the price is ours.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vlv.evaluation.experiments.scoring import write_result
from vlv.evaluation.results import Figure, Section
from vlv.evaluation.statistics import Estimate

RESULTS = Path(__file__).parent / "results"
IMAGES = {"stage1": 200_000 * 512, "stage2": 100_000 * 64}
"""Steps times batch, as the paper gives them."""
NAMES = {"stage1": "stage 1", "stage2": "stage 2"}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--gpu", default="h200", help="as in the names of the result files")
    parser.add_argument(
        "--usd-per-hour", type=float, nargs=2, default=(2.0, 4.0), metavar=("LEAST", "MOST")
    )
    parser.add_argument("--run-dir", type=Path, help="write the figures to its result.json")
    options = parser.parse_args()
    rates = measured_rates(options.gpu)
    figures = cost(rates, *options.usd_per_hour)
    for figure in figures:
        e = figure.estimate
        print(f"{figure.label}: {e.value:,.0f} ({e.low:,.0f} to {e.high:,.0f})")
    if options.run_dir is not None:
        least, most = options.usd_per_hour
        notes = [
            "the value is that of the fastest settings and the middle price, the range that of all settings and prices",
            "one GPU; many are assumed to lose nothing, no run to be repeated",
        ]
        data = {"images of stage 1": IMAGES["stage1"], "images of stage 2": IMAGES["stage2"]}
        settings = {"gpu": options.gpu, "USD an hour": f"{least:g} to {most:g}"}
        section = Section("cost", "Cost of the paper's training, from measured rates", figures)
        more = {"intervals": "the range of measured rates and assumed prices", "notes": notes}
        write_result(options.run_dir, section, data, settings, more)


def measured_rates(gpu: str) -> dict[str, list[float]]:
    """Images per second of every measured setting that reads pixels, by stage."""
    rates: dict[str, list[float]] = {stage: [] for stage in IMAGES}
    for file in sorted(RESULTS.glob(f"full_size-paper-{gpu}*.json")):
        for row in json.loads(file.read_text(encoding="utf-8"))["results"]:
            if row["use"] in rates:
                rates[row["use"]].append(row["images_per_second"])
    return rates


def cost(rates: dict[str, list[float]], least: float, most: float) -> tuple[Figure, ...]:
    """GPU hours of both stages, and USD."""
    count = min(map(len, rates.values()))
    hours = {
        stage: [images / rate / 3600 for rate in (max(rates[stage]), min(rates[stage]))]
        for stage, images in IMAGES.items()
    }
    fast, slow = (sum(hours[stage][i] for stage in IMAGES) for i in (0, 1))
    return (
        *(
            Figure(
                f"cost.{stage}.hours",
                f"{NAMES[stage]}: GPU hours",
                Estimate(of[0], *of, count),
                "hours",
            )
            for stage, of in hours.items()
        ),
        Figure("cost.hours", "both stages: GPU hours", Estimate(fast, fast, slow, count), "hours"),
        Figure(
            "cost.usd",
            "both stages: USD",
            Estimate(fast * (least + most) / 2, fast * least, slow * most, count),
            "USD",
        ),
    )


if __name__ == "__main__":
    main()
