"""Ablations (paper, Tables 4, 5 and 7), the discrete bottleneck and stage 3: variants trained alike, measured on the same scenes.

Every variant is trained with every seed and the rest of the settings the same, then measured in the toy world. A run folder

```
RUN/trained/stage1-HASH/ stage2-HASH/   the training runs, each with its model, named by their settings (stage3-HASH/ too)
RUN/measured/VARIANT-seed0.json         what every figure is computed from, one row per scene
RUN/result.json                         the figures
```

goes on where it was interrupted. Ablations that are given one folder for `trained` share what they have in common: the variant
that is everybody's default is trained once. Shapes: S seeds, N scenes, K columns.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlv.config import RunConfig, load_config
from vlv.errors import ConfigError
from vlv.evaluation.experiments import toyworld
from vlv.evaluation.experiments.backends import load_inspector
from vlv.evaluation.experiments.boxes import boxes_of, true_boxes
from vlv.evaluation.experiments.boxes import measure as measure_boxes
from vlv.evaluation.experiments.run import Report, Run, Settings, silent
from vlv.evaluation.experiments.scoring import FEW_SAMPLES, Scores, write_result
from vlv.evaluation.experiments.toyworld_scores import SECTIONS
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
from vlv.evaluation.statistics import Array, Statistic, estimate_over_seeds
from vlv.models.folder import find_folder
from vlv.models.pipeline import VLVPipeline
from vlv.storage import plain, read_settings, write_json
from vlv.training.assemble import train


@dataclass(frozen=True)
class Plan:
    """How the variants are trained and measured.

    Attributes:
        parts: Folder of the pretrained parts, as `vlv toyworld pretrain` writes them.
        stage1: Preset or file of the settings of stage 1.
        stage2: Of stage 2.
        stage3: Of a stage 3 that goes on from a finished model.
        captions: Of a stage 2 that goes on from it with true captions: the yardstick of stage 3.
        finished: That model, a folder or a shipped one.
        changes1: Changes of them, for every variant.
        changes2: Likewise.
        changes3: Of both that go on.
        wrong: Folder of a bad teacher's captions (`vlv toyworld render --wrong`); who learns them, or as many true ones, does so by
            the preset of `captions` with `changes2`.
        seeds: S; seed s trains with ``loop.seed=s``.
        given: Model folders by variant, one for each seed, that are measured instead of trained.
        measuring: N scenes, their seed, steps and guidance; its sections follow from the measures.
        trained: Folder of the training runs, which ablations can share; in the run's own folder by default.
    """

    parts: Path
    stage1: str = "tiny-ablation-stage1"
    stage2: str = "tiny-ablation-stage2"
    stage3: str = "tiny-ablation-stage3"
    captions: str = "tiny-ablation-captions-stage2"
    finished: str = "vlv-tiny"
    changes1: tuple[str, ...] = ()
    changes2: tuple[str, ...] = ()
    changes3: tuple[str, ...] = ()
    wrong: Path | None = None
    seeds: int = 3
    given: Mapping[str, Sequence[str]] = field(default_factory=dict)
    measuring: toyworld.Plan = field(default_factory=lambda: toyworld.Plan(num=500))
    trained: Path | None = None


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
    tables: dict[str, dict[str, list[Any]]] = {}
    for variant in ablation.variants:
        for seed in range(plan.seeds):
            path = folder / "measured" / f"{variant.name}-seed{seed}.json"
            about = _about(ablation, variant, seed, plan)
            found = _kept(path, about)
            if found is None:
                model = _model(ablation, variant, seed, folder, plan)
                found = _measure(ablation, model, path.with_suffix(""), plan, device, report)
                write_json(path, {"about": about, "columns": found})
            for key, rows in found.items():
                floor, _, measure = key.rpartition(".")
                if not floor:
                    tables.setdefault(variant.name, {}).setdefault(measure, []).append(rows)
                else:  # the same in every file
                    tables.setdefault(floor, {})[measure] = [rows]
    section = Section(f"ablation-{name}", ablation.title, tuple(_figures(name, tables, plan)))
    _write_result(name, folder, plan, section)
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


# --- training --------------------------------------------------------------------------------------


def _changes(variant: Variant, stage: str, seed: int, plan: Plan) -> list[str]:
    """Changes of the settings of a stage."""
    parts = plan.parts.as_posix()
    part = "florence" if stage == "stage1" else "llm"
    common = plan.changes1 if stage == "stage1" else plan.changes2
    own = (variant.stage1 if stage == "stage1" else variant.stage2) or ()
    return [
        f"model.decoder={parts}",
        f"model.{part}={parts}/{part}",
        *common,
        *(change.replace("{parts}", parts) for change in own),
        f"loop.seed={seed}",
    ]


_LENGTHS = (
    "loop.steps",
    "optim.warmup_steps",
    "stage1.warm_start_steps",
    "stage1.warm_start_fade_steps",
)


def _shortened(source: str, changes: list[str], share: float) -> list[str]:
    """The changes, with everything that is counted in steps multiplied by a share."""
    if share == 1:
        return changes
    values = load_config(source, changes).model_dump()
    lengths = {key: values[key.split(".")[0]][key.split(".")[1]] for key in _LENGTHS}
    return [*changes, *(f"{key}={round(share * value)}" for key, value in lengths.items())]


def _first(variant: Variant, seed: int, plan: Plan) -> RunConfig:
    """The settings of stage 1."""
    changes = _changes(variant, "stage1", seed, plan)
    return load_config(plan.stage1, _shortened(plan.stage1, changes, variant.share))


def _second(variant: Variant, seed: int, plan: Plan, encoder: Path) -> RunConfig:
    """The settings of stage 2, after a stage 1 where the variant has one."""
    changes = _changes(variant, "stage2", seed, plan)
    if variant.stage1 is not None:
        changes.append(f"model.encoder={encoder.as_posix()}")
    return load_config(plan.stage2, changes)


def _taught(variant: Variant, seed: int, plan: Plan) -> RunConfig | None:
    """The settings of a training by a good or a bad teacher, which the finished model gets first; None where it gets none."""
    if variant.teacher is None:
        return None
    wrong = [] if variant.teacher == "good" else [f"data.inputs=[{plan.wrong}]"]
    changes = [*plan.changes2, *wrong, f"loop.seed={seed}"]
    return load_config(plan.captions, [*_start(plan.finished), *changes])


def _last(variant: Variant, seed: int, plan: Plan, model: str) -> RunConfig | None:
    """The settings of a training that goes on from a model; None where it is measured as it is."""
    if variant.stage3 is None:
        return None
    preset = plan.stage3 if variant.last == "stage3" else plan.captions
    changes = [*_start(model), *plan.changes3, *variant.stage3, f"loop.seed={seed}"]
    return load_config(preset, changes)


def _start(model: str) -> list[str]:
    """The settings that name a model as the one to go on from."""
    return [f"model.{part}={model}" for part in ("encoder", "decoder", "caption_decoder")]


def _model(ablation: Ablation, variant: Variant, seed: int, folder: Path, plan: Plan) -> Path:
    """The model folder of a variant, trained where it is not yet."""
    if variant.name in plan.given:
        return Path(plan.given[variant.name][seed])
    home, first = plan.trained or folder / "trained", Path()
    if variant.last is not None:
        taught = _taught(variant, seed, plan)
        start = find_folder(plan.finished) if taught is None else _trained(taught, home)
        name = plan.finished if taught is None else start.as_posix()
        config = _last(variant, seed, plan, name)
        return start if config is None else _trained(config, home)
    if variant.stage1 is not None:
        first = _trained(_first(variant, seed, plan), home)
        if not ablation.captions:
            return first
    return _trained(_second(variant, seed, plan, first), home)


def _trained(config: RunConfig, home: Path) -> Path:
    """The model of a training run that is named by its settings: whoever asks for the same run finds it."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    name = f"{config.stage}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    model = home / name / "model"
    if not model.is_dir():  # it is saved complete, or not at all
        train(config, home / name)
    return model


