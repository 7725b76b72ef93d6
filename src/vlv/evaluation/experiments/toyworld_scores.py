"""The sections of the toy world's measurement: from what was predicted and judged to figures with targets.

Comparisons are paired: all models and all sources of images see the same scenes and start from the same noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlv.evaluation.experiments.run import Run
from vlv.evaluation.experiments.samples import Sample
from vlv.evaluation.experiments.scoring import Scores, figures_of
from vlv.evaluation.experiments.toyworld_tables import (
    COMPOSITION,
    TEST,
    Columns,
    Stated,
    Tables,
    joined,
    part,
)
from vlv.evaluation.experiments.viewing import ORIGINAL
from vlv.evaluation.metrics import claims as count
from vlv.evaluation.metrics.claims import FACTS, Counts
from vlv.evaluation.metrics.distances import (
    FEWEST_FOR_KERNEL,
    frechet_estimate,
    frechet_excess,
    kernel_estimate,
    too_few_images,
)
from vlv.evaluation.metrics.features import feature_distances
from vlv.evaluation.results import Figure, Section, Table, Target, Unit
from vlv.evaluation.statistics import Estimate
from vlv.models.folder import COMPONENTS, NEEDED
from vlv.toyworld.language import parse

TARGETS: dict[str, Target] = {
    "vae.psnr": Target(36, 40),
    "vae.psnr_objects": Target(30, 34),
    "inspector.objects": Target(0.993, 0.998),
    "teacher.recall": Target(0.99, 0.995),
    "teacher.objects": Target(0.95, 0.98),
    "teacher.relations": Target(0.95, 0.99),
    "denoising.way": Target(0.75, 1.0),
    "reconstruction.ratio": Target(0.98, 1.0),
    "reconstruction.objects": Target(0.88, 0.95),
    "unsaid.x": Target(1.0, 0.6),
    "unsaid.centre": Target(1.0, 0.6),
    "unsaid.features": Target(1.0, 0.6),
    "stage1.ratio": Target(0.98, 1.0),
    "captions.f1": Target(0.97, 0.99),
    "captions.hallucinated": Target(0.03, 0.01),
    "captions.relations": Target(0.90, 0.98),
    "captions.finished": Target(0.995, 1.0),
    "stage2.hallucinated_ratio": Target(0.7, 0.3),
    "regeneration.ratio": Target(0.90, 0.98),
    "composition.teacher_pairs": Target(0.60, 0.85),
    "composition.reconstruction_pairs": Target(0.50, 0.80),
    "composition.captions_pairs": Target(0.50, 0.80),
}
"""Floor and goal of every figure that has them."""


def per_fact(title: str, counts: Counts) -> Table:
    """Precision, recall and F1 of each fact over all scenes."""
    rows = []
    for fact, (stated, true, correct) in zip(FACTS, counts.sum(0).tolist(), strict=True):
        if stated or true:
            parts = ((correct, stated), (correct, true), (2 * correct, stated + true))
            shares = [part / whole if whole else float("nan") for part, whole in parts]
            rows.append((fact, int(stated), int(true), int(correct), *shares))
    head = ("fact", "stated", "true", "correct", "precision", "recall", "F1")
    return Table(title, head, tuple(rows))


def _places(scores: Scores, name: str, seen: Stated) -> None:
    for axis, place in (("x", 0), ("y", 1)):
        label = f"place of the objects: error in {axis} (world units)"
        scores.add(f"{name}.box_{axis}", label, part(seen.errors, place, 2), "ratio", "length")


_FOUND = "true claims that the inspector finds"
_OBJECTS = "objects with all attributes right, by the inspector"


# --- sections -----------------------------------------------------------------------------------------


def vae(t: Tables) -> Scores:
    """Encode with the posterior mean and decode."""
    scores, errors = Scores(), t.measured("vae")
    for place, (key, label, statistic) in enumerate(
        (
            ("vae.psnr", "PSNR, mean over renders", "mean"),
            ("vae.psnr_objects", "PSNR inside the objects", "mean"),
            ("vae.psnr_pooled", "PSNR of the mean squared error", "decibels"),
            ("vae.psnr_objects_pooled", "PSNR of the mean squared error inside", "decibels"),
        )
    ):
        scores.add(key, label, part(errors, place), statistic, "dB")
    return scores


def inspector(t: Tables) -> Scores:
    """The instrument's own accuracy on true renders."""
    scores, seen = Scores(), t.seen(ORIGINAL)
    scores.add("inspector.objects", _OBJECTS, part(seen.objects, 0, 1), "ratio")
    scores.add(
        "inspector.present", "columns rightly empty or taken", part(seen.objects, 2, 3), "ratio"
    )
    scores.add("inspector.recall", _FOUND, seen.recall, "ratio")
    _places(scores, "inspector", seen)
    scores.tables.append(per_fact("per fact", seen.counts))
    return scores


