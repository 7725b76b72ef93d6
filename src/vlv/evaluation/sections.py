"""The experiments on the toy world, one function each: figures, with the targets they are held against.

Every figure carries an interval over scenes (`vlv.evaluation.statistics`); comparisons are paired, for all models and all
sources of pictures see the same scenes and start from the same noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vlv.evaluation import statistics
from vlv.evaluation.frechet import frechet_estimate, kernel_distance
from vlv.evaluation.results import Figure, Section, Table, Target, Unit
from vlv.evaluation.scenes import FACTS, Counts, Inspection, World, claim_counts, make_world
from vlv.evaluation.statistics import Estimate, Statistic, estimate
from vlv.evaluation.study import Captions, Study
from vlv.models.folder import COMPONENTS, NEEDED

TARGETS: dict[str, Target] = {
    "vae.psnr": Target(32, 37),
    "vae.psnr_objects": Target(25, 30),
    "inspector.objects": Target(0.95, 0.99),
    "teacher.recall": Target(0.80, 0.97),
    "denoising.way": Target(0.75, 1.0),
    "reconstruction.ratio": Target(0.85, 1.05),
    "stage1.ratio": Target(0.95, 1.0),
    "captions.f1": Target(0.90, 0.98),
    "captions.hallucinated": Target(0.08, 0.01),
    "captions.finished": Target(0.995, 1.0),
    "regeneration.ratio": Target(0.90, 0.98),
}
"""Floor and goal of every figure that has them."""

PART_OF_COMPOSITION = 4
"""One scene with held-out pairs for so many others."""


class Experiment:
    """The studies that the sections draw from; those that cost rendering are made when first asked for.

    Args:
        study: The model on scenes of the split `test`.
        num: N.
        stage1: The model before stage 2 on the same scenes.
        control: A model trained without stage 1, on the same scenes.
        further: The model on other scenes.
    """

    def __init__(
        self,
        study: Study,
        stage1: Study | None,
        control: Study | None,
        further: Callable[[World], Study],
    ) -> None:
        self.study, self.stage1, self.control, self._on = study, stage1, control, further
        self.seed = study.settings.seed
        self.num = len(study.world.scenes)

    @cached_property
    def others(self) -> Study:
        """As many further scenes, for the floor of the Frechet distance."""
        return self._on(self._world("test", range(self.num, 2 * self.num)))

    @cached_property
    def composition(self) -> Study:
        """Scenes with pairs of shape and colour that no training has seen."""
        return self._on(self._world("composition", range(max(2, self.num // PART_OF_COMPOSITION))))

    def _world(self, split: Any, indices: range) -> World:
        settings = self.study.settings
        size = self.study.world.pixels.shape[-1]
        return make_world(split, settings.seed, indices, size, progress=settings.progress)

    def figure(
        self,
        key: str,
        label: str,
        columns: ArrayLike,
        statistic: Statistic = statistics.ratio,
        unit: Unit = "share",
    ) -> Figure:
        """A figure with its interval and its target."""
        value = estimate(columns, statistic, self.seed)
        return Figure(key, label, value, unit, TARGETS.get(key))


Figures = tuple[list[Figure], list[Table]]


# --- columns --------------------------------------------------------------------------------------


def recall_columns(counts: Counts) -> Counts:
    """(correct, true) claims of every scene, (N, 2)."""
    return np.asarray(counts.sum(1)[:, [2, 1]])


def precision_columns(counts: Counts) -> Counts:
    """(correct, stated) claims of every scene, (N, 2)."""
    return np.asarray(counts.sum(1)[:, [2, 0]])


def per_fact(title: str, counts: Counts) -> Table:
    """Precision, recall and F1 of each fact over all scenes."""
    rows = []
    for fact, (stated, true, correct) in zip(FACTS, counts.sum(0), strict=True):
        if stated or true:
            shares = (
                _share(correct, stated),
                _share(correct, true),
                _share(2 * correct, stated + true),
            )
            rows.append((fact, int(stated), int(true), int(correct), *shares))
    return Table(
        title, ("fact", "stated", "true", "correct", "precision", "recall", "F1"), tuple(rows)
    )


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def box_figures(run: Experiment, name: str, seen: Inspection) -> list[Figure]:
    """Mean errors of the 3-D boxes that the inspector reads."""
    x, y, found, turn, cubes = seen.boxes.T
    columns: list[tuple[str, str, Counts, Counts, Unit]] = [
        ("box_x", "3-D box: error in x (world units)", x, found, "length"),
        ("box_y", "3-D box: error in y (world units)", y, found, "length"),
        ("box_yaw", "3-D box: error in yaw of cubes (chance 22.5°)", turn, cubes, "degrees"),
    ]
    return [
        run.figure(f"{name}.{key}", label, np.stack((error, count), 1), unit=unit)
        for key, label, error, count, unit in columns
    ]


# --- sections -------------------------------------------------------------------------------------


def vae(run: Experiment) -> Figures:
    """Encode with the posterior mean and decode."""
    whole, inside, error, error_inside = run.study.vae_errors.T
    figures = [
        run.figure("vae.psnr", "PSNR, mean over renders", whole, statistics.mean, "dB"),
        run.figure("vae.psnr_objects", "PSNR inside the objects", inside, statistics.mean, "dB"),
    ]
    for key, label, errors in (
        ("vae.psnr_pooled", "PSNR of the mean squared error", error),
        ("vae.psnr_objects_pooled", "PSNR of the mean squared error inside", error_inside),
    ):
        figures.append(run.figure(key, label, errors, _decibels, "dB"))
    return figures, []


def _decibels(columns: Counts) -> Counts:
    return np.asarray(-10 * np.log10(columns[..., 0]))


def inspector(run: Experiment) -> Figures:
    """The instrument's own accuracy on true renders."""
    seen = run.study.originals
    figures = [
        run.figure("inspector.objects", "objects with all attributes right", seen.objects[:, :2]),
        run.figure("inspector.present", "columns rightly empty or taken", seen.objects[:, 2:]),
        run.figure("inspector.recall", "true claims found", recall_columns(seen.counts)),
        *box_figures(run, "inspector", seen),
    ]
    return figures, [per_fact("per fact", seen.counts)]


