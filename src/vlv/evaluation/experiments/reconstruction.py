"""Experiments 1 and 2: how well do captions, and caption embeddings, rebuild a picture (paper, Tables 1, 4 and 5).

Every source of captions (and of embeddings) is drawn by one painter at every guidance, from the noise of the sample's seed, and
the pictures are measured against the originals. As the paper does not say how originals become squares, they are cropped in the
centre and brought to the size of the drawn pictures before anything looks at them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlv.data.images import load_image
from vlv.errors import ConfigError, DataError
from vlv.evaluation.experiments.backends import Backends, dtype_of, with_dtype
from vlv.evaluation.experiments.boxes import boxes_of, true_boxes
from vlv.evaluation.experiments.boxes import measure as measure_boxes
from vlv.evaluation.experiments.instruments import Instrument, Look
from vlv.evaluation.experiments.run import (
    Emit,
    Key,
    Report,
    Run,
    add,
    batches,
    by_id,
    fill,
)
from vlv.evaluation.experiments.samples import Sample
from vlv.evaluation.experiments.scoring import Scores
from vlv.evaluation.experiments.sources import (
    CAPTION_KEY,
    Source,
    open_pictures,
    parse_sources,
)
from vlv.evaluation.frechet import few_images, frechet_estimate, kernel_estimate
from vlv.evaluation.results import Figure
from vlv.jobs.pictures import write_png
from vlv.jobs.table import GrowingTable, Row
from vlv.jobs.tally import Tally

NAME = "reconstruction"
TITLE = "Pictures drawn from captions and from caption embeddings"
PICTURE_KEY = ("id", "source", "guidance")
ORIGINAL = "original"
"""Source of the originals in the tables of judgements; its guidance is 0."""


def settings(
    sources: Sequence[str],
    painter: str,
    steps: int,
    guidances: Sequence[float],
    dtype: str = "float32",
) -> dict[str, Any]:
    """What the predictions depend on beside the data.

    Args:
        sources: As `parse_source` reads them.
        painter: As `split_painter` reads it.
        steps: Denoising steps.
        guidances: Every source is drawn at each.
        dtype: Of the weights that draw and that make z, one of `DTYPES`; captions are always written in float32.

    Raises:
        ConfigError: A source or a number makes no sense.
    """
    if steps < 1 or not guidances or min(guidances) < 0:
        raise ConfigError(
            f"pictures need one or more steps and guidances of 0 or more, got {steps} and {list(guidances)}"
        )
    found = {
        "sources": {source.name: str(source) for source in parse_sources(sources)},
        "painter": painter,
        "steps": steps,
        "guidances": [float(g) for g in guidances],
    }
    return with_dtype(found, dtype)


def sources_of(run: Run) -> list[Source]:
    """The sources of a run."""
    return parse_sources([f"{name}={spec}" for name, spec in run.settings["sources"].items()])


# --- predict -----------------------------------------------------------------------------------------


def predict_captions(run: Run, backends: Backends, report: Report = lambda rows: None) -> Tally:
    """Write the captions that are missing: experiments 1, 3 and 4 begin with this."""
    samples, total = run.data.samples(), Tally()
    known = by_id(samples)
    for source in sources_of(run):
        if source.kind == "z":
            continue

        def make(missing: list[Key], emit: Emit, source: Source = source) -> None:
            captioner = backends.captioner(source, samples, run.data.seed)
            todo = [known[id] for id, _ in missing]
            captioner.write(todo, lambda rows: emit([{**r, "source": source.name} for r in rows]))

        name = f"captions/{source.name}"
        with run.filling(name, CAPTION_KEY, {"source": str(source)}) as table:
            wanted = [(sample.id, source.name) for sample in samples]
            total = add(total, fill(table, wanted, make, report))
    return total


def captions_of(run: Run, source: str) -> dict[str, Row]:
    """The captions of a source by sample id."""
    return {row["id"]: row for row in run.rows(f"captions/{source}", CAPTION_KEY)}


def predict(run: Run, backends: Backends, report: Report = lambda rows: None) -> Tally:
    """Write captions and draw pictures, those that are missing."""
    run.check(NAME)
    total = predict_captions(run, backends, report)
    samples = run.data.samples()
    for source in sources_of(run):
        for guidance in run.settings["guidances"]:
            name = table_name(source.name, guidance)
            about = {"source": str(source), **run.settings, "guidances": guidance}
            del about["sources"]
            with run.filling(name, PICTURE_KEY, about) as table:
                total = add(total, _draw(run, source, guidance, samples, backends, table, report))
    return total


def table_name(source: str, guidance: float) -> str:
    """The table that lists the pictures of a source at a guidance."""
    return f"pictures/{source}-g{guidance:g}"


def picture_path(run: Run, source: str, guidance: float, id: str) -> Path:
    """File of a drawn picture."""
    return run.folder / table_name(source, guidance) / f"{Path(id).with_suffix('')}.png"


def _draw(
    run: Run,
    source: Source,
    guidance: float,
    samples: Sequence[Sample],
    backends: Backends,
    table: GrowingTable,
    report: Report,
) -> Tally:
    known, written = by_id(samples), captions_of(run, source.name)
    steps, dtype = run.settings["steps"], dtype_of(run.settings)
    wanted = [
        (s.id, source.name, guidance) for s in samples if source.kind == "z" or s.id in written
    ]

    def save(
        emit: Emit, batch: Sequence[Sample], pictures: Sequence[Image.Image], **more: Any
    ) -> None:
        rows: list[Row] = []
        for number, (sample, picture) in enumerate(zip(batch, pictures, strict=True)):
            about = {
                "source": source.name,
                "guidance": guidance,
                "steps": steps,
                "seed": sample.seed,
            }
            write_png(picture_path(run, source.name, guidance, sample.id), picture, about)
            values = {name: column[number] for name, column in more.items()}
            rows.append({"id": sample.id, **about, "side": picture.width, **values})
        emit(rows)

    def from_z(missing: list[Key], emit: Emit) -> None:
        painter = backends.embedder(source.value, steps, dtype)
        for batch in batches([known[id] for id, *_ in missing], backends.batch_size):
            images, bad = open_pictures(batch)
            emit([{**row, "source": source.name, "guidance": guidance} for row in bad])
            good = [known[id] for id in images]
            if good:
                seeds = [sample.seed for sample in good]
                save(emit, good, painter.rebuild(list(images.values()), seeds, guidance))

    def from_text(missing: list[Key], emit: Emit) -> None:
        painter = backends.painter(run.settings["painter"], steps, dtype)
        for batch in batches([known[id] for id, *_ in missing], backends.batch_size):
            texts = [written[sample.id]["caption"] for sample in batch]
            drawn = painter.draw(texts, [sample.seed for sample in batch], guidance)
            save(emit, batch, drawn.pictures, truncated=drawn.truncated)

    return fill(table, wanted, from_z if source.kind == "z" else from_text, report)


# --- judge -------------------------------------------------------------------------------------------


def judge(
    run: Run,
    name: str,
    load: Callable[[], Instrument],
    batch_size: int,
    report: Report = lambda rows: None,
) -> Tally:
    """Let an instrument look at the originals and at all pictures, those that it has not seen.

    Args:
        run: Whose.
        name: Of the judge; its table is ``judgements/NAME.jsonl``.
        load: Loads the instrument.
        batch_size: Pictures looked at together.
        report: Receives finished rows.
    """
    run.check(NAME)
    drawn = pictures_of(run)
    if not drawn:
        raise DataError(f"{run.folder} has no pictures yet; begin with vlv eval predict")
    samples, instrument = run.data.samples(), load()
    looker = _Looker(run, name, instrument, samples, int(next(iter(drawn.values()))["side"]))

    def make(missing: list[Key], emit: Emit) -> None:
        for batch in batches(missing, batch_size):
            emit(looker.judge(batch))

    total = Tally()
    with run.filling(f"judgements/{name}", PICTURE_KEY, instrument.identity()) as table:
        for source, guidance in [(ORIGINAL, 0.0), *pairs(run)]:
            keys = [(sample.id, source, guidance) for sample in samples]
            wanted = [key for key in keys if source == ORIGINAL or key in drawn]
            total = add(total, fill(table, wanted, make, report))
    return total


class _Looker:
    """Hands pictures of one source and guidance to an instrument and keeps their features."""

    def __init__(
        self, run: Run, name: str, instrument: Instrument, samples: Sequence[Sample], side: int
    ) -> None:
        self._run, self._instrument, self._side = run, instrument, side
        self._samples = samples
        self._place = {sample.id: row for row, sample in enumerate(samples)}
        self._texts = {s.name: captions_of(run, s.name) for s in sources_of(run)}
        self._shelf = Features(run, name, len(samples), instrument.width)

    def judge(self, batch: Sequence[Key]) -> list[Row]:
        """A row for every key."""
        rows_of = [self._samples[self._place[id]] for id, *_ in batch]
        keys, pictures, originals, bad = self._open(batch, rows_of)
        if not keys:
            return bad
        at = [self._place[id] for id, *_ in keys]
        captions = [
            self._texts.get(source, {}).get(id, {}).get("caption") for id, source, _ in keys
        ]
        look = Look(pictures, originals, [self._samples[row] for row in at], captions)
        _, source, guidance = keys[0]
        compared = source != ORIGINAL and self._instrument.width > 0
        before = self._shelf.read(ORIGINAL, 0.0)[at] if compared else None
        features, found = self._instrument.judge(look, before)
        if features is not None:
            self._shelf.write(source, guidance, at, features)
        return bad + [
            {**dict(zip(PICTURE_KEY, key, strict=True)), **columns}
            for key, columns in zip(keys, found, strict=True)
        ]

    def _open(
        self, keys: Sequence[Key], samples: Sequence[Sample]
    ) -> tuple[list[Key], list[Image.Image], list[Image.Image], list[Row]]:
        """Keys whose files can be opened, with pictures and originals, and a row for each of the others."""
        good, pictures, originals, bad = [], [], [], []
        for key, sample in zip(keys, samples, strict=True):
            id, source, guidance = key
            try:
                original = None
                if source == ORIGINAL or self._instrument.compares_pixels:
                    original = sample.square(self._side)
                path = picture_path(self._run, source, guidance, id)
                picture = original if source == ORIGINAL else load_image(path)
            except DataError as error:
                bad.append({**dict(zip(PICTURE_KEY, key, strict=True)), "error": str(error)})
                continue
            assert picture is not None, "an original was opened"
            good.append(key)
            pictures.append(picture)
            if original is not None:
                originals.append(original)
        return good, pictures, originals, bad


def pairs(run: Run) -> list[tuple[str, float]]:
    """Every source at every guidance."""
    return [(s.name, float(g)) for s in sources_of(run) for g in run.settings["guidances"]]


def pictures_of(run: Run) -> dict[Key, Row]:
    """The rows of all pictures that were drawn, by their key."""
    rows = [row for pair in pairs(run) for row in run.rows(table_name(*pair), PICTURE_KEY)]
    return {tuple(row[name] for name in PICTURE_KEY): row for row in rows}


class Features:
    """Features of all pictures of a run as files of floats, a row for each sample; they are mapped, not read.

    Args:
        run: Whose.
        judge: Name of the judge.
        num: N, samples.
        width: W; 0 keeps nothing.
    """

    def __init__(self, run: Run, judge: str, num: int, width: int) -> None:
        self._folder = run.folder / "features" / judge
        self._shape = (num, width)

    def _path(self, source: str, guidance: float) -> Path:
        return self._folder / f"{source}-g{guidance:g}.npy"

    def write(
        self, source: str, guidance: float, rows: Sequence[int], values: NDArray[np.float32]
    ) -> None:
        """Put features into their rows; they are on disk when this returns."""
        path = self._path(source, guidance)
        path.parent.mkdir(parents=True, exist_ok=True)
        mode: Any = "r+" if path.is_file() else "w+"
        shape = None if path.is_file() else self._shape
        file = np.lib.format.open_memmap(path, mode, dtype=np.float32, shape=shape)
        file[list(rows)] = values
        file.flush()

    def read(self, source: str, guidance: float) -> NDArray[np.float32]:
        """All rows, (N, W)."""
        path = self._path(source, guidance)
        if not path.is_file():
            raise DataError(f"there are no features {path}; judge the run again")
        return np.asarray(np.load(path, mmap_mode="r"))


# --- score -------------------------------------------------------------------------------------------


def score(run: Run, seed: int) -> Scores:
    """Figures of every source at every guidance by every judge."""
    run.check(NAME)
    scores, samples = Scores(), run.data.samples()
    names = run.judges("")
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
    """Experiment 6: boxes of the pictures against those of the originals, and the noise floor where the truth is known."""
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
    """FID and KID, over the samples of which every source has a picture: one n and one real set for all."""
    if not (run.folder / "features" / judge).is_dir() or len(by_pair) < 2:
        return
    shared = set.intersection(*(set(rows) for rows in by_pair.values()))
    rows = np.array([row for row, sample in enumerate(samples) if sample.id in shared], int)
    if len(rows) < 2:
        scores.notes.append(
            f"{judge}: a distance needs two samples of which every source has a picture"
        )
        return
    if len(rows) < len(samples):
        scores.notes.append(
            f"{judge}: distances leave out {len(samples) - len(rows)} of {len(samples)} samples, of which a source has no picture"
        )
    if remark := few_images(len(rows)):
        scores.notes.append(f"{judge}: {remark}")
    shelf = Features(run, judge, len(samples), 0)

    def read(source: str, guidance: float) -> NDArray[np.float32]:
        features = shelf.read(source, guidance)
        return features if len(rows) == len(features) else features[rows]

    real = read(ORIGINAL, 0.0)
    for source, guidance in sorted(by_pair.keys() - {(ORIGINAL, 0.0)}):
        where, text = f"{source}.g{guidance:g}.{judge}", f"{source}, guidance {guidance:g}"
        drawn = read(source, guidance)
        fid, kid = frechet_estimate(real, drawn, seed), kernel_estimate(real, drawn, seed)
        scores.figures += [
            Figure(f"{where}.fid", f"{text}: FID ({judge}, interval 1.96 SE)", fid, "distance"),
            Figure(f"{where}.kid", f"{text}: KID ({judge}, interval 1.96 SE)", kid, "distance"),
        ]


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
            f"{source_name}, guidance {guidance:g}: texts cut by the painter",
            cut,
        )
        failed = sum(row.get("error") is not None for row in rows)
        if failed:
            scores.notes.append(
                f"{source_name}, guidance {guidance:g}: {failed} of {num} pictures failed"
            )