def teacher(t: Tables) -> Scores:
    """Text to image, from true detailed captions."""
    scores, seen = Scores(), t.seen("true")
    shifted = Stated(seen.ids, (*seen.scenes[1:], *seen.scenes[:1]), seen.claims)
    texts = [parse(s.references[0]) for s in t.samples[TEST] if s.id in set(seen.ids)]
    shown = seen.columns(count.relations_shown(texts, seen.claims))
    scores.add("teacher.recall", f"{_FOUND} in the image", seen.recall, "ratio")
    scores.add("teacher.chance", "the same against another scene", shifted.recall, "ratio")
    scores.add("teacher.objects", _OBJECTS, part(seen.objects, 0, 1), "ratio")
    scores.add("teacher.relations", "stated relations that the inspector finds", shown, "ratio")
    scores.add("teacher.truncated", "true captions cut by the text tower", t.truncated("true"))
    scores.tables.append(per_fact("per fact", seen.counts))
    return scores


def denoising(t: Tables) -> Scores:
    """The meter of stage 1: how much of what text tells the U-Net does z tell it?"""
    scores, losses = Scores(), t.measured("denoising")  # (4, timesteps) each
    names = {"null": "no text", "true": "the true caption", "z": "z", "other": "another scene's caption"}  # fmt: skip
    means = {id: np.mean(rows, -1).tolist() for id, rows in losses.items()}
    for place, (key, name) in enumerate(names.items()):
        scores.add(f"denoising.{key}", f"loss given {name}", part(means, place), "mean", "loss")
    label = "share of the true caption's gain that z recovers"
    scores.add("denoising.way", label, means, "recovered", "ratio")
    by_step = np.mean(list(losses.values()), 0).T.tolist()
    rows = [(int(t), *values) for t, values in zip(t.settings["timesteps"], by_step, strict=True)]
    scores.tables.append(Table("loss by timestep", ("timestep", *names.values()), tuple(rows)))
    return scores


def _images(t: Tables, name: str, source: str) -> Scores:
    """What the inspector finds in the images of a source, also relative to those from true captions."""
    scores, seen = Scores(), t.seen(source)
    both = joined(seen.recall, t.seen("true").recall)
    scores.add(f"{name}.recall", f"{_FOUND} in the image", seen.recall, "ratio")
    label = "the same, relative to images from true captions"
    scores.add(f"{name}.ratio", label, both, "ratio_of_ratios", "ratio")
    scores.add(f"{name}.objects", _OBJECTS, part(seen.objects, 0, 1), "ratio")
    scores.tables.append(per_fact("per fact", seen.counts))
    return scores


def reconstruction(t: Tables) -> Scores:
    """Image to z to image, measured as the teacher is."""
    scores = _images(t, "reconstruction", "z")
    _places(scores, "reconstruction", t.seen("z"))
    return scores


def unsaid(t: Tables) -> Scores:
    """What captions do not say: z should keep more of it than the true caption does."""
    scores, z, true = Scores(), t.seen("z"), t.seen("true")
    places = t.seen(ORIGINAL).ids
    original = t.features(ORIGINAL)

    def apart(source: str) -> Columns:
        distance = feature_distances(t.features(source), original)
        return {id: [float(d), 1.0] for id, d in zip(places, distance, strict=True)}

    def centre(seen: Stated) -> Columns:
        return {id: [(dx + dy) / 2, n] for id, (dx, dy, n) in seen.errors.items()}

    measures: list[tuple[str, str, Columns, Columns, Unit]] = [
        ("x", "place within the column: error in x", part(z.errors, 0, 2), part(true.errors, 0, 2), "length"),
        ("centre", "box centre: L1, mean of x and y", centre(z), centre(true), "length"),
        ("features", "distance to the original in the inspector's features", apart("z"), apart("true"), "distance"),
    ]  # fmt: skip
    for key, label, from_z, from_true, unit in measures:
        scores.add(f"unsaid.{key}_z", f"{label}, from z", from_z, "ratio", unit)
        scores.add(
            f"unsaid.{key}_true", f"{label}, from the true caption", from_true, "ratio", unit
        )
        both = joined(from_z, from_true)
        scores.add(f"unsaid.{key}", f"{label}, z relative to it", both, "ratio_of_ratios", "ratio")
    return scores


