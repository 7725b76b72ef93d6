"""Everything about a model of the toy world, measured on freshly rendered scenes whose truth is known.

The same three steps as the paper's experiments. `evaluate_toyworld` takes all of them for models in memory:

1. predict: captions, images from captions, from z and from the truth, denoising losses, what the VAE loses, z read as words;
2. judge: the inspector looks at every image, the parser reads every caption;
3. score: `vlv.evaluation.experiments.toyworld_scores`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vlv.engine import EngineSettings
from vlv.errors import ConfigError
from vlv.evaluation.experiments.backends import Backends
from vlv.evaluation.experiments.instruments import inspector_instrument
from vlv.evaluation.experiments.predicting import generate_images, write_captions
from vlv.evaluation.experiments.run import Judge, Report, Run, Settings, batches, by_id, silent
from vlv.evaluation.experiments.samples import DataSet, Sample
from vlv.evaluation.experiments.scoring import Scores
from vlv.evaluation.experiments.sources import Source
from vlv.evaluation.experiments.toyworld_meters import INSPECTOR, METERS, MODEL, TIMESTEPS
from vlv.evaluation.experiments.toyworld_scores import SECTIONS, score_all, score_sections
from vlv.evaluation.experiments.toyworld_tables import COMPOSITION, TEST, Tables, split_samples
from vlv.evaluation.experiments.viewing import ORIGINAL, Viewer, captions_of, sources_of
from vlv.evaluation.metrics.distances import FEWEST_FOR_KERNEL
from vlv.evaluation.metrics.features import inspector_features
from vlv.evaluation.results import Results, Section
from vlv.jobs.tally import Tally
from vlv.models.arguments import whole_number
from vlv.models.folder import COMPONENTS, NEEDED
from vlv.models.hashing import weights_hash
from vlv.models.pipeline import VLVPipeline
from vlv.storage import replacing
from vlv.toyworld.inspector import Inspector
from vlv.toyworld.scene import MOST_SCENES
from vlv.training.journal import versions

NAME = "toyworld"
TITLE = "A model of the toy world"
STAGE1, STAGE2, CONTROL = "stage1", "stage2", "control"
JUDGE = Judge("inspector", "inspector", INSPECTOR)
NUM_REFERENCES = 5000
"""Further renders, independent of those that are reconstructed, for the distances between sets."""
MAX_CAPTION_TOKENS = 160

SOURCES = {
    "true": Source("true", "true"),
    "words": Source("words", "words"),
    "model": Source("model", "model", MODEL),
    "z": Source("z", "z", MODEL),
    "stage1": Source("stage1", "z", STAGE1),
    "stage2": Source("stage2", "model", STAGE2),
    "control": Source("control", "model", CONTROL),
    "control-z": Source("control-z", "z", CONTROL),
}
"""What images and captions are made from."""


@dataclass(frozen=True)
class Models:
    """What is measured, and with what.

    Attributes:
        model: Sections whose parts it lacks are reported as not measured.
        inspector: The instrument, on the model's device.
        stage1: The model before stage 2, for the section of that name.
        stage2: The model before stage 3, likewise.
        control: A model trained without stage 1, likewise.
    """

    model: VLVPipeline
    inspector: Inspector
    stage1: VLVPipeline | None = None
    stage2: VLVPipeline | None = None
    control: VLVPipeline | None = None

    @property
    def by_role(self) -> dict[str, VLVPipeline]:
        """The models that are there."""
        roles = {
            MODEL: self.model,
            STAGE1: self.stage1,
            STAGE2: self.stage2,
            CONTROL: self.control,
        }
        return {role: pipe for role, pipe in roles.items() if pipe is not None}


@dataclass(frozen=True)
class Plan:
    """How a model is measured; the same plan gives the same figures, whatever the batch size.

    Attributes:
        num: N, scenes of the split; a quarter as many of the split `composition` come with them.
        seed: Of the scenes, the noise and the intervals.
        batch_size: Images worked on together.
        steps: Sampler steps.
        guidance: Classifier-free guidance.
        sections: Names from `SECTIONS`.
        split: Of the scenes; tune on `val`, report on `test`.

    Raises:
        ConfigError: A section is unknown, or there are fewer than two scenes.
    """

    num: int = 2000
    seed: int = 0
    batch_size: int = 64
    steps: int = 20
    guidance: float = 2.0
    sections: tuple[str, ...] = tuple(SECTIONS)
    split: Literal["test", "val"] = "test"

    def __post_init__(self) -> None:
        for name in self.sections:
            if name not in SECTIONS:
                raise ConfigError(f'"{name}" is no section; choose from {", ".join(SECTIONS)}')
        whole_number("num", self.num, 2, MOST_SCENES)  # intervals need two


def evaluate_toyworld(
    models: Models,
    plan: Plan,
    folder: Path,
    report: Report = silent,
    engine: EngineSettings | None = None,
) -> tuple[Results, Run]:
    """Measure a model: predict, judge and score.

    Args:
        models: What is measured.
        plan: How.
        folder: Keeps what is finished, so that the same call goes on after an interruption.
        report: Receives finished rows.
        engine: What writes the captions; None is the models themselves.

    Returns:
        The figures, and the run that holds the captions and images.
    """
    settings = _settings(models, plan)
    digest = hashlib.sha256(
        json.dumps([plan.split, plan.seed, plan.num, settings]).encode()
    ).hexdigest()
    run = Run.start(folder / digest[:16], NAME, DataSet(plan.split, plan.seed, plan.num), settings)
    backends = Backends(
        models.model.device,
        plan.batch_size,
        pipes={(role, torch.float32): pipe for role, pipe in models.by_role.items()},
        inspectors={JUDGE.value: models.inspector},
        max_new_tokens=MAX_CAPTION_TOKENS,
        engine=engine,
    )
    with closing(backends):
        predict(run, backends, report)
        judge(run, JUDGE, backends, report)
    sections = score_sections(run, plan.seed)
    missing = settings["missing"]
    found = [
        Section(name, recipe.title, not_measured=missing[name])
        if name in missing
        else sections[name]
        for name, recipe in SECTIONS.items()
        if name in plan.sections
    ]
    return Results(_about(models, plan, run), tuple(found)), run


# --- what there is to do ------------------------------------------------------------------------------


def _settings(models: Models, plan: Plan) -> Settings:
    """What the tables depend on, and what each section needs of them."""
    roles = models.by_role
    missing = {name: reason for name in plan.sections if (reason := _missing(roles, name))}
    measured = [name for name in SECTIONS if name in plan.sections and name not in missing]
    generates = not lacking(models.model, NEEDED["generate"])

    def possible(names: tuple[str, ...], *, generated: bool) -> list[str]:
        return [name for name in names if _able(roles, name) and (generates or not generated)]

    recipes = [SECTIONS[name] for name in measured]
    captions = {s for r in recipes for s in possible(r.captions, generated=False)}
    images = {s for r in recipes for s in possible(r.images, generated=True)}
    captions |= {name for name in images if SOURCES[name].kind != "z"}
    return {
        "models": {role: describe_model(pipe) for role, pipe in roles.items()},
        "sections": measured,
        "missing": missing,
        "sources": {name: str(SOURCES[name]) for name in SOURCES if name in captions | images},
        "captions": sorted(captions),
        "images": sorted(images),
        "composition": max(2, plan.num // 4) if COMPOSITION in measured else 0,
        "image_size": models.model.image_size,
        "timesteps": _timesteps(models.model) if "denoising" in measured else [],
        "generator": f"model:{MODEL}",
        "steps": plan.steps,
        "guidances": [float(plan.guidance)],
    }


def _timesteps(pipe: VLVPipeline) -> list[int]:
    """`TIMESTEPS` on a model's own schedule."""
    return [t * pipe.decoder.num_timesteps // 1000 for t in TIMESTEPS]


def _able(roles: Mapping[str, VLVPipeline], name: str) -> bool:
    source = SOURCES[name]
    if not source.value:  # the truth, which the model's own decoder generates
        return not lacking(roles[MODEL], NEEDED["generate"])
    task = "reconstruct" if source.kind == "z" else "caption"
    return source.value in roles and not lacking(roles[source.value], NEEDED[task])


def lacking(pipe: VLVPipeline, components: Sequence[str]) -> list[str]:
    """The components among these that a model does not have."""
    return [name for name in components if getattr(pipe, name, None) is None]


def _missing(roles: Mapping[str, VLVPipeline], name: str) -> str | None:
    """Why a section cannot be measured; None if it can."""
    needs = SECTIONS[name].needs
    if name in (STAGE1, STAGE2, CONTROL):
        if name not in roles:
            return f"no model folder was given (--{name} FOLDER)"
        if absent := lacking(roles[name], needs):
            return f"the model given as --{name} has no {' and no '.join(absent)}"
    absent = lacking(roles[MODEL], needs)
    return f"the model has no {' and no '.join(absent)}" if absent else None


def describe_model(pipe: VLVPipeline) -> Settings:
    """Name, and size and weight hash of each component."""
    parts = {name: getattr(pipe, name, None) for name in COMPONENTS}
    modules = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    return {
        "name": str(pipe.config.get("_name_or_path") or "in memory"),
        "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in modules.items()},
        "sha256": {name: weights_hash(module) for name, module in modules.items()},
    }


def _about(models: Models, plan: Plan, run: Run) -> Settings:
    """Everything that decides the figures."""
    inspector = models.inspector
    return {
        "num": plan.num,
        "seed": plan.seed,
        "split": plan.split,
        "image_size": run.settings["image_size"],
        "batch_size": plan.batch_size,
        "steps": plan.steps,
        "guidance": plan.guidance,
        "sampler": "dpm",
        "max_new_tokens": MAX_CAPTION_TOKENS,
        "intervals": "95 %, 1000 bootstrap resamples of the scenes; of a toy FID or KID 1.96 standard errors",
        "sections": [name for name in SECTIONS if name in plan.sections],
        "models": run.settings["models"],
        "inspector": {"parameters": inspector.num_parameters(), "sha256": weights_hash(inspector)},
        "versions": versions(),
    }


def _samples_for(run: Run, name: str, kind: str) -> list[Sample]:
    """The samples of which a section wants captions or images of a source."""
    found: list[Sample] = []
    for split in (TEST, COMPOSITION):
        recipes = [
            SECTIONS[s]
            for s in run.settings["sections"]
            if (s == COMPOSITION) == (split == COMPOSITION)
        ]
        if any(name in getattr(recipe, kind) for recipe in recipes):
            found += split_samples(run, split)
    return found


# --- predict ------------------------------------------------------------------------------------------


def predict(run: Run, backends: Backends, report: Report = silent) -> Tally:
    """Write captions, generate images, and measure what the model does without either."""
    run.check(NAME)
    total, (guidance,) = Tally(), run.settings["guidances"]
    for source in sources_of(run):
        has_images = source.name in run.settings["images"]
        wanted = _samples_for(run, source.name, "images") if has_images else []
        if source.name in run.settings["captions"]:
            told = by_id([*_samples_for(run, source.name, "captions"), *wanted])
            total += write_captions(run, source, list(told.values()), backends, report)
        if wanted:
            total += generate_images(run, source, guidance, wanted, backends, report)
    for name, meter in METERS.items():
        if name in run.settings["sections"]:
            total += meter(run, backends).fill(name, report)
    return total


# --- judge ----------------------------------------------------------------------------------------------


def judge(run: Run, judge: Judge, backends: Backends, report: Report = silent) -> Tally:
    """Let the inspector look at the renders and at every generated image that it has not seen."""
    run.check(NAME)
    if judge.kind != "inspector":
        raise ConfigError(f'"{judge}" judges no scenes of the toy world; write inspector:FOLDER')
    inspector = backends.inspector(judge.value)
    instrument = inspector_instrument(inspector)
    samples = [*run.data.samples(), *split_samples(run, COMPOSITION)]
    guidance = float(run.settings["guidances"][0])
    wanted = [(sample.id, ORIGINAL, 0.0) for sample in samples]
    for name in run.settings["images"]:
        texts = None if SOURCES[name].kind == "z" else captions_of(run, name)
        wanted += [
            (sample.id, name, guidance)
            for sample in _samples_for(run, name, "images")
            if texts is None or sample.id in texts
        ]
    viewer = Viewer(run, judge.name, instrument, samples, run.settings["image_size"])
    tally = viewer.judge(wanted, backends.batch_size, report)
    if "fid" in run.settings["sections"] and len(run.data.samples()) >= FEWEST_FOR_KERNEL:
        _look_at_references(run, judge.name, inspector, backends.batch_size, report)
    return tally


def _look_at_references(
    run: Run, name: str, inspector: Inspector, batch_size: int, report: Report
) -> None:
    """Features of renders that stand for the world, independent of those that are measured."""
    path = Tables.reference_path(run, name)
    if path.is_file():
        return
    num = run.data.num or 0
    others = DataSet(run.data.split, run.data.seed, num + NUM_REFERENCES).samples()[num:]
    side, found, features = run.settings["image_size"], [], inspector_features(inspector)
    for batch in batches(others, batch_size):
        found.append(features([sample.square(side) for sample in batch]))
        report([{"id": sample.id} for sample in batch])
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate(found))


# --- score ----------------------------------------------------------------------------------------------


def score(run: Run, seed: int) -> Scores:
    """Figures of all sections."""
    run.check(NAME)
    return score_all(run, seed)
