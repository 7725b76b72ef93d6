"""Ablations (paper, Tables 4, 5 and 7), the discrete bottleneck and stage 3: variants trained alike, measured on the same scenes.

Where several rates are given, validation chooses that of each variant: a training of a seed of its own for each rate, measured on the
split `val`. Then every variant is trained with every seed and the rest of the settings the same, and measured in the toy world on the split
`test`. A run folder

```
RUN/trained/stage1-HASH/ stage2-HASH/   the training runs, each with its model, named by their settings (stage3-HASH/ too)
RUN/tuned/VARIANT-NUMBER.json           what a rate was chosen by
RUN/measured/VARIANT-seed0.json         what every figure is computed from, one row per scene
RUN/result.json                         the figures, and each of them seed by seed
```

goes on where it was interrupted. Ablations that are given one folder for `trained` share what they have in common: the variant
that is everybody's default is trained once. Shapes: S seeds, N scenes, K columns.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlv.data.source import find_records
from vlv.errors import ConfigError
from vlv.evaluation.experiments import toyworld
from vlv.evaluation.experiments.backends import load_inspector
from vlv.evaluation.experiments.boxes import boxes_of, true_boxes
from vlv.evaluation.experiments.boxes import measure as measure_boxes
from vlv.evaluation.experiments.run import Report, Run, Settings, silent
from vlv.evaluation.experiments.scoring import FEW_SAMPLES, Scores, write_result
from vlv.evaluation.experiments.toyworld_scores import SECTIONS
from vlv.evaluation.experiments.trainings import Plan, alternatives, model_of, settings_of
from vlv.evaluation.experiments.variants import (
    ABLATIONS,
    BOXES,
    CAPTION_MEASURES,
    MEASURES,
    ORIGINALS,
    Ablation,
    Variant,
)
from vlv.evaluation.experiments.viewing import IMAGE_KEY, ORIGINAL
from vlv.evaluation.metrics.boxes import Box
from vlv.evaluation.results import Figure, Section
from vlv.evaluation.statistics import Array, Statistic, estimate_over_seeds, figures_by_seed
from vlv.models.pipeline import VLVPipeline
from vlv.storage import plain, read_settings, write_json


def run_ablation(
    name: str, folder: Path, plan: Plan, device: torch.device, report: Report = silent
) -> Section:
    """Train what is not trained, measure what is not measured, and write ``result.json``.

    Args:
        name: From `ABLATIONS`.
        folder: Of the run; the same call goes on there.
        plan: Of training and measuring.
        device: Where models are measured; training chooses its own.
        report: Receives what was measured, row by row.

    Returns:
        All figures.

    Raises:
        ConfigError: The ablation is unknown, or the plan does not fit it.
        Interrupted: As `train`.
    """
    ablation = _check(name, plan)
    bench = _Bench(ablation, folder, plan, device, report)
    tables: dict[str, dict[str, list[Any]]] = {}
    chosen: dict[str, str] = {}
    for variant in ablation.variants:
        chosen[variant.name], tuned = bench.tune(variant)
        for seed in range(plan.seeds):
            for key, rows in bench.measured(tuned, seed).items():
                floor, _, measure = key.rpartition(".")
                if not floor:
                    tables.setdefault(variant.name, {}).setdefault(measure, []).append(rows)
                else:  # the same in every file
                    tables.setdefault(floor, {})[measure] = [rows]
    section = Section(f"ablation-{name}", ablation.title, tuple(_figures(name, tables, plan)))
    _write_result(name, folder, plan, section, chosen, _by_seed(name, tables))
    return section


def _check(name: str, plan: Plan) -> Ablation:
    if name not in ABLATIONS:
        raise ConfigError(f'"{name}" is no ablation; choose from {", ".join(ABLATIONS)}')
    ablation = ABLATIONS[name]
    if plan.wrong is None and any(variant.teacher == "bad" for variant in ablation.variants):
        raise ConfigError(
            f"{name} needs a bad teacher's captions; render them with vlv toyworld render --wrong 0.2, and name them with --wrong"
        )
    names = [variant.name for variant in ablation.variants]
    for variant, models in plan.given.items():
        if variant not in names:
            raise ConfigError(
                f'"{variant}" is no variant of {name}; choose from {", ".join(names)}'
            )
        if len(models) != plan.seeds:
            raise ConfigError(
                f"{len(models)} models were given for {variant}, but there are {plan.seeds} seeds; give one for each"
            )
    return ablation


# --- tuning and measuring --------------------------------------------------------------------------

TUNING_SEED = 1000
"""Seed of the trainings that rates are tuned by, and of their scenes; no figure is reported of it."""

_KEYS = {
    "claims": "reconstruction.recall",
    "way": "denoising.way",
    **{measure: f"captions.{measure}" for measure in CAPTION_MEASURES},
}


@dataclass(frozen=True)
class _Bench:
    """Trains and measures, each once."""

    ablation: Ablation
    folder: Path
    plan: Plan
    device: torch.device
    report: Report

    def tune(self, variant: Variant) -> tuple[str, Variant]:
        """The form of a variant that is best on validation scenes by the ablation's first measure, and what it is called."""
        forms = alternatives(variant, self.plan)
        if variant.name in self.plan.given:
            return "", variant
        if len(forms) == 1:
            return next(iter(forms.items()))
        measure = self.ablation.measures[0]
        statistic = MEASURES[measure][1]
        measuring = replace(
            self.plan.measuring, split="val", seed=TUNING_SEED, num=self.plan.tuning_num
        )
        found = {}
        for number, (name, form) in enumerate(forms.items()):
            path = self.folder / "tuned" / f"{variant.name}-{number}.json"
            columns = self._columns(path, form, TUNING_SEED, measuring, (measure,))
            (value,) = figures_by_seed([columns[measure]], statistic)
            found[name] = float(np.nan_to_num(value, nan=-np.inf))
        best = max(found, key=lambda name: found[name])
        return best, forms[best]

    def measured(self, variant: Variant, seed: int) -> Settings:
        """The columns of every measure of a training."""
        path = self.folder / "measured" / f"{variant.name}-seed{seed}.json"
        return self._columns(path, variant, seed, self.plan.measuring, self.ablation.measures)

    def _columns(
        self,
        path: Path,
        variant: Variant,
        seed: int,
        measuring: toyworld.Plan,
        measures: tuple[str, ...],
    ) -> Settings:
        """What a file keeps of an earlier call with the same settings, or what is found now."""
        about = self._about(variant, seed, measuring, measures)
        content = read_settings(path)
        if content and content["about"] == plain(about):
            columns: Settings = content["columns"]
            return columns
        given = self.plan.given.get(variant.name)
        home = self.plan.trained or self.folder / "trained"
        model = model_of(variant, seed, home, self.plan) if given is None else Path(given[seed])
        found = self._measure(model, path.with_suffix(""), measuring, measures)
        write_json(path, {"about": about, "columns": found})
        return found

    def _about(
        self, variant: Variant, seed: int, measuring: toyworld.Plan, measures: tuple[str, ...]
    ) -> Settings:
        """What a measurement depends on, as JSON values."""
        given = self.plan.given.get(variant.name)
        trained = settings_of(variant, seed, self.plan) if given is None else []
        return {
            "measures": list(measures),
            "inspector": str(self.plan.parts / "inspector"),
            "measuring": asdict(replace(measuring, batch_size=1, sections=())),
            "given": given and given[seed],
            "finished": self.plan.finished if variant.last else None,
            "trained": [config.model_dump(mode="json") for config in trained],
        }

    def _measure(
        self, model: Path, folder: Path, measuring: toyworld.Plan, wanted: tuple[str, ...]
    ) -> Settings:
        """The columns of every measure that the model has, N rows each; what they were measured on is not kept."""
        pipe = VLVPipeline.from_pretrained(model).to(self.device)
        inspector = load_inspector(self.plan.parts / "inspector", self.device)
        names = {_KEYS.get(measure, "reconstruction").partition(".")[0] for measure in wanted}
        sections = tuple(name for name in SECTIONS if name in names)
        _, run = toyworld.evaluate_toyworld(
            toyworld.Models(pipe, inspector),
            replace(measuring, sections=sections),
            folder,
            self.report,
        )
        measures = {m.key: m for m in toyworld.score(run, measuring.seed).measures}
        found = {
            measure: measures[key].columns.tolist()
            for measure, key in _KEYS.items()
            if measure in wanted and key in measures
        }
        if set(BOXES) & set(wanted):
            found |= _boxes(run)
        shutil.rmtree(folder)
        return found