def words(t: Tables) -> Scores:
    """Whether z merely spells the tags of a caption."""
    scores = Scores()
    label = "tokens of z nearest to those of the true tag caption, place by place"
    scores.add("words.equal", label, t.measured("words"), "ratio")
    return scores


def plain(t: Tables) -> Scores:
    """Text to image, from sentences as people type them: some of the attributes, places by relations alone."""
    scores, shown = Scores(), t.measured("plain")
    scores.add("plain.facts", "stated facts that the inspector finds", part(shown, 0, 1), "ratio")
    label = "objects with all that is stated of them, of those stated or found"
    scores.add("plain.objects", label, part(shown, 2, 3), "ratio")
    label = "stated relations that the inspector finds"
    scores.add("plain.relations", label, part(shown, 4, 5), "ratio")
    return scores


def captions(t: Tables) -> Scores:
    """Claims of the captions against the truth."""
    scores, written, rows = Scores(), t.written("model"), t.captions("model")
    relations = written.columns(count.relation_columns(written.counts))
    distinct = len({rows[id]["caption"] for id in written.ids}) / max(1, len(written.ids))
    nan = float("nan")
    caption_figures(scores, "captions", written)
    scores.add("captions.precision", "claims of captions: precision", written.precision, "ratio")
    scores.add("captions.recall", "claims of captions: recall", written.recall, "ratio")
    scores.add("captions.relations", "relations that captions state: right", relations, "ratio")
    finished = {id: [float(rows[id]["finish_reason"] == "stop")] for id in written.ids}
    scores.add("captions.finished", "captions that end before the longest length", finished)
    tokens = {id: [float(rows[id]["n_tokens"])] for id in written.ids}
    scores.add("captions.tokens", "tokens per caption", tokens, "mean", "tokens")
    estimate = Estimate(distinct, nan, nan, len(written.ids))
    scores.figures.append(Figure("captions.distinct", "distinct captions", estimate))
    scores.add("captions.truncated", "captions cut by the text tower", t.truncated("model"))
    scores.tables.append(per_fact("per fact", written.counts))
    return scores


def caption_figures(scores: Scores, name: str, written: Stated) -> None:
    """F1 and hallucinations, which the parser reads."""
    scores.add(f"{name}.f1", "claims of captions: F1", written.all_claims, "f1")
    label = "claims of captions: hallucinated"
    scores.add(f"{name}.hallucinated", label, written.precision, "complement")


def regeneration(t: Tables) -> Scores:
    """Image to caption to image, against true caption to image."""
    return _images(t, "regeneration", "model")


def fid(t: Tables) -> Scores:
    """Frechet and kernel distances to independent renders, in the inspector's features.

    The features are those of the scene and of all columns side by side: the scene's alone hardly notice wrong objects. A set
    of images from captions in another order would have the same distance as in the right order, so what is shuffled is the
    words within each caption.
    """
    scores, renders = Scores(), t.features(ORIGINAL)
    n, width = renders.shape
    if reason := too_few_images(n, width):
        scores.notes.append(reason)
    if n < FEWEST_FOR_KERNEL:
        return scores
    reference: NDArray[np.float32] = np.load(Tables.reference_path(t.run), mmap_mode="r")
    sources = {"original": (ORIGINAL, "the renders themselves"), "z": ("z", "from z"), "caption": ("model", "from our captions"), "true": ("true", "from true captions"), "shuffled": ("words", "from their words shuffled")}  # fmt: skip
    for key, (source, label) in sources.items():
        if not t.has(source):
            continue
        features = t.features(source)
        if n >= width:
            distance = frechet_estimate(reference, features, t.seed)
            scores.figures.append(Figure(f"fid.{key}", f"toy FID: {label}", distance, "distance"))
            if source != ORIGINAL:
                excess = frechet_excess(reference, features, renders, t.seed)
                text = f"toy FID: {label}, above the renders"
                scores.figures.append(Figure(f"fid.{key}_excess", text, excess, "distance"))
        kernel = kernel_estimate(reference, features, t.seed)
        scores.figures.append(Figure(f"fid.kid_{key}", f"toy KID: {label}", kernel, "distance"))
    return scores


