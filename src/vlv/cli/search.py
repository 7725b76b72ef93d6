"""``vlv index`` and ``vlv search``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlv.cli import common
from vlv.cli.options import option_group, options, takes_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlv.models.pipeline import VLVPipeline
    from vlv.search.index import Hit, Index, Query

app = typer.Typer(
    name="index", help="Make images searchable by text and by image.", no_args_is_help=True
)


@app.callback()
def _group() -> None:
    """Make images searchable by text and by image."""


@options
class BuildOptions:
    """Options of ``vlv index build``."""

    source: common.InputOptions
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="INDEX", help="Folder of the index.")
    ]
    space: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Search space that was fitted to the model; MODEL/search.safetensors by default.",
        ),
    ] = None
    batch_size: common.BatchSize = 32
    model: common.ModelOptions


@app.command()
@takes_options
def build(given: BuildOptions) -> int:
    """Build an index of images, or add to one what is new.

    A build that was interrupted, or killed, goes on when the same command is given again.
    """
    from vlv.errors import DataError
    from vlv.models.search_space import Space
    from vlv.search.build import IndexJob, ModelName

    placement = given.model.placement()
    space = None if given.space is None else Space.load(given.space)
    name = ModelName(given.model.model, given.model.revision, given.model.adapter)
    job = IndexJob(given.source.find(), name, given.output, space)
    with common.Progress(len(job.todo), resumable=False) as progress:
        tally = job.run(
            lambda: given.model.load(["search"], placement),
            batch_size=given.batch_size,
            report=lambda batch: progress.report([item.error for item in batch]),
        )
    if tally.done == tally.skipped == 0:
        raise DataError(f"none of the inputs could be embedded, so {given.output} holds none")
    return common.close(tally, given.output)


@options
class FitOptions:
    """Options of ``vlv index fit``."""

    source: common.InputOptions
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="FILE.safetensors, for vlv index build --space."
        ),
    ]
    caption_column: common.CaptionColumn = None
    variants: Annotated[
        str | None,
        typer.Option(
            metavar="INPUT",
            help="The same images in another style, light or crop, under the same names: images are found beyond these differences.",
        ),
    ] = None
    width: Annotated[int, typer.Option(min=1, help="Numbers of a token in the index.")] = 128
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an image in the index.")] = 16
    steps: Annotated[int, typer.Option(min=1, help="Batches to learn from.")] = 1000
    fit_batch: Annotated[
        int, typer.Option(min=2, help="Images among which a caption has to find its own.")
    ] = 128
    seed: common.Seed = 0
    batch_size: common.BatchSize = 32
    model: common.ModelOptions


@app.command()
@takes_options
def fit(given: FitOptions) -> int:
    """Fit a search space to a model, from images with captions: texts find images better, and an index becomes smaller.

    A small network is learnt, under which a caption and its sentences find their own image among others.
    """
    from vlv.data.source import find_records
    from vlv.errors import OutputError
    from vlv.search.fit import fit_space, read_pairs
    from vlv.storage import check_writable
    from vlv.training.search_space import FitPlan

    plan = FitPlan(given.width, given.tokens, given.steps, given.fit_batch, seed=given.seed)
    if given.output.suffix != ".safetensors":
        raise OutputError(f"{given.output} must end in .safetensors")
    check_writable(given.output)
    records = given.source.find(given.caption_column, detail="texts")
    variants = find_records([given.variants]) if given.variants else []
    pipe = given.model.load(["search"])
    total = len(records) + len(variants)
    with common.Progress(total, what="embedding", resumable=False) as progress:
        captioned = read_pairs(
            pipe,
            records,
            variants,
            batch_size=given.batch_size,
            report=lambda batch: progress.report([item.error for item in batch]),
        )
    with common.Progress(plan.steps, what="fitting", unit="step", resumable=False) as progress:
        space = fit_space(pipe, captioned, plan, lambda loss: progress.advance())
    space.save(given.output)
    pairs = f", {captioned.num_variants} of them with a variant" if variants else ""
    common.say(f"fitted to {len(captioned.c)} images{pairs}: {given.output}")
    return 0


@options
class DuplicatesOptions:
    """Options of ``vlv index duplicates``."""

    index: Annotated[Path, typer.Argument(metavar="INDEX", help="Folder of vlv index build.")]
    at_least: Annotated[
        float, typer.Option(min=-1, max=1, help="How alike two images must be; 1 is the same.")
    ] = 0.97
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="FILE.jsonl: one line for each image.")
    ] = None


@app.command()
@takes_options
def duplicates(given: DuplicatesOptions) -> int:
    """List groups of images that show nearly the same; the model is not loaded."""
    from vlv.errors import OutputError
    from vlv.search.duplicates import near_duplicates
    from vlv.search.store import Store
    from vlv.storage import check_writable, to_line, write_text

    if given.output is not None and given.output.suffix != ".jsonl":
        raise OutputError(f"{given.output} must end in .jsonl")
    check_writable(given.output)
    store = Store(given.index)
    with common.Progress(len(store), resumable=False) as progress:
        groups = near_duplicates(store, given.at_least, progress.advance)
    rows = [{"group": n, **store.image(key)} for n, keys in enumerate(groups, 1) for key in keys]
    if given.output is not None:
        write_text(given.output, "".join(to_line(row).decode() for row in rows))
    else:
        for row in rows:
            typer.echo(f"{row['group']}\t{row['file_name']}")
    common.say(f"{len(groups)} groups of {len(rows)} images among {len(store)}")
    return 0


@option_group("Query")
class QueryOptions:
    """What is searched for: one of three."""

    text: Annotated[str | None, typer.Argument(help="What to find, in words.")] = None
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Or images that are like this one.")
    ] = None
    z: Annotated[
        Path | None,
        typer.Option(
            "--z",
            metavar="FILE",
            help="Or like these caption embeddings of vlv embed, each a query of its own.",
        ),
    ] = None

    def check(self) -> None:
        """Refuse no query, several, and an empty one."""
        from vlv.errors import ConfigError

        if sum(x is not None for x in (self.text, self.image, self.z)) != 1:
            raise ConfigError("give one query: a text, --image FILE or --z FILE")
        if self.text is not None and not self.text.strip():
            raise ConfigError("the query is empty; describe in words what to find")

    def ask(self, index: Index) -> list[tuple[str, Query]]:
        """Queries under the names that they are shown by."""
        from vlv.data.source import find_records
        from vlv.errors import DataError
        from vlv.jobs.inputs import check_embeddings

        if self.text is not None:
            return [(self.text, index.text_queries([self.text])[0])]
        records = find_records([str(self.image or self.z)])
        if any(record.is_embedding != (self.z is not None) for record in records):
            wanted = "embeddings that vlv embed wrote" if self.z else "an image"
            raise DataError(f"{self.image or self.z}: the query must be {wanted}")
        check_embeddings(index.pipe, records)
        if self.z is None:
            (record, *others) = records
            if others:
                raise DataError(f"{self.image} holds {len(records)} images; name one")
            return [(record.id, index.image_queries(index.pipe.embed([record.load()]))[0])]
        return [(r.id, index.image_queries(r.embedding()[None])[0]) for r in records]


@options
class SearchOptions:
    """Options of ``vlv search``."""

    index: Annotated[Path, typer.Argument(metavar="INDEX", help="Folder of vlv index build.")]
    query: QueryOptions
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="How many images.")] = 10
    candidates: Annotated[
        int,
        typer.Option(min=1, max=100_000, help="Images that are compared token by token."),
    ] = 300
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="FILE.jsonl; - prints JSON lines."),
    ] = None
    page: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a contact sheet.")
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Where the index's model lies now; as it was named at first by default.",
        ),
    ] = None
    adapter: common.Adapter = None
    device: common.Device = "auto"
    dtype: common.DType = "auto"

    def open(self) -> Index:
        """The index with its model."""
        from vlv.search.index import Index

        return Index.open(
            self.index, load_model(self.index, self.model, self.adapter, self.device, self.dtype)
        )


def load_model(
    folder: Path, model: str | None, adapter: str | None, device: str, dtype: str
) -> VLVPipeline:
    """The model of an index, or one that stands for it."""
    from vlv.search.store import check_finished

    about = check_finished(folder)
    return common.load_pipeline(
        model or about["model"],
        ["search"],
        revision=None if model else about["revision"],
        adapter=adapter or (None if model else about["adapter"]),
        placement=common.placement(device, dtype),
    )


@takes_options
def search(given: SearchOptions) -> int:
    """Find the images of an index that are nearest to a text, an image or a caption embedding.

    Prints rank, score and file; the score is the mean cosine of late interaction, comparable within one query.
    """
    from vlv.errors import OutputError
    from vlv.search.page import make_page
    from vlv.storage import check_writable, to_line, write_text

    given.query.check()
    output = None if given.output in {None, "-"} else Path(str(given.output))
    for path, suffix in ((output, ".jsonl"), (given.page, ".html")):
        if path is not None and path.suffix != suffix:
            raise OutputError(f"{path} must end in {suffix}")
    check_writable(output, given.page)
    index = given.open()
    found = [
        (words, index.rank(query, given.k, given.candidates))
        for words, query in given.query.ask(index)
    ]
    rows = [{"query": words, **hit.to_dict()} for words, hits in found for hit in hits]
    if output is not None:
        write_text(output, "".join(to_line(row).decode() for row in rows))
        common.say(f"written: {output}")
    elif given.output == "-":
        for row in rows:
            typer.echo(json.dumps(row, ensure_ascii=False))
    else:
        _print(found)
    if given.page is not None:
        write_text(given.page, make_page(index, found, title="vlv search"))
        common.say(f"written: {given.page}")
    return 0


def _print(found: Sequence[tuple[str, Sequence[Hit]]]) -> None:
    for words, hits in found:
        if len(found) > 1:
            typer.echo(f"{words}:")
        for hit in hits:
            typer.echo(f"{hit.rank}\t{hit.score:.4f}\t{hit.file_name}")
