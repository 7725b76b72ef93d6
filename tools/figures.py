"""Tables of figures in the README and in docs/verification.md, written from the JSON of `vlv eval`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

BEGIN = "<!-- figures: written by `make pages` -->"
END = "<!-- end of figures -->"

_LABELS = {
    "vae.psnr": "VAE: PSNR",
    "vae.psnr_objects": "VAE: PSNR inside the objects",
    "inspector.objects": "inspector: objects with all attributes right",
    "teacher.recall": "generated from true captions: true claims found",
    "denoising.way": "denoising loss: share of the true caption's gain that z recovers",
    "reconstruction.recall": "reconstructed from z: true claims found",
    "reconstruction.ratio": "the same, relative to images from true captions",
    "stage1.ratio": "the same, after stage 2 relative to before",
    "reconstruction.objects": "reconstructed from z: objects with all attributes right",
    "captions.f1": "captions: F1 of claims",
    "captions.hallucinated": "captions: hallucinated claims",
    "captions.relations": "captions: relations stated that are right",
    "captions.finished": "captions: ended by themselves",
    "stage2.f1": "captions before stage 3: F1 of claims",
    "stage2.hallucinated_ratio": "hallucinated claims after stage 3 relative to before",
    "stage2.recall_ratio": "recall of claims after stage 3 relative to before",
    "regeneration.ratio": "generated from our captions, relative to true captions",
    "control.f1": "captions of the control without stage 1: F1 of claims",
    "composition.teacher_pairs": "pairs of shape and colour unseen in training: generated from text",
    "composition.reconstruction_pairs": "unseen pairs: reconstructed from z",
    "composition.captions_pairs": "unseen pairs: named in captions",
}
_UNITS = {"share": (100, " %"), "ratio": (100, " %"), "dB": (1, " dB")}


def figures_table(evaluation: dict[str, Any]) -> str:
    """The main figures of `vlv eval toyworld --json` as a Markdown table; what was not measured has no row."""
    settings = evaluation["settings"]
    head = (
        f"{settings['num']} held-out scenes of seed {settings['seed']}, {settings['steps']} sampler steps, guidance "
        f"{settings['guidance']}.\n\n| figure | floor | goal | measured | 95 % interval |\n|---|---|---|---|---|"
    )
    figures = {
        key: figure
        for section in evaluation["sections"].values()
        for key, figure in section.get("figures", {}).items()
    }
    rows = [_row(label, figures[key]) for key, label in _LABELS.items() if key in figures]
    return "\n".join([head, *rows])


def best_of_table(evaluation: dict[str, Any]) -> str:
    """What choosing gains, by `vlv eval best-of --json`, as a Markdown table."""
    settings = evaluation["settings"]
    figures = evaluation["sections"]["best_of"]["figures"]
    head = (
        f"{settings['num']} scenes of split {settings['split']}, seed {settings['seed']}, samples at temperature "
        f"{settings['temperature']}; 95 % intervals over scenes.\n\n"
        "| chosen by | among | F1 | wrong claims | of greedy's | share of the possible gain |\n|---|---|---|---|---|---|"
    )
    choosers = dict.fromkeys(key.split(".")[1] for key in figures if key.endswith(".of_oracle"))
    sizes = sorted({int(key.split(".")[2]) for key in figures if key.endswith(".of_oracle")})
    rows = [
        f"| greedy | 1 | {_cell(figures, 'greedy.f1')} | {_cell(figures, 'greedy.hallucinated')} | 1 | 0 |"
    ]
    for name in choosers:
        label = _CHOOSERS.get(name, f"reward `{name}`").format(timesteps=settings["timesteps"])
        for size in sizes:
            keys = ("f1", "hallucinated", "hallucinated_ratio", "of_oracle")
            cells = [_cell(figures, f"{name}.{size}.{key}") for key in keys]
            rows.append(f"| {label} | {size} | {' | '.join(cells)} |")
    return "\n".join([head, *rows])


_CHOOSERS = {
    "denoising": "frozen decoder, {timesteps} timesteps",
    "one_timestep": "frozen decoder, the middle timestep",
    "log_prob": "log-probability",
    "oracle": "the truth",
}


def _cell(figures: dict[str, Any], key: str) -> str:
    """A figure with its interval."""
    figure = figures[f"best_of.{key}"]
    if figure.get("value") is None:
        return "-"
    factor, unit = _UNITS[figure["unit"]] if figure["unit"] == "share" else (1, "")
    value, low, high = (f"{factor * figure[name]:.3g}" for name in ("value", "low", "high"))
    below = ", below the floor" if figure.get("verdict") == "below floor" else ""
    return f"{value}{unit} ({low} to {high}){below}"


def _row(label: str, figure: dict[str, Any]) -> str:
    factor, unit = _UNITS[figure["unit"]]

    def text(key: str) -> str:
        return f"{factor * figure[key]:.3g}{unit}" if key in figure else ""

    interval = f"{factor * figure['low']:.3g} to {factor * figure['high']:.3g}{unit}"
    below = ", below the floor" if figure.get("verdict") == "below floor" else ""
    return f"| {label} | {text('floor')} | {text('goal')} | {text('value')}{below} | {interval} |"


def with_figures(page: str, evaluation: dict[str, Any]) -> str:
    """A page with the table between its two marks renewed.

    Raises:
        ValueError: It has no such marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN} and {END}; add them where the figures go")
    table = best_of_table if "best_of" in evaluation["sections"] else figures_table
    return f"{before}{BEGIN}\n{table(evaluation)}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Renew the table in a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="Markdown with the two marks")
    parser.add_argument(
        "evaluation", type=Path, help="JSON of `vlv eval toyworld` or `vlv eval best-of`"
    )
    options = parser.parse_args(arguments)
    results = json.loads(options.evaluation.read_text("utf-8"))
    page = with_figures(options.page.read_text("utf-8"), results)
    options.page.write_text(page, encoding="utf-8")
    print(options.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
