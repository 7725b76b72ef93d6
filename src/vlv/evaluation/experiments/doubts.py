"""Doubts about captions, measured where the truth is known: rendered scenes, captioned by the model itself.

Every other caption is sampled, the rest are greedy: together they hold the errors that the shipped model makes. `collect` asks
the decoder once, `fit_calibration` and `measure` use what it said, on scenes of different seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vlv.errors import DataError
from vlv.evaluation.experiments.scene_plan import ScenePlan
from vlv.evaluation.metrics.doubts import (
    auroc,
    best_threshold,
    calibration_error,
    estimate_weighted,
    fit_logistic,
)
from vlv.evaluation.results import Figure, Results, Section, Target
from vlv.evaluation.statistics import Array, complement, estimate, f1, ratio
from vlv.jobs.table import Row
from vlv.models.calibration import Calibration, Logistic
from vlv.models.doubts import Claim, ClaimEvidence, Evidence, SentenceEvidence, judge
from vlv.models.draws import mixed_seed
from vlv.toyworld.claims import find_claims, mark_claims
from vlv.toyworld.language import compare, parse
from vlv.toyworld.render import render
from vlv.toyworld.scene import Scene

if TYPE_CHECKING:
    from vlv.models.pipeline import VLVPipeline

GRAMMAR = "toyworld"
"""Name of the grammar that a calibration of this experiment goes with."""
SCALES = (0.003, 0.01, 0.03, 0.1)
"""Of a change of the loss, among which the fit chooses."""
AUROC, ECE = Target(0.9, 0.97), Target(0.05, 0.02)


@dataclass(frozen=True, slots=True)
class Case:
    """One caption, its scene, and what the decoder says of it."""

    index: int
    scene: Scene
    known: Evidence
    """By exchanging the claims that the grammar finds."""
    plain: Evidence
    """By leaving out words, as of a text whose grammar is not known."""

    def wrong(self, start: int, end: int) -> float | None:
        """Whether a stretch of the caption makes a wrong claim, 1 or 0; None where it makes none."""
        marks = [m for m in mark_claims(self.known.caption, self.scene) if start <= m.start < end]
        return float(any(not mark.right for mark in marks)) if marks else None


def collect(
    pipe: VLVPipeline, plan: ScenePlan, folder: Path, report: Callable[[int], None]
) -> list[Case]:
    """Caption the scenes and ask the decoder about every caption; what the folder holds is kept.

    Args:
        pipe: The model, with all parts.
        plan: Which scenes.
        folder: Where the evidence is kept, for as long as the caller likes.
        report: Receives how many scenes are done.
    """
    model = str(pipe.config.get("_name_or_path"))
    about = {"split": plan.split, "seed": plan.seed, "model": model}  # more scenes go on from fewer
    rows = plan.collect(
        folder / "evidence.jsonl", about, lambda indices: _judged(pipe, plan, indices), report
    )
    return [case for case in (_case(plan, row) for row in rows) if case is not None]


def _judged(pipe: VLVPipeline, plan: ScenePlan, indices: Sequence[int]) -> Iterator[Row]:
    images = [render(plan.scene(index), pipe.image_size).image for index in indices]
    z = pipe.embed(images)
    captions: dict[int, str] = {}
    for sampled in (False, True):
        rows = [row for row, index in enumerate(indices) if index % 2 == sampled]
        if rows:
            seeds = [mixed_seed(plan.seed, "doubts", indices[row]) for row in rows]
            written = pipe.describe(z=z[rows], do_sample=sampled, seed=seeds)
            captions |= {row: x.text for row, x in zip(rows, written, strict=True)}
    good = [row for row in sorted(captions) if captions[row].strip()]
    texts, shown = [captions[row] for row in good], [images[row] for row in good]
    known = dict(zip(good, pipe.weigh(shown, texts, read_claims=find_claims), strict=True))
    plain = dict(zip(good, pipe.weigh(shown, texts), strict=True))
    for row, index in enumerate(indices):
        said = {"known": asdict(known[row]), "plain": asdict(plain[row])} if row in known else {}
        yield {"index": index, **said}


def _case(plan: ScenePlan, row: Row) -> Case | None:
    """None for an empty caption."""
    if "known" not in row:
        return None
    index = row["index"]
    return Case(index, plan.scene(index), _evidence(row["known"]), _evidence(row["plain"]))


def _evidence(values: Row) -> Evidence:
    sentences = [
        SentenceEvidence(
            **{
                **x,
                "claims": tuple(
                    ClaimEvidence(
                        Claim(**{**y["claim"], "alternatives": tuple(y["claim"]["alternatives"])}),
                        tuple(y["changes"]),
                    )
                    for y in x["claims"]
                ),
            }
        )
        for x in values["sentences"]
    ]
    return Evidence(**{**values, "sentences": tuple(sentences)})


# --- the fit ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cases:
    """Features, truth and image of sentences or claims."""

    features: Array
    wrong: Array
    image: NDArray[np.intp]


def _sentences(cases: Sequence[Case], *, plain: bool) -> _Cases:
    rows = [
        (*x.features, wrong, case.index)
        for case in cases
        for x in (case.plain if plain else case.known).sentences
        if (plain or x.claims) and (wrong := case.wrong(x.start, x.end)) is not None
    ]
    return _table(rows, 2)


def _claims(cases: Sequence[Case]) -> _Cases:
    rows = [
        (x.best, wrong, case.index)
        for case in cases
        for sentence in case.known.sentences
        for x in sentence.claims
        if (wrong := case.wrong(x.claim.start, x.claim.end)) is not None
    ]
    return _table(rows, 1)


def _table(rows: Sequence[tuple[float, ...]], num: int) -> _Cases:
    table = np.array(rows, np.float64).reshape(-1, num + 2)
    return _Cases(table[:, :num], table[:, num], table[:, num + 1].astype(np.intp))


def fit_calibration(cases: Sequence[Case], plan: ScenePlan) -> Calibration:
    """Fit the probabilities, and choose the threshold with the highest F1 of doubtful sentences.

    Raises:
        DataError: No claim is wrong, or none is right, so that there is nothing to tell apart.
    """
    kinds = {
        "claim": _claims(cases),
        "sentence": _sentences(cases, plain=False),
        "plain": _sentences(cases, plain=True),
    }
    for name, found in kinds.items():
        if len(np.unique(found.wrong)) < 2:
            raise DataError(
                f"{len(cases)} captions hold no {name} that is wrong, or none that is right; take more scenes"
            )

    def fit(scale: float) -> tuple[float, dict[str, Logistic]]:
        loss, models = 0.0, {}
        for name, found in kinds.items():
            weights, bias, own = fit_logistic(np.arcsinh(found.features / scale), found.wrong)
            models[name] = Logistic(tuple(weights.tolist()), bias)
            loss += own
        return loss, models

    fits = {scale: fit(scale) for scale in SCALES}
    scale = min(SCALES, key=lambda scale: fits[scale][0])
    models = fits[scale][1]
    sentences = kinds["sentence"]
    threshold = best_threshold(
        _probabilities(models["sentence"], sentences, scale), sentences.wrong
    )
    about = {**asdict(plan), "sentences": len(sentences.wrong), "claims": len(kinds["claim"].wrong)}
    return Calibration(scale, threshold, **models, claims=GRAMMAR, about=about)


def _probabilities(model: Logistic, cases: _Cases, scale: float) -> Array:
    return np.array([model.probability(row, scale) for row in cases.features.tolist()])


# --- the figures -----------------------------------------------------------------------------------


def measure(cases: Sequence[Case], calibration: Calibration, plan: ScenePlan) -> Results:
    """How good the doubts are, and what captions gain by what they propose."""
    figures = []
    for name, label, found, model in (
        ("sentence", "sentences", _sentences(cases, plain=False), calibration.sentence),
        ("claim", "claims", _claims(cases), calibration.claim),
        ("plain", "sentences without grammar", _sentences(cases, plain=True), calibration.plain),
    ):
        p = _probabilities(model, found, calibration.scale)
        is_goal = name == "sentence"
        for key, title, figure, target in (
            ("auroc", "AUROC", auroc, AUROC),
            ("ece", "calibration error", calibration_error, ECE),
        ):
            value = estimate_weighted(figure, p, found.wrong, found.image, plan.seed)
            figures.append(
                Figure(f"doubts.{name}.{key}", f"{label}: {title}", value, "share", target if is_goal else None)
            )  # fmt: skip
        if is_goal:
            figures += _flagged((p >= calibration.threshold).astype(np.float64), found, plan.seed)
    figures += _mended(cases, calibration, plan.seed)
    settings = {**asdict(plan), "calibration": calibration.to_dict()}
    return Results(settings, (Section("doubts", "Doubts about captions", tuple(figures)),))


def _flagged(flagged: Array, cases: _Cases, seed: int) -> list[Figure]:
    """Of sentences at the threshold: how many are wrong, flagged, and rightly so; by image."""
    _, rows = np.unique(cases.image, return_inverse=True)
    columns = [flagged * cases.wrong, flagged, cases.wrong, np.ones(len(flagged))]
    hits, found, wrong, all_ = (np.bincount(rows, column) for column in columns)
    return [
        Figure(f"doubts.{key}", label, estimate(np.stack(pair, 1), ratio, seed), "share")
        for key, label, pair in (
            ("wrong", "sentences that are wrong", (wrong, all_)),
            ("precision", "doubtful sentences that are wrong", (hits, found)),
            ("recall", "wrong sentences that are doubtful", (hits, wrong)),
        )
    ]


def _mended(cases: Sequence[Case], calibration: Calibration, seed: int) -> list[Figure]:
    """Claims of the captions as they are, and as the doubts would have them."""
    texts = {
        "written": [case.known.caption for case in cases],
        "fixed": [judge(case.known, calibration).fixed for case in cases],
    }
    figures = []
    for name, captions in texts.items():
        counts = [
            compare(parse(text), case.scene) for text, case in zip(captions, cases, strict=True)
        ]
        table = np.array([(x.stated, x.true, x.correct) for x in counts], np.float64)
        figures += [
            Figure(f"doubts.{name}.hallucinated", f"captions as {name}: wrong claims", estimate(table[:, [2, 0]], complement, seed), "share"),
            Figure(f"doubts.{name}.f1", f"captions as {name}: F1 of claims", estimate(table, f1, seed), "share"),
        ]  # fmt: skip
    return figures
