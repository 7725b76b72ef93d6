"""Experiments 1 and 2: how well do captions, and caption embeddings, reconstruct an image (paper, Tables 1, 4 and 5).

One generator draws from every source of captions (and of embeddings) at every guidance, from the noise of the sample's seed, and
the images are measured against the originals. As the paper does not say how originals become squares, they are cropped in the
centre and brought to the size of the generated images before anything looks at them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlv.errors import ConfigError, DataError
from vlv.evaluation.experiments.backends import Backends, dtype_of, with_dtype
from vlv.evaluation.experiments.boxes import boxes_of, true_boxes
from vlv.evaluation.experiments.boxes import measure as measure_boxes
from vlv.evaluation.experiments.generators import Drawn, Job
from vlv.evaluation.experiments.instruments import make_instrument
from vlv.evaluation.experiments.run import (
    Emit,
    Judge,
    Key,
    Report,
    Run,
    add,
    batches,
    by_id,
    fill,
    silent,
)
from vlv.evaluation.experiments.samples import Sample
from vlv.evaluation.experiments.scoring import Scores
from vlv.evaluation.experiments.sources import (
    CAPTION_KEY,
    Source,
    open_pictures,
    parse_sources,
)
from vlv.evaluation.experiments.viewing import (
    ORIGINAL,
    PICTURE_KEY,
    Features,
    Viewer,
    captions_of,
    pairs,
    picture_path,
    pictures_of,
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
from vlv.jobs.pictures import write_png
from vlv.jobs.table import Row
from vlv.jobs.tally import Tally
from vlv.models.batching import side_by_side

NAME = "reconstruction"
TITLE = "Images generated from captions and from caption embeddings"


def settings(
    sources: Sequence[str],
    generator: str,
    steps: int,
    guidances: Sequence[float],
    dtype: str = "float32",
) -> dict[str, Any]:
    """What the predictions depend on beside the data.

    Args:
        sources: As `parse_source` reads them.
        generator: As `split_generator` reads it.
        steps: Denoising steps.
        guidances: Every source is drawn at each.
        dtype: Of the weights that draw and that make z, one of `DTYPES`; captions are always written in float32.

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


# --- predict -----------------------------------------------------------------------------------------


def predict_captions(run: Run, backends: Backends, report: Report = silent) -> Tally:
    """Write the captions that are missing: experiments 1, 3 and 4 begin with this."""
    samples, total = run.data.samples(), Tally()
    for source in sources_of(run):
        if source.kind != "z":
            total = add(total, write_captions(run, source, samples, backends, report))
    return total


def write_captions(
    run: Run, source: Source, samples: Sequence[Sample], backends: Backends, report: Report
) -> Tally:
    """Write the captions of one source that are missing."""
    known = by_id(samples)

    def make(missing: list[Key], emit: Emit) -> None:
        captioner = backends.captioner(source, samples, run.data.seed)
        todo = [known[id] for id, _ in missing]
        captioner(todo, lambda rows: emit([{**r, "source": source.name} for r in rows]))

    with run.filling(f"captions/{source.name}", CAPTION_KEY, {"source": str(source)}) as table:
        return fill(table, [(sample.id, source.name) for sample in samples], make, report)


def predict(run: Run, backends: Backends, report: Report = silent) -> Tally:
    """Write captions and generate images, those that are missing."""
    run.check(NAME)
    total = predict_captions(run, backends, report)
    samples = run.data.samples()
    for source in sources_of(run):
        for guidance in run.settings["guidances"]:
            total = add(total, draw(run, source, guidance, samples, backends, report))
    return total


def draw(
    run: Run,
    source: Source,
    guidance: float,
    samples: Sequence[Sample],
    backends: Backends,
    report: Report,
) -> Tally:
    """Generate the images of a source that are missing."""
    known, texts = by_id(samples), captions_of(run, source.name)
    about = {"source": str(source), **run.settings, "guidances": guidance}
    del about["sources"]

    def make(missing: list[Key], emit: Emit) -> None:
        writer = _Writer(run, source.name, guidance, emit)
        todo = [known[id] for id, *_ in missing]
        if source.kind == "z":
            _from_z(writer, todo, source.value, backends)
        else:
            _from_texts(writer, [(s, str(texts[s.id]["caption"])) for s in todo], backends)

    wanted = [(s.id, source.name, guidance) for s in samples if source.kind == "z" or s.id in texts]
    with run.filling(table_name(source.name, guidance), PICTURE_KEY, about) as table:
        return fill(table, wanted, make, report)


