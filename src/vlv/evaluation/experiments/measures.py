"""Judges of an arena that measure captions instead of rating them: against references, against the truth, with CLIP.

A measure is written ``KIND`` or ``KIND:VALUE``:

| measure | says of each caption |
|---|---|
| ``references`` | BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D against the reference captions of its image |
| ``claims`` | in the toy world, precision, recall and F1 of its claims, and the hallucinated share |
| ``clip:MODEL`` | CLIPScore of the image with the whole caption, in pieces where CLIP cannot read it at once |

They are judges of the arena, and no experiment of their own, because they look at the very captions that are rated: written
once, every figure stands beside the ratings of the same samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlv.errors import ConfigError, DataError
from vlv.evaluation.experiments.run import Settings
from vlv.evaluation.experiments.samples import Sample
from vlv.evaluation.experiments.scoring import STATISTICS, Scores
from vlv.evaluation.experiments.sources import open_images
from vlv.evaluation.metrics.features import ClipScore
from vlv.evaluation.metrics.sentences import MAX_N, bleu_counts, cider_d, rouge_l
from vlv.evaluation.results import Table, Unit
from vlv.jobs.table import Row
from vlv.toyworld.language import compare, parse

KINDS = ("references", "claims", "clip")


Meter = Callable[[Sequence[Sample], Sequence[str]], list[Row]]
"""Columns of each caption in its place, or ``error`` where it cannot be measured."""


def against_references(samples: Sequence[Sample], captions: Sequence[str]) -> list[Row]:
    """Counts of BLEU (`BleuCounts.columns`), ROUGE-L, and the texts: CIDEr-D can be computed from all images only."""
    return [_against_own(s, caption) for s, caption in zip(samples, captions, strict=True)]


def _against_own(sample: Sample, caption: str) -> Row:
    known = sample.references
    if not known:
        return {
            "error": f"{sample.id} has no reference caption; a run with a file --references that has one can measure it"
        }
    return {
        "bleu": list(bleu_counts(caption, known).columns),
        "rouge_l": rouge_l(caption, known),
        "caption": caption,
        "references": list(known),
    }


def against_truth(samples: Sequence[Sample], captions: Sequence[str]) -> list[Row]:
    """Claims of captions: stated, true, correct."""
    pairs = zip(samples, captions, strict=True)
    counts = [compare(parse(caption), sample.known_scene) for sample, caption in pairs]
    return [{"claims": [c.stated, c.true, c.correct]} for c in counts]


def with_clip(name: str, device: torch.device | str = "cpu") -> Meter:
    """CLIPScore of images with captions of any length, and whether a caption was read in pieces.

    Raises:
        ModelFolderError: There is no such CLIP.
    """
    clip = ClipScore(name, device)

    def measure(samples: Sequence[Sample], captions: Sequence[str]) -> list[Row]:
        images, bad = open_images(list({sample.id: sample for sample in samples}.values()))
        errors = {row["id"]: row["error"] for row in bad}
        good = [i for i, sample in enumerate(samples) if sample.id in images]
        rows: list[Row] = [{"error": errors.get(sample.id)} for sample in samples]
        if good:
            found = clip.in_pieces(
                [images[samples[i].id] for i in good], [captions[i] for i in good]
            )
            for i, score, cut in zip(good, found.scores, found.truncated, strict=True):
                rows[i] = {"clip_score": float(score), "in_pieces": bool(cut)}
        return rows

    return measure


def loader(spec: str, device: torch.device | str) -> Callable[[], Meter]:
    """What loads a measure, when it is needed.

    Raises:
        ConfigError: The value does not belong to the kind.
    """
    kind, _, value = spec.partition(":")
    if (kind == "clip") != bool(value):
        raise ConfigError(
            f'"{spec}" is no judge of captions; write references, claims or clip:MODEL'
        )
    if kind == "clip":
        return lambda: with_clip(value, device)
    return lambda: against_references if kind == "references" else against_truth


def about(spec: str, samples: Sequence[Sample]) -> Settings:
    """What the rows of a measure depend on; other references are another measure.

    Raises:
        ConfigError: Claims are to be measured outside of the toy world.
        DataError: No sample has a reference.
    """
    kind = spec.partition(":")[0]
    settings: Settings = {"judge": spec, "mode": kind}
    if kind == "claims" and any(sample.scene is None for sample in samples):
        raise ConfigError(
            "the truth of images from files is not known: the judge claims is for the toy world; use references or clip:MODEL"
        )
    if kind == "references":
        texts = {sample.id: sample.references for sample in samples if sample.references}
        if not texts:
            raise DataError(
                f"none of the {len(samples)} images has a reference caption; begin a run with vlv eval predict arena "
                "--references FILE, or with data that have captions"
            )
        content = json.dumps(texts, sort_keys=True).encode()
        settings["references"] = hashlib.sha256(content).hexdigest()
    return settings


# --- score -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    """One figure of a source, and a column of the table."""

    key: str
    head: str
    rows: Mapping[str, Sequence[float] | float]
    statistic: str = "mean"
    unit: Unit = "ratio"


def score(scores: Scores, judge: str, kind: str, names: Sequence[str], rows: Sequence[Row]) -> None:
    """Figures of every source by one measure, and a table of all.

    Args:
        scores: Receives them.
        judge: Its name.
        kind: Of the measure.
        names: Of the sources.
        rows: Its rows without errors.
    """
    by_source: dict[str, dict[str, Row]] = {name: {} for name in names}
    for row in rows:
        by_source[row["source"]][row["id"]] = row
    found = {name: table for name, table in by_source.items() if table}
    if not found:
        return
    match kind:
        case "references":
            columns = _references(scores, judge, found)
        case "claims":
            columns = {name: _claims(table) for name, table in found.items()}
        case _:
            columns = {name: _clip(table) for name, table in found.items()}
    lines: list[tuple[str | int | float, ...]] = []
    for name, of_source in columns.items():
        values = [_add(scores, name, judge, column) for column in of_source]
        lines.append((name, *values, len(found[name])))
    heads = [column.head for column in next(iter(columns.values()))]
    scores.tables.append(Table(f"{judge}: all captions", ("captions", *heads, "n"), tuple(lines)))


def _add(scores: Scores, name: str, judge: str, column: _Column) -> float:
    """Add a measure, and return its figure for the table."""
    label = f"{name}: {column.head} ({judge})"
    key = f"{name}.{judge}.{column.key}"
    scores.add(key, label, column.rows, column.statistic, column.unit)
    means = scores.measures[-1].columns.mean(0)
    with np.errstate(invalid="ignore"):  # 0 / 0: nothing was claimed
        return float(STATISTICS[column.statistic](means))


def _references(
    scores: Scores, judge: str, found: Mapping[str, Mapping[str, Row]]
) -> dict[str, list[_Column]]:
    """The weights of CIDEr-D come from the references of all samples, the same for every source, in every resample."""
    corpus = {id: row["references"] for table in found.values() for id, row in table.items()}
    numbers = [len(texts) for texts in corpus.values()]
    least, most = min(numbers), max(numbers)
    each = f"{least}" if least == most else f"{least} to {most}"
    scores.settings[f"texts of {judge}"] = f"{len(corpus)} images, {each} captions each"
    if len(corpus) == 1:
        scores.notes.append(f"{judge}: CIDEr-D weighs words by rarity, and of one image it is 0")
    for name, table in found.items():
        if all(row["caption"] in row["references"] for row in table.values()):
            scores.notes.append(
                f"{judge}: the captions of {name} are references themselves, and have the best figures by definition"
            )
    texts = list(corpus.values())
    return {name: _against(table, texts) for name, table in found.items()}


def _against(table: Mapping[str, Row], corpus: Sequence[Sequence[str]]) -> list[_Column]:
    counts = {id: row["bleu"] for id, row in table.items()}
    cider = cider_d(
        [row["caption"] for row in table.values()],
        [row["references"] for row in table.values()],
        corpus,
    )
    return [
        *(_Column(f"bleu{n}", f"BLEU-{n}", counts, f"bleu{n}") for n in range(1, MAX_N + 1)),
        _Column("rouge_l", "ROUGE-L", {id: row["rouge_l"] for id, row in table.items()}),
        _Column("cider_d", "CIDEr-D", dict(zip(table, cider, strict=True))),
    ]


def _claims(table: Mapping[str, Row]) -> list[_Column]:
    counts = {id: row["claims"] for id, row in table.items()}
    stated = {id: (correct, said) for id, (said, _, correct) in counts.items()}
    true = {id: (correct, there) for id, (_, there, correct) in counts.items()}
    return [
        _Column("precision", "precision", stated, "ratio", "share"),
        _Column("recall", "recall", true, "ratio", "share"),
        _Column("f1", "F1", counts, "f1", "share"),
        _Column("hallucinated", "hallucinated", stated, "complement", "share"),
    ]


def _clip(table: Mapping[str, Row]) -> list[_Column]:
    scored = {id: row["clip_score"] for id, row in table.items()}
    cut = {id: float(row["in_pieces"]) for id, row in table.items()}
    return [
        _Column("clip", "CLIPScore", scored),
        _Column("in_pieces", "read in pieces", cut, "mean", "share"),
    ]