# --- measuring -------------------------------------------------------------------------------------


def _about(ablation: Ablation, variant: Variant, seed: int, plan: Plan) -> Settings:
    """What a measurement depends on, as JSON values."""
    about: Settings = {
        "measures": list(ablation.measures),
        "inspector": str(plan.parts / "inspector"),
        "measuring": asdict(replace(plan.measuring, batch_size=1, sections=())),
        "given": None,
    }
    if variant.name in plan.given:
        return {**about, "given": plan.given[variant.name][seed]}
    if variant.last is not None:
        configs = {
            "taught": _taught(variant, seed, plan),
            "last": _last(variant, seed, plan, plan.finished),
        }
        settings = {k: x and x.model_dump(mode="json") for k, x in configs.items()}
        return {**about, "finished": plan.finished, **settings}
    if variant.stage1 is not None:
        about["stage1"] = _first(variant, seed, plan).model_dump(mode="json")
    if ablation.captions:
        about["stage2"] = _second(variant, seed, plan, Path("stage1")).model_dump(mode="json")
    return about


def _kept(path: Path, about: Settings) -> Settings | None:
    """The columns of an earlier call with the same settings."""
    content = read_settings(path)
    return content["columns"] if content and content["about"] == plain(about) else None


_KEYS = {
    "claims": "reconstruction.recall",
    "way": "denoising.way",
    **{measure: f"captions.{measure}" for measure in CAPTION_MEASURES},
}


