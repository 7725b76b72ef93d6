"""Experiments 1 and 2: how well do captions, and caption embeddings, reconstruct an image (paper, Tables 1, 4 and 5).

One generator takes every source of captions (and of embeddings) at every guidance, from the noise of the sample's seed, and the
images are measured against the originals. As the paper does not say how originals become squares, they are cropped in the centre
and brought to the size of the generated images before anything looks at them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vlv.errors import ConfigError, DataError
from vlv.evaluation.experiments.backends import Backends, with_dtype
from vlv.evaluation.experiments.boxes import boxes_of, true_boxes
from vlv.evaluation.experiments.boxes import measure as measure_boxes
from vlv.evaluation.experiments.instruments import make_instrument
from vlv.evaluation.experiments.predicting import generate_images, predict_captions
from vlv.evaluation.experiments.run import Judge, Report, Run, Settings, silent
from vlv.evaluation.experiments.samples import Sample
from vlv.evaluation.experiments.scoring import Scores, add_cost, judgements
from vlv.evaluation.experiments.sources import CAPTION_KEY, parse_sources
from vlv.evaluation.experiments.viewing import (
    IMAGE_KEY,
    ORIGINAL,
    Features,
    Viewer,
    image_rows,
    pairs,
    sources_of,
    table_name,
)
from vlv.evaluation.metrics.distances import (
    FEWEST_FOR_KERNEL,
    frechet_estimate,
    kernel_estimate,
    too_few_images,
)
from vlv.evaluation.results import Figure
from vlv.jobs.table import Row
from vlv.jobs.tally import Tally

NAME = "reconstruction"
TITLE = "Images generated from captions and from caption embeddings"

Pair = tuple[str, float]
"""A source and a guidance."""
_ORIGINALS: Pair = (ORIGINAL, 0.0)


def settings(
    sources: Sequence[str],
    generator: str,
    steps: int,
    guidances: Sequence[float],
    dtype: str = "float32",
) -> Settings:
    """What the predictions depend on beside the data.

    Args:
        sources: As `parse_source` reads them.
        generator: As `split_generator` reads it.
        steps: Denoising steps.
        guidances: Images of every source are generated at each.
        dtype: Of the weights that generate and that make z, one of `DTYPES`; captions are always written in float32.

    Raises:
        ConfigError: A source or a number makes no sense.
    """
    if steps < 1 or not guidances or min(guidances) < 0:
        raise ConfigError(
            f"images need one or more steps and guidances of 0 or more, got {steps} and {list(guidances)}"
        )
    found = {
        "sources": {source.name: str(source) for source in parse_sources(sources)},
        "generator": generator,
        "steps": steps,
        "guidances": [float(g) for g in guidances],
    }
    return with_dtype(found, dtype)


def predict(run: Run, backends: Backends, report: Report = silent) -> Tally:
    """Write captions and generate images, those that are missing."""
    run.check(NAME)
    total, samples = predict_captions(run, backends, report), run.data.samples()
    for source in sources_of(run):
        for guidance in run.settings["guidances"]:
            total += generate_images(run, source, guidance, samples, backends, report)
    return total


def judge(run: Run, judge: Judge, backends: Backends, report: Report = silent) -> Tally:
    """Let an instrument look at the originals and at all generated images, those that it has not seen."""
    run.check(NAME)
    rows = [row for pair in pairs(run) for row in image_rows(run, *pair)]
    if not rows:
        raise DataError(f"{run.folder} has no images yet; begin with vlv eval predict")
    samples = run.data.samples()
    wanted = [(sample.id, *_ORIGINALS) for sample in samples]
    wanted += [(row["id"], row["source"], row["guidance"]) for row in rows]
    viewer = Viewer(run, judge.name, make_instrument(judge, backends), samples, rows[0]["side"])
    return viewer.judge(wanted, backends.batch_size, report)


# --- score -------------------------------------------------------------------------------------------


def score(run: Run, seed: int) -> Scores:
    """Figures of every source at every guidance by every judge."""
    run.check(NAME)
    scores, samples = Scores(), run.data.samples()
    for name, about, rows in judgements(run, scores):
        by_pair: dict[Pair, dict[str, Row]] = {}
        for row in rows:
            by_pair.setdefault((row["source"], float(row["guidance"])), {})[row["id"]] = row
        for pair in (_ORIGINALS, *pairs(run)):
            _measure(scores, name, pair, by_pair.get(pair, {}))
        _boxes(run, scores, name, by_pair, samples)
        unknown = any(row.get("claims") is None for row in rows)
        if about.get("instrument") == "inspector" and unknown:
            scores.notes.append(
                "the inspector knows the toy world only; elsewhere it gives features"
            )
        _distances(run, scores, name, by_pair, samples, seed)
    _generation(run, scores, len(samples))
    return scores


def _naming(judge: str, pair: Pair) -> tuple[str, str]:
    """Beginnings of the keys and of the labels of what a judge says of the images of a pair."""
    if pair == _ORIGINALS:
        return f"{ORIGINAL}.{judge}", "originals"
    source, guidance = pair
    return f"{source}.g{guidance:g}.{judge}", f"{source}, guidance {guidance:g}"


def _measure(scores: Scores, judge: str, pair: Pair, rows: Mapping[str, Row]) -> None:
    where, text = _naming(judge, pair)

    def having(column: str) -> Settings:
        return {id: row[column] for id, row in rows.items() if row.get(column) is not None}

    claims = {id: (correct, true) for id, (_, true, correct) in having("claims").items()}
    scores.add(f"{where}.claims", f"{text}: true claims found", claims, "ratio")
    if pair == _ORIGINALS:
        return
    scores.add(f"{where}.psnr", f"{text}: PSNR to the original", having("psnr"), unit="dB")
    label = f"{text}: cosine with the original"
    scores.add(f"{where}.cosine", label, having("cosine"), unit="ratio")
    scores.add(f"{where}.clip", f"{text}: CLIPScore", having("clip_score"), unit="ratio")
    label = f"{text}: texts that CLIP reads in part"
    scores.add(f"{where}.clip_truncated", label, having("clip_truncated"))


def _boxes(
    run: Run,
    scores: Scores,
    judge: str,
    by_pair: Mapping[Pair, dict[str, Row]],
    samples: Sequence[Sample],
) -> None:
    """Experiment 6: boxes of the images against those of the originals, and the noise floor where the truth is known."""
    read = {
        pair: {id: boxes_of(row) for id, row in rows.items() if row.get("boxes") is not None}
        for pair, rows in by_pair.items()
    }
    originals = read.get(_ORIGINALS, {})
    if not originals:
        return
    truth = {s.id: true_boxes(s.scene) for s in samples if s.scene is not None}
    text = "originals against the truth (noise floor)"
    measure_boxes(scores, f"{ORIGINAL}.{judge}", text, truth, originals)
    for pair in pairs(run):
        measure_boxes(scores, *_naming(judge, pair), originals, read.get(pair, {}))


def _distances(
    run: Run,
    scores: Scores,
    judge: str,
    by_pair: Mapping[Pair, dict[str, Row]],
    samples: Sequence[Sample],
    seed: int,
) -> None:
    """FID and KID, over the samples of which every source has an image: one n and one real set for all."""
    if not (run.folder / "features" / judge).is_dir() or len(by_pair) < 2:
        return
    shared = set.intersection(*(set(rows) for rows in by_pair.values()))
    rows = np.array([row for row, sample in enumerate(samples) if sample.id in shared], int)
    if len(rows) < 2:
        scores.notes.append(
            f"{judge}: a distance needs two samples of which every source has an image"
        )
        return
    if len(rows) < len(samples):
        scores.notes.append(
            f"{judge}: distances leave out {len(samples) - len(rows)} of {len(samples)} samples, of which a source has no image"
        )
    features = Features(run, judge, len(samples))

    def read(pair: Pair) -> NDArray[np.float32]:
        found = features.read(*pair)
        return found if len(rows) == len(found) else found[rows]

    real = read(_ORIGINALS)
    if reason := too_few_images(len(rows), real.shape[1]):
        scores.notes.append(f"{judge}: {reason}")
    if len(rows) < FEWEST_FOR_KERNEL:
        return
    for pair in sorted(by_pair.keys() - {_ORIGINALS}):
        where, text = _naming(judge, pair)
        generated = read(pair)
        if len(rows) >= real.shape[1]:
            fid = frechet_estimate(real, generated, seed)
            label = f"{text}: FID ({judge}, interval 1.96 SE)"
            scores.figures.append(Figure(f"{where}.fid", label, fid, "distance"))
        kid = kernel_estimate(real, generated, seed, paired=True)
        label = f"{text}: KID ({judge}, interval 1.96 SE)"
        scores.figures.append(Figure(f"{where}.kid", label, kid, "distance"))


def _generation(run: Run, scores: Scores, num: int) -> None:
    """What was cut, what failed, what it cost."""

    def note_failures(of: str, what: str, rows: Sequence[Row]) -> None:
        if failed := sum(row.get("error") is not None for row in rows):
            scores.notes.append(f"{of}: {failed} of {num} {what} failed")

    for source in sources_of(run):
        rows = run.all_rows(f"captions/{source.name}", CAPTION_KEY)
        add_cost(scores, source.name, rows)
        note_failures(source.name, "captions", rows)
    for name, guidance in pairs(run):
        rows = run.all_rows(table_name(name, guidance), IMAGE_KEY)
        cut = {r["id"]: float(r["truncated"]) for r in rows if r.get("truncated") is not None}
        text = f"{name}, guidance {guidance:g}"
        label = f"{text}: texts cut by the generator"
        scores.add(f"{name}.g{guidance:g}.truncated", label, cut)
        note_failures(text, "images", rows)