def stage1(t: Tables) -> Scores:
    """What stage 2 did to the reconstruction."""
    scores, before, after = Scores(), t.seen("stage1"), t.seen("z")
    scores.add("stage1.recall", f"before stage 2: {_FOUND}", before.recall, "ratio")
    scores.add("stage1.after", f"after stage 2: {_FOUND}", after.recall, "ratio")
    both = joined(after.recall, before.recall)
    scores.add("stage1.ratio", "after relative to before", both, "ratio_of_ratios", "ratio")
    scores.tables.append(per_fact("per fact, before stage 2", before.counts))
    return scores


def stage2(t: Tables) -> Scores:
    """What stage 3 did to the captions."""
    scores, before, after = Scores(), t.written("stage2"), t.written("model")
    caption_figures(scores, "stage2", before)
    scores.add("stage2.recall", "claims of captions: recall", before.recall, "ratio")
    label = "hallucinated, after relative to before"
    both = joined(_wrong(after), _wrong(before))
    scores.add("stage2.hallucinated_ratio", label, both, "ratio_of_ratios", "ratio")
    both = joined(after.recall, before.recall)
    label = "recall, after relative to before"
    scores.add("stage2.recall_ratio", label, both, "ratio_of_ratios", "ratio")
    label = "claims stated, after relative to before"
    both = joined(part(after.all_claims, 0), part(before.all_claims, 0))
    scores.add("stage2.stated_ratio", label, both, "ratio", "ratio")
    scores.tables.append(per_fact("captions per fact, before stage 3", before.counts))
    return scores


def _wrong(written: Stated) -> Columns:
    """(wrong, stated) claims."""
    return {id: [stated - right, stated] for id, (right, stated) in written.precision.items()}


def control(t: Tables) -> Scores:
    """A model trained without stage 1 (paper, Table 7)."""
    scores, without, ours = Scores(), t.written("control"), t.written("model")
    caption_figures(scores, "control", without)
    both = joined(ours.all_claims, without.all_claims)
    scores.add("control.ratio", "F1 of this model relative to it", both, "ratio_of_f1", "ratio")
    if t.has("control-z"):
        label = f"from its z: {_FOUND} in the image"
        scores.add("control.recall", label, t.seen("control-z").recall, "ratio")
    scores.tables.append(per_fact("captions per fact", without.counts))
    return scores


def composition(t: Tables) -> Scores:
    """Scenes in which an object has a shape and a colour that never came together in training."""
    scores = Scores()
    sources = {"originals": (ORIGINAL, "true renders"), "teacher": ("true", "from true captions"), "reconstruction": ("z", "from z")}  # fmt: skip
    for key, (source, label) in sources.items():
        if t.has(source):
            seen = t.seen(source, COMPOSITION)
            scores.add(f"composition.{key}", f"{label}: {_FOUND}", seen.recall, "ratio")
            pairs = f"{label}: unseen pairs of shape and colour that the inspector finds"
            scores.add(f"composition.{key}_pairs", pairs, seen.pairs, "ratio")
    if "model" in t.settings["captions"]:
        written = t.written("model", COMPOSITION)
        caption_figures(scores, "composition.captions", written)
        label = "captions: unseen pairs of shape and colour that they name"
        scores.add("composition.captions_pairs", label, written.pairs, "ratio")
    return scores


# --- which sections there are ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recipe:
    """A section before it is measured."""

    title: str
    score: Callable[[Tables], Scores]
    needs: tuple[str, ...] = ()
    """Components of the model."""
    images: tuple[str, ...] = ()
    """Sources of which it wants images."""
    captions: tuple[str, ...] = ()


_CAPTION, _DRAW, _REBUILD = (NEEDED[task] for task in ("caption", "generate", "reconstruct"))
_ALL = ("true", "z", "model", "words")