def _from_z(writer: _Writer, samples: Sequence[Sample], model: str, backends: Backends) -> None:
    settings = writer.run.settings
    reconstructor = backends.reconstructor(model, settings["steps"], dtype_of(settings))

    def jobs() -> Iterator[tuple[Sequence[Sample], Job]]:
        for batch in batches(samples, backends.batch_size):
            images, bad = open_pictures(batch)
            if bad:
                writer.failed(bad)
            good = [sample for sample in batch if sample.id in images]
            if good:
                seeds = [sample.seed for sample in good]
                pictures = list(images.values())
                yield good, reconstructor.prepare_images(pictures, seeds, writer.guidance)

    writer.run_jobs(jobs(), backends.workers)


def _from_texts(writer: _Writer, texts: Sequence[tuple[Sample, str]], backends: Backends) -> None:
    settings = writer.run.settings
    generator = backends.generator(settings["generator"], settings["steps"], dtype_of(settings))

    def jobs() -> Iterator[tuple[Sequence[Sample], Job]]:
        for batch in batches(texts, backends.batch_size):
            samples = [sample for sample, _ in batch]
            seeds = [sample.seed for sample in samples]
            yield samples, generator.prepare([text for _, text in batch], seeds, writer.guidance)

    writer.run_jobs(jobs(), backends.workers if generator.parallel else 1)


@dataclass(frozen=True)
class _Writer:
    """Writes generated images, and hands on their rows."""

    run: Run
    source: str
    guidance: float
    emit: Emit

    def failed(self, rows: Sequence[Row]) -> None:
        """Samples that could not be opened."""
        self.emit([{**row, "source": self.source, "guidance": self.guidance} for row in rows])

    def run_jobs(self, jobs: Iterator[tuple[Sequence[Sample], Job]], workers: int) -> None:
        """Draw batches, on the CPU several side by side."""

        def draw(work: tuple[Sequence[Sample], Job]) -> tuple[Sequence[Sample], Drawn]:
            batch, job = work
            return batch, job()

        for batch, drawn in side_by_side(draw, jobs, workers):
            self._save(batch, drawn)

    def _save(self, batch: Sequence[Sample], drawn: Drawn) -> None:
        rows: list[Row] = []
        for number, (sample, image) in enumerate(zip(batch, drawn.images, strict=True)):
            about = {
                "source": self.source,
                "guidance": self.guidance,
                "steps": self.run.settings["steps"],
                "seed": sample.seed,
            }
            write_png(picture_path(self.run, self.source, self.guidance, sample.id), image, about)
            cut = {} if drawn.truncated is None else {"truncated": drawn.truncated[number]}
            rows.append({"id": sample.id, **about, "side": image.width, **cut})
        self.emit(rows)


# --- judge -------------------------------------------------------------------------------------------


def judge(run: Run, judge: Judge, backends: Backends, report: Report = silent) -> Tally:
    """Let an instrument look at the originals and at all generated images, those that it has not seen."""
    run.check(NAME)
    drawn = pictures_of(run)
    if not drawn:
        raise DataError(f"{run.folder} has no images yet; begin with vlv eval predict")
    samples = run.data.samples()
    keys = [
        [(s.id, source, guidance) for s in samples]
        for source, guidance in [(ORIGINAL, 0.0), *pairs(run)]
    ]
    wanted = [[key for key in group if key[1] == ORIGINAL or key in drawn] for group in keys]
    side = int(next(iter(drawn.values()))["side"])
    viewer = Viewer(run, judge.name, make_instrument(judge, backends), samples, side)
    return viewer.judge(wanted, backends.batch_size, report)


# --- score -------------------------------------------------------------------------------------------


def score(run: Run, seed: int) -> Scores:
    """Figures of every source at every guidance by every judge."""
    run.check(NAME)
    scores, samples = Scores(), run.data.samples()
    names = run.judges()
    for name in names:
        about = run.table_settings(f"judgements/{name}")
        scores.settings[f"judge {name}"] = about
        rows = run.rows(f"judgements/{name}", PICTURE_KEY)
        by_pair: dict[tuple[str, float], dict[str, Row]] = {}
        for row in rows:
            by_pair.setdefault((row["source"], float(row["guidance"])), {})[row["id"]] = row
        for source, guidance in [(ORIGINAL, 0.0), *pairs(run)]:
            _measure(scores, name, source, guidance, by_pair.get((source, guidance), {}))
        _boxes(run, scores, name, by_pair, samples)
        if any(
            row.get("claims") is None and about.get("instrument") == "inspector" for row in rows
        ):
            scores.notes.append(
                "the inspector knows the toy world only; elsewhere it gives features"
            )
        _distances(run, scores, name, by_pair, samples, seed)
    _drawing(run, scores, len(samples))
    return scores