def teacher(run: Experiment) -> Figures:
    """Text to image, from true detailed captions."""
    study, seen = run.study, run.study.from_true_text
    mismatched = claim_counts(seen.claims, [*study.world.scenes[1:], study.world.scenes[0]])
    figures = [
        run.figure(
            "teacher.recall", "true claims found in the picture", recall_columns(seen.counts)
        ),
        run.figure("teacher.chance", "the same against another scene", recall_columns(mismatched)),
        run.figure("teacher.objects", "objects with all attributes right", seen.objects[:, :2]),
        run.figure(
            "teacher.truncated",
            "true captions cut by the text tower",
            study.truncated(study.world.captions),
            statistics.mean,
        ),
    ]
    return figures, [per_fact("per fact", seen.counts)]


def denoising(run: Experiment) -> Figures:
    """The meter of stage 1: how much of what text tells the U-Net does z tell it?"""
    losses = run.study.denoising_losses  # (N, 4, timesteps)
    names = ("no text", "true text", "z", "another scene's text")
    means = losses.mean(-1)
    keys = ("null", "true", "z", "other")
    figures = [
        run.figure(f"denoising.{key}", f"loss given {name}", means[:, i], statistics.mean, "loss")
        for i, (key, name) in enumerate(zip(keys, names, strict=True))
    ]
    label = "way from no text to the true text"
    figures.append(run.figure("denoising.way", label, means, statistics.way, "ratio"))
    rows = [
        (t, *column)
        for t, column in zip(run.study.timesteps, losses.mean(0).T.tolist(), strict=True)
    ]
    return figures, [Table("loss by timestep", ("timestep", *names), tuple(rows))]


def reconstruction(run: Experiment) -> Figures:
    """Image to z to image, measured as the teacher is."""
    seen, columns = run.study.from_z, recall_columns(run.study.from_z.counts)
    reference = recall_columns(run.study.from_true_text.counts)
    figures = [
        run.figure("reconstruction.recall", "true claims found in the picture", columns),
        run.figure(
            "reconstruction.ratio",
            "relative to the teacher",
            np.hstack((columns, reference)),
            statistics.ratio_of_ratios,
            "ratio",
        ),
        run.figure(
            "reconstruction.objects", "objects with all attributes right", seen.objects[:, :2]
        ),
        *box_figures(run, "reconstruction", seen),
    ]
    return figures, [per_fact("per fact", seen.counts)]


