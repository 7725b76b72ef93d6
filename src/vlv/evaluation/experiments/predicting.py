"""The first step of an experiment: captions are written and images generated, those that are missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from vlv.evaluation.experiments.backends import Backends, dtype_of
from vlv.evaluation.experiments.generators import Generated, Job
from vlv.evaluation.experiments.run import Emit, Key, Report, Run, batches, by_id, silent
from vlv.evaluation.experiments.samples import Sample
from vlv.evaluation.experiments.sources import CAPTION_KEY, Source, open_images
from vlv.evaluation.experiments.viewing import (
    IMAGE_KEY,
    captions_of,
    image_path,
    sources_of,
    table_name,
)
from vlv.jobs.pictures import write_png
from vlv.jobs.table import Row
from vlv.jobs.tally import Tally
from vlv.models.batching import side_by_side

Jobs = Iterator[tuple[Sequence[Sample], Job]]
"""Batches, and what generates an image for each of their samples."""


def predict_captions(run: Run, backends: Backends, report: Report = silent) -> Tally:
    """Write the captions that are missing: experiments 1, 3 and 4 begin with this."""
    samples, total = run.data.samples(), Tally()
    for source in sources_of(run):
        if source.kind != "z":
            total += write_captions(run, source, samples, backends, report)
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

    wanted = [(sample.id, source.name) for sample in samples]
    table, about = f"captions/{source.name}", {"source": str(source)}
    return run.fill(table, CAPTION_KEY, about, wanted, make, report)


def generate_images(
    run: Run,
    source: Source,
    guidance: float,
    samples: Sequence[Sample],
    backends: Backends,
    report: Report,
) -> Tally:
    """Generate the images of a source that are missing, from captions or from caption embeddings."""
    steps, dtype = run.settings["steps"], dtype_of(run.settings)
    if source.kind == "z":

        def from_z(todo: Sequence[Sample], emit: Emit) -> Jobs:
            reconstructor = backends.reconstructor(source.value, steps, dtype)
            for batch in batches(todo, backends.batch_size):
                images, bad = open_images(batch)
                if bad:
                    emit(bad)
                if good := [sample for sample in batch if sample.id in images]:
                    seeds = [sample.seed for sample in good]
                    yield good, reconstructor.prepare_images(list(images.values()), seeds, guidance)

        return fill_images(run, source, guidance, samples, from_z, backends.workers, report)
    texts = {id: str(row["caption"]) for id, row in captions_of(run, source.name).items()}
    # a pipeline of diffusers works on one batch at a time
    workers = backends.workers if run.settings["generator"].startswith("model:") else 1

    def from_texts(todo: Sequence[Sample], emit: Emit) -> Jobs:
        generator = backends.generator(run.settings["generator"], steps, dtype)
        for batch in batches(todo, backends.batch_size):
            seeds = [sample.seed for sample in batch]
            yield batch, generator.prepare([texts[s.id] for s in batch], seeds, guidance)

    having = [sample for sample in samples if sample.id in texts]
    return fill_images(run, source, guidance, having, from_texts, workers, report)


def fill_images(
    run: Run,
    source: Source,
    guidance: float,
    samples: Sequence[Sample],
    jobs: Callable[[Sequence[Sample], Emit], Jobs],
    workers: int,
    report: Report,
) -> Tally:
    """Generate the images of a source that are missing, in a table of their own.

    Args:
        run: Whose.
        source: What they are generated from.
        guidance: Scale of the guidance.
        samples: One image each.
        jobs: From the samples without an image to what generates them; hands on rows of those that failed.
        workers: Batches generated side by side.
        report: Receives finished rows.
    """
    known = by_id(samples)
    about = {"source": str(source), **run.settings, "guidances": guidance}
    about.pop("sources", None)
    name = {"source": source.name, "guidance": guidance}

    def generate(work: tuple[Sequence[Sample], Job]) -> tuple[Sequence[Sample], Generated]:
        return work[0], work[1]()

    def make(missing: list[Key], emit: Emit) -> None:
        def failed(rows: Sequence[Row]) -> None:
            emit([{**row, **name} for row in rows])

        todo = [known[id] for id, *_ in missing]
        for batch, found in side_by_side(generate, jobs(todo, failed), workers):
            rows: list[Row] = []
            for number, (sample, image) in enumerate(zip(batch, found.images, strict=True)):
                columns = {**name, "steps": run.settings["steps"], "seed": sample.seed}
                write_png(image_path(run, source.name, guidance, sample.id), image, columns)
                cut = {} if found.truncated is None else {"truncated": found.truncated[number]}
                rows.append({"id": sample.id, **columns, "side": image.width, **cut})
            emit(rows)

    wanted = [(sample.id, source.name, guidance) for sample in samples]
    return run.fill(table_name(source.name, guidance), IMAGE_KEY, about, wanted, make, report)