def _measure(
    ablation: Ablation,
    model: Path,
    folder: Path,
    plan: Plan,
    device: torch.device,
    report: Report,
) -> Settings:
    """The columns of every measure, N rows each; what they were measured on is not kept."""
    pipe = VLVPipeline.from_pretrained(model).to(device)
    inspector = load_inspector(plan.parts / "inspector", device)
    keys = [_KEYS.get(measure, "reconstruction") for measure in ablation.measures]
    wanted = {key.partition(".")[0] for key in keys}
    sections = tuple(name for name in SECTIONS if name in wanted)
    measuring = replace(plan.measuring, sections=sections)
    _, run = toyworld.evaluate_toyworld(toyworld.Models(pipe, inspector), measuring, folder, report)
    measures = {m.key: m for m in toyworld.score(run, measuring.seed).measures}
    found = {m: measures[_KEYS[m]].columns.tolist() for m in ablation.measures if m in _KEYS}
    if set(BOXES) & set(ablation.measures):
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
    return ("stage3", "captions", "finished") if ablation.goes_on else ("stage1", "stage2")


def _write_result(name: str, folder: Path, plan: Plan, section: Section) -> None:
    notes = [
        "Variants are trained alike but for what is compared; every figure is of all seeds and scenes together."
    ]
    if plan.measuring.num < FEW_SAMPLES:
        notes.append(f"a figure has only {plan.measuring.num} scenes; its interval is a rough one")
    if plan.seeds < 3:
        notes.append(f"{plan.seeds} seeds say little of how much training itself varies")
    m = plan.measuring
    data = {"split": "test", "seed": m.seed, "num": m.num, "files": 0}
    settings = {
        "seeds": plan.seeds,
        "variants": [variant.name for variant in ABLATIONS[name].variants],
        "given": sorted(plan.given),
        **{preset: Path(getattr(plan, preset)).name for preset in _presets(ABLATIONS[name])},
        "changes": [c for c in (*plan.changes1, *plan.changes2, *plan.changes3) if "/" not in c],
        "steps": m.steps,
        "guidance": m.guidance,
    }
    intervals = "95 %, 1000 bootstrap resamples of scenes and of seeds at once"
    write_result(folder, section, data, settings, {"intervals": intervals, "notes": notes})