def captions(run: Experiment) -> Figures:
    """Claims of the captions against the truth."""
    study, written = run.study, run.study.captions
    tokens = [caption.num_tokens for caption in written.captions]
    ended = [caption.finished for caption in written.captions]
    distinct = len(set(study.texts)) / len(study.texts)
    nan = float("nan")
    figures = [
        *caption_figures(run, "captions", written),
        run.figure(
            "captions.precision", "claims of captions: precision", precision_columns(written.counts)
        ),
        run.figure("captions.recall", "claims of captions: recall", recall_columns(written.counts)),
        run.figure("captions.finished", "captions that end by themselves", ended, statistics.mean),
        run.figure("captions.tokens", "tokens per caption", tokens, statistics.mean, "tokens"),
        Figure("captions.distinct", "distinct captions", Estimate(distinct, nan, nan, len(tokens))),
    ]
    if study.pipe.tokenizer is not None:
        cut = study.truncated(study.texts)
        label = "captions cut by the text tower"
        figures.append(run.figure("captions.truncated", label, cut, statistics.mean))
    return figures, [per_fact("per fact", written.counts)]


def caption_figures(run: Experiment, name: str, written: Captions) -> list[Figure]:
    """F1 and hallucinations."""
    return [
        run.figure(f"{name}.f1", "claims of captions: F1", written.counts.sum(1), statistics.f1),
        run.figure(
            f"{name}.hallucinated",
            "claims of captions: hallucinated",
            precision_columns(written.counts),
            statistics.complement,
        ),
    ]


def regeneration(run: Experiment) -> Figures:
    """Image to caption to image, against true caption to image."""
    seen = run.study.from_captions
    columns = recall_columns(seen.counts)
    both = np.hstack((columns, recall_columns(run.study.from_true_text.counts)))
    label = "relative to pictures from true captions"
    figures = [
        run.figure("regeneration.recall", "true claims found in the picture", columns),
        run.figure("regeneration.ratio", label, both, statistics.ratio_of_ratios, "ratio"),
        run.figure(
            "regeneration.objects", "objects with all attributes right", seen.objects[:, :2]
        ),
    ]
    return figures, [per_fact("per fact", seen.counts)]


def fid(run: Experiment) -> Figures:
    """Frechet and kernel distances to the renders, in the inspector's features.

    The features are those of the scene and of all columns side by side: the scene's alone hardly notice wrong objects. A set
    of pictures from captions in another order would have the same distance as in the right order, so what is shuffled is the
    words within each caption.
    """
    study, reference = run.study, run.study.originals.features
    sources: list[tuple[str, str, Callable[[], Inspection], bool]] = [
        ("original", "other renders", lambda: run.others.originals, True),
        ("z", "from z", lambda: study.from_z, can(study, "reconstruct")),
        ("caption", "from our caption", lambda: study.from_captions, can(study, "caption")),
        ("true", "from the true caption", lambda: study.from_true_text, True),
        ("shuffled", "from its words shuffled", lambda: study.from_shuffled_words, True),
    ]
    figures, kernel = [], []
    for key, label, make, possible in sources:
        if not possible:
            continue
        features = make().features
        distance = frechet_estimate(reference, features, run.seed)
        figures.append(Figure(f"fid.{key}", f"toy FID: {label}", distance, "distance"))
        kernel.append((label, kernel_distance(reference, features)))
    return figures, [Table("kernel distance (KID)", ("pictures", "distance"), tuple(kernel))]


def stage1(run: Experiment) -> Figures:
    """What stage 2 did to the reconstruction."""
    assert run.stage1 is not None, "checked by missing"
    before = recall_columns(run.stage1.from_z.counts)
    after = recall_columns(run.study.from_z.counts)
    figures = [
        run.figure("stage1.recall", "before stage 2: true claims found", before),
        run.figure("stage1.after", "after stage 2: true claims found", after),
        run.figure(
            "stage1.ratio",
            "after relative to before",
            np.hstack((after, before)),
            statistics.ratio_of_ratios,
            "ratio",
        ),
    ]
    return figures, [per_fact("per fact, before stage 2", run.stage1.from_z.counts)]