def _boxes(run: Run) -> dict[str, list[list[float]]]:
    """Boxes of the reconstructions against those of the originals, and the error of the inspector itself."""
    scores, samples = Scores(), run.data.samples()
    read: dict[str, dict[str, list[Box]]] = {ORIGINAL: {}, "z": {}}
    for row in run.rows(f"judgements/{toyworld.JUDGE.name}", IMAGE_KEY):
        if row["source"] in read:
            read[row["source"]][row["id"]] = boxes_of(row)
    truth = {sample.id: true_boxes(sample.known_scene) for sample in samples}
    originals = {sample.id: read[ORIGINAL][sample.id] for sample in samples}
    measure_boxes(scores, "z", "", originals, read["z"])
    measure_boxes(scores, ORIGINALS, "", truth, originals)
    columns = {measure.key.removeprefix("z."): measure.columns for measure in scores.measures}
    wanted = [f"{of}{name}" for of in ("", f"{ORIGINALS}.") for name in BOXES]
    return {key: columns[key].tolist() for key in wanted}


def _figures(name: str, tables: Mapping[str, Settings], plan: Plan) -> list[Figure]:
    """Every measure of every variant, and the differences of which the paper makes a claim."""
    figures = []
    for measure, (label, statistic, unit) in MEASURES.items():
        columns = {v: np.array(t[measure], np.float64) for v, t in tables.items() if measure in t}
        for variant, table in columns.items():
            value = estimate_over_seeds(table, statistic, plan.measuring.seed)
            figures.append(
                Figure(f"{name}.{variant}.{measure}", _label(variant, label), value, unit)
            )
        for better, worse in ABLATIONS[name].better:
            if better in columns and worse in columns:
                value = estimate_over_seeds(
                    np.concatenate((columns[better], columns[worse]), -1),
                    _difference(statistic, columns[better].shape[-1]),
                    plan.measuring.seed,
                )
                key, text = f"{name}.{better} over {worse}.{measure}", f"{better} minus {worse}"
                figures.append(Figure(key, f"{text}: {label}", value, unit))
        if measure in ("f1", "hallucinated"):
            figures += undone(name, measure, columns, plan)
    return figures