def _measure(
    scores: Scores, judge: str, source: str, guidance: float, rows: dict[str, Row]
) -> None:
    where, text = f"{source}.g{guidance:g}.{judge}", f"{source}, guidance {guidance:g}"
    if source == ORIGINAL:
        where, text = f"{ORIGINAL}.{judge}", "originals"

    def having(column: str) -> dict[str, Any]:
        return {id: row[column] for id, row in rows.items() if row.get(column) is not None}

    claims = having("claims")
    scores.add(
        f"{where}.claims", f"{text}: true claims found", {k: (c, t) for k, (_, t, c) in claims.items()}, "ratio"
    )  # fmt: skip
    if source != ORIGINAL:
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
    by_pair: dict[tuple[str, float], dict[str, Row]],
    samples: Sequence[Sample],
) -> None:
    """Experiment 6: boxes of the images against those of the originals, and the noise floor where the truth is known."""
    read = {
        pair: {id: boxes_of(row) for id, row in rows.items() if row.get("boxes") is not None}
        for pair, rows in by_pair.items()
    }
    originals = read.get((ORIGINAL, 0.0), {})
    if not originals:
        return
    truth = {s.id: true_boxes(s.scene) for s in samples if s.scene is not None}
    text = "originals against the truth (noise floor)"
    measure_boxes(scores, f"{ORIGINAL}.{judge}", text, truth, originals)
    for source, guidance in pairs(run):
        where, text = f"{source}.g{guidance:g}.{judge}", f"{source}, guidance {guidance:g}"
        measure_boxes(scores, where, text, originals, read.get((source, guidance), {}))


def _distances(
    run: Run,
    scores: Scores,
    judge: str,
    by_pair: dict[tuple[str, float], dict[str, Row]],
    samples: Sequence[Sample],
    seed: int,
) -> None:
    """FID and KID, over the samples of which every source has a image: one n and one real set for all."""
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
    shelf = Features(run, judge, len(samples), 0)

    def read(source: str, guidance: float) -> NDArray[np.float32]:
        features = shelf.read(source, guidance)
        return features if len(rows) == len(features) else features[rows]

    real = read(ORIGINAL, 0.0)
    if reason := too_few_images(len(rows), real.shape[1]):
        scores.notes.append(f"{judge}: {reason}")
    if len(rows) < FEWEST_FOR_KERNEL:
        return
    for source, guidance in sorted(by_pair.keys() - {(ORIGINAL, 0.0)}):
        where, text = f"{source}.g{guidance:g}.{judge}", f"{source}, guidance {guidance:g}"
        drawn = read(source, guidance)
        if len(rows) >= real.shape[1]:
            fid = frechet_estimate(real, drawn, seed)
            label = f"{text}: FID ({judge}, interval 1.96 SE)"
            scores.figures.append(Figure(f"{where}.fid", label, fid, "distance"))
        kid = kernel_estimate(real, drawn, seed, paired=True)
        label = f"{text}: KID ({judge}, interval 1.96 SE)"
        scores.figures.append(Figure(f"{where}.kid", label, kid, "distance"))


def _drawing(run: Run, scores: Scores, num: int) -> None:
    """What was cut, what failed, what it cost."""
    for source in sources_of(run):
        captions = run.all_rows(f"captions/{source.name}", CAPTION_KEY)
        usd = sum(row.get("usd") or 0.0 for row in captions)
        if usd:
            scores.settings[f"cost of {source.name} in USD"] = usd
        failed = sum(row.get("error") is not None for row in captions)
        if failed:
            scores.notes.append(f"{source.name}: {failed} of {num} captions failed")
    for source_name, guidance in pairs(run):
        rows = run.all_rows(table_name(source_name, guidance), PICTURE_KEY)
        cut = {r["id"]: float(r["truncated"]) for r in rows if r.get("truncated") is not None}
        where = f"{source_name}.g{guidance:g}"
        scores.add(
            f"{where}.truncated",
            f"{source_name}, guidance {guidance:g}: texts cut by the generator",
            cut,
        )
        failed = sum(row.get("error") is not None for row in rows)
        if failed:
            scores.notes.append(
                f"{source_name}, guidance {guidance:g}: {failed} of {num} images failed"
            )