def control(run: Experiment) -> Figures:
    """A model trained without stage 1 (paper, Table 7)."""
    assert run.control is not None, "checked by missing"
    without, ours = run.control.captions, run.study.captions
    both = np.hstack((ours.counts.sum(1), without.counts.sum(1)))
    figures = [
        *caption_figures(run, "control", without),
        run.figure(
            "control.ratio",
            "F1 of this model relative to it",
            both,
            statistics.ratio_of_f1,
            "ratio",
        ),
    ]
    if can(run.control, "reconstruct"):
        columns = recall_columns(run.control.from_z.counts)
        label = "from its z: true claims found in the picture"
        figures.append(run.figure("control.recall", label, columns))
    return figures, [per_fact("captions per fact", without.counts)]


def composition(run: Experiment) -> Figures:
    """Scenes in which an object has a shape and a colour that never came together in training."""
    study = run.composition
    pictures: list[tuple[str, str, bool, Callable[[], Inspection]]] = [
        ("originals", "true renders", True, lambda: study.originals),
        ("teacher", "from true captions", can(study, "generate"), lambda: study.from_true_text),
        ("reconstruction", "from z", can(study, "reconstruct"), lambda: study.from_z),
    ]
    figures = []
    for key, label, possible, make in pictures:
        if possible:
            seen = make()
            columns = recall_columns(seen.counts)
            figures += [
                run.figure(f"composition.{key}", f"{label}: true claims found", columns),
                run.figure(
                    f"composition.{key}_pairs", f"{label}: held-out pairs found", seen.pairs
                ),
            ]
    if can(study, "caption"):
        figures += caption_figures(run, "composition.captions", study.captions)
        label = "captions: held-out pairs named"
        figures.append(run.figure("composition.captions_pairs", label, study.captions.pairs))
    return figures, []


# --- which sections there are ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recipe:
    """A section before it is measured."""

    title: str
    measure: Callable[[Experiment], Figures]
    needs: tuple[str, ...] = ()
    """Components of the model."""


_CAPTION, _DRAW, _REBUILD = (NEEDED[task] for task in ("caption", "generate", "reconstruct"))

SECTIONS: dict[str, Recipe] = {
    "vae": Recipe("VAE, held-out renders", vae, ("vae",)),
    "inspector": Recipe("inspector, on true renders", inspector),
    "teacher": Recipe("teacher: picture from the true caption", teacher, _DRAW),
    "denoising": Recipe("stage 1: held-out denoising loss", denoising, _REBUILD),
    "reconstruction": Recipe("reconstruction from z", reconstruction, _REBUILD),
    "captions": Recipe("captions", captions, _CAPTION),
    "regeneration": Recipe("picture from our caption", regeneration, COMPONENTS),
    "fid": Recipe("toy FID against the renders", fid, _DRAW),
    "stage1": Recipe("shipped model against the model before stage 2", stage1, _REBUILD),
    "control": Recipe("without stage 1", control, _CAPTION),
    "composition": Recipe("composition: held-out pairs of shape and colour", composition),
}
"""All sections in the order of the report."""


def can(study: Study, task: str) -> bool:
    """Whether a model has the components of a task."""
    return not lacking(study, NEEDED[task])


def lacking(study: Study, components: tuple[str, ...]) -> list[str]:
    """The components among these that a model does not have."""
    return [name for name in components if getattr(study.pipe, name, None) is None]


def missing(run: Experiment, name: str) -> str | None:
    """Why a section cannot be measured; None if it can."""
    if name in ("stage1", "control"):
        other = run.stage1 if name == "stage1" else run.control
        if other is None:
            return f"no model folder was given (--{name} FOLDER)"
        if absent := lacking(other, SECTIONS[name].needs):
            return f"the model given as --{name} has no {' and no '.join(absent)}"
    absent = lacking(run.study, SECTIONS[name].needs)
    return f"the model has no {' and no '.join(absent)}" if absent else None


def measure(run: Experiment, name: str) -> Section:
    """One section of the report."""
    recipe = SECTIONS[name]
    reason = missing(run, name)
    if reason is not None:
        return Section(name, recipe.title, not_measured=reason)
    figures, tables = recipe.measure(run)
    return Section(name, recipe.title, tuple(figures), tuple(tables))