def _by_seed(name: str, tables: Mapping[str, Settings]) -> dict[str, list[float | None]]:
    """Every measure of every variant, and their differences, of each training by itself; None where it has no value."""
    found: dict[str, Array] = {}
    for measure, (_, statistic, _) in MEASURES.items():
        values = {
            variant: figures_by_seed(table[measure], statistic)
            for variant, table in tables.items()
            if measure in table
        }
        found |= {f"{name}.{variant}.{measure}": x for variant, x in values.items()}
        for better, worse in ABLATIONS[name].better:
            if better in values and worse in values:
                key = f"{name}.{better} over {worse}.{measure}"
                found[key] = values[better] - values[worse]
    return {k: [float(v) if np.isfinite(v) else None for v in x] for k, x in found.items()}


def undone(name: str, measure: str, columns: Mapping[str, Array], plan: Plan) -> Iterator[Figure]:
    """Shares of the way from one variant to another that others take back."""
    ways = ABLATIONS[name].undone
    if ways is None:
        return
    (end, start), variants = ways
    label, statistic, _ = MEASURES[measure]
    width = columns[start].shape[-1]

    def share(rows: Array) -> Array:
        mine, first, last = (
            statistic(rows[..., i : i + width]) for i in range(0, 3 * width, width)
        )
        found: Array = (mine - first) / (last - first)
        return found

    for variant in variants:
        rows = np.concatenate([columns[x] for x in (variant, start, end)], -1)
        value = estimate_over_seeds(rows, share, plan.measuring.seed)
        text = f"{variant}: share of the way from {start} to {end}: {label}"
        yield Figure(f"{name}.{variant} undoes.{measure}", text, value, "ratio")


def _label(variant: str, label: str) -> str:
    if variant == ORIGINALS:
        return (
            f"originals against the truth (noise floor): {label.replace(' of reconstructions', '')}"
        )
    return f"{variant}: {label}"


def _difference(statistic: Statistic, width: int) -> Statistic:
    def difference(columns: Array) -> Array:
        return statistic(columns[..., :width]) - statistic(columns[..., width:])

    return difference


def _presets(ablation: Ablation) -> tuple[str, ...]:
    """The presets that an ablation reads, by their names in the plan."""
    if ablation.goes_on:
        return ("stage3", "captions", "finished")
    return ("stage1", "stage2") if ablation.captions else ("stage1",)


def _images_of(variant: Variant, plan: Plan) -> dict[str, int]:
    """How many images a training of a variant sees, stage by stage, and how many of them differ."""
    found: dict[str, int] = {}
    for config in settings_of(variant, 0, plan):
        rows = config.loop.global_batch_size or config.loop.batch_size * config.loop.accumulate
        seen, there = config.loop.steps * rows, len(find_records(config.data.inputs))
        found |= {f"{config.stage}": seen, f"{config.stage}, unique": min(seen, there)}
    return found


def _write_result(
    name: str,
    folder: Path,
    plan: Plan,
    section: Section,
    chosen: Mapping[str, str],
    by_seed: Mapping[str, list[float | None]],
) -> None:
    """Write the figures, what they depend on, and what every one of them is seed by seed."""
    ablation, m = ABLATIONS[name], plan.measuring
    notes = [
        "Variants are trained alike but for what is compared; every figure is of all seeds and scenes together."
    ]
    if m.num < FEW_SAMPLES:
        notes.append(f"a figure has only {m.num} scenes; its interval is a rough one")
    if plan.seeds < 3:
        notes.append(f"{plan.seeds} seeds say little of how much training itself varies")
    trained = [variant for variant in ablation.variants if variant.name not in plan.given]
    data = {"split": m.split, "seed": m.seed, "num": m.num, "files": 0}
    settings = {
        "seeds": plan.seeds,
        "variants": [variant.name for variant in ablation.variants],
        "given": sorted(plan.given),
        **{preset: Path(getattr(plan, preset)).name for preset in _presets(ablation)},
        "changes": [c for c in (*plan.changes1, *plan.changes2, *plan.changes3) if "/" not in c],
        "rates": list(plan.rates),
        "steps": m.steps,
        "guidance": m.guidance,
    }
    more = {
        "intervals": "95 %: of the t distribution over seeds, widened by a bootstrap of the scenes",
        "notes": notes,
        "tuned": dict(chosen),
        "images": {variant.name: _images_of(variant, plan) for variant in trained},
        "by_seed": by_seed,
    }
    write_result(folder, section, data, settings, more)