SECTIONS: dict[str, Recipe] = {
    "vae": Recipe("VAE, held-out renders", vae, ("vae",)),
    "inspector": Recipe("inspector, on true renders", inspector),
    "teacher": Recipe("image from the true caption", teacher, _DRAW, ("true",)),
    "plain": Recipe("image from a plain sentence", plain, _DRAW),
    "denoising": Recipe("stage 1: held-out denoising loss", denoising, _REBUILD),
    "reconstruction": Recipe("reconstruction from z", reconstruction, _REBUILD, ("z", "true")),
    "unsaid": Recipe("what captions do not say", unsaid, _REBUILD, ("z", "true")),
    "words": Recipe("z read as words", words, (*_REBUILD, "tokenizer")),
    "captions": Recipe("captions, read by the parser", captions, _CAPTION, (), ("model",)),
    "regeneration": Recipe("image from our caption", regeneration, COMPONENTS, ("model", "true")),
    "fid": Recipe("toy FID and KID against other renders", fid, _DRAW, _ALL),
    "stage1": Recipe("the model before stage 2", stage1, _REBUILD, ("stage1", "z")),
    "stage2": Recipe("the model before stage 3", stage2, _CAPTION, (), ("stage2", "model")),
    "control": Recipe("without stage 1", control, _CAPTION, ("control-z",), ("control", "model")),
    COMPOSITION: Recipe("composition: unseen pairs of shape and colour", composition, (), ("true", "z"), ("model",)),
}  # fmt: skip
"""All sections in the order of the report."""

SUMMARY = (
    "teacher.recall",
    "reconstruction.ratio",
    "reconstruction.objects",
    "denoising.way",
    "unsaid.centre",
    "captions.f1",
    "captions.hallucinated",
    "captions.relations",
    "stage2.hallucinated_ratio",
    "regeneration.ratio",
    "composition.teacher_pairs",
    "composition.reconstruction_pairs",
    "composition.captions_pairs",
)
"""The figures that say most, the worst among them."""


def score_sections(run: Run, seed: int) -> dict[str, Section]:
    """The sections that were measured, by name."""
    tables = Tables(run, seed)
    found = {}
    for name in run.settings["sections"]:
        recipe = SECTIONS[name]
        scores = recipe.score(tables)
        figures = figures_of(scores, seed, TARGETS)
        reason = None if figures else "; ".join(scores.notes) or "there is nothing to measure"
        notes = tuple(scores.notes) if figures else ()
        found[name] = Section(name, recipe.title, figures, tuple(scores.tables), reason, notes)
    return found


def score_all(run: Run, seed: int) -> Scores:
    """The figures of all sections together."""
    tables, total = Tables(run, seed), Scores()
    for name in run.settings["sections"]:
        scores = SECTIONS[name].score(tables)
        total.measures += scores.measures
        total.figures += scores.figures
        total.tables += scores.tables
        total.notes += scores.notes
    return total


# --- for a person to look at ----------------------------------------------------------------------------

ROWS = {"from z": "z", "from our caption": "model", "from the true caption": "true", "from its words shuffled": "words"}  # fmt: skip
"""Rows of the sheet of examples below the originals, and the sources of their images."""


def sample_rows(run: Run) -> list[dict[str, object]]:
    """One row per scene: its captions, and the shares of claims found in what was made of it."""
    tables = Tables(run, 0)
    rows = {
        sample.id: _sample_row(index, sample) for index, sample in enumerate(tables.samples[TEST])
    }
    captions, written = tables.captions("model"), tables.written("model")
    for id, (stated, true, correct) in written.all_claims.items():
        finished = captions[id]["finish_reason"] == "stop"
        rows[id] |= {"caption": captions[id]["caption"], "finished": finished}
        rows[id] |= {"stated": int(stated), "true": int(true), "correct": int(correct)}
    for label, source in {"original": ORIGINAL, **ROWS}.items():
        for id, (correct, true) in tables.seen(source).recall.items():
            rows[id][f"found in image {label}"] = correct / true
    return list(rows.values())


def _sample_row(index: int, sample: Sample) -> dict[str, object]:
    scene = sample.known_scene.to_dict()
    return {"index": index, "true_caption": sample.references[0], "scene": scene}
