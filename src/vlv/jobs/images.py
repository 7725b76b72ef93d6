"""Images from caption embeddings and texts: reconstructed, generated, mixed; PNG files that carry their settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, Self, TypeVar

from PIL import Image
from torch import Tensor

from vlv.errors import ConfigError, OutputError
from vlv.jobs.inputs import check_embeddings, embeddings, good_items, open_batches, open_record
from vlv.jobs.pictures import read_settings, slug, write_png
from vlv.jobs.sidecars import find_collisions
from vlv.jobs.tally import Tally
from vlv.pages import sheet
from vlv.storage import Json, differences, plain

if TYPE_CHECKING:
    from vlv.data.records import Record
    from vlv.models.context import Context
    from vlv.models.diffusion import Sampler
    from vlv.models.mixing import MixMode
    from vlv.models.pipeline import VLVPipeline

OnExisting = Literal["skip", "overwrite", "error"]
Number = TypeVar("Number", int, float)
PAIRS_PER_SHEET, PAIRS_IN_ROW = 32, 4


@dataclass(frozen=True)
class SampleSettings:
    """Everything that a sampled image depends on, besides what it is sampled from.

    Attributes:
        model: Name or folder of the model.
        revision: Its revision on the hub.
        steps: Denoising steps.
        guidance: Guidance scale; 1 is none.
        sampler: ``dpm``, ``ddim`` or ``ddpm``.
        seed: Seed of the first noise, the same for every image.
    """

    model: str
    revision: str | None = None
    steps: int = 20
    guidance: float = 2.0
    sampler: Sampler = "dpm"
    seed: int = 0


def draw(
    pipe: VLVPipeline, context: Context, settings: SampleSettings, negative: Context | None = None
) -> list[Image.Image]:
    """Sample one image per context, all from the same first noise, so that batches do not matter."""
    return pipe.draw(
        context,
        seed=settings.seed,
        steps=settings.steps,
        guidance=settings.guidance,
        sampler=settings.sampler,
        negative=negative,
    )


def is_made(path: Path, settings: Json, on_existing: OnExisting) -> bool:
    """Whether an image is there that was made with these settings, and is to stay.

    Raises:
        OutputError: Another image is there, or any at all and ``on_existing`` is ``error``.
    """
    if on_existing == "overwrite" or not path.exists():
        return False
    if on_existing == "error":
        raise OutputError(f"{path} exists; name another output, or use --on-existing skip")
    written, wanted = read_settings(path), plain(settings)
    shared = {name: value for name, value in (written or {}).items() if name in wanted}
    if written is None or differences(shared, wanted):
        raise OutputError(
            f"{path} exists and was not made with these settings; name another output, "
            "or use --on-existing overwrite"
        )
    return True


# Reconstruct -------------------------------------------------------------------------------------


class ReconstructJob:
    """The images that are to be reconstructed, and the way to do it.

    Building it reads and checks, and writes nothing.

    Args:
        records: Images to reconstruct.
        settings: How.
        folder: Where the PNG files go; they keep the names and subfolders of the inputs.
        on_existing: What to do with files that are there.

    Attributes:
        todo: Images that will be reconstructed.
        refused: Images that cannot be, and why: their files would have the same name.
        skipped: How many are there already.

    Raises:
        OutputError: A file is there that was made with other settings, or would replace an input.
    """

    def __init__(
        self,
        records: Sequence[Record],
        settings: SampleSettings,
        folder: Path,
        on_existing: OnExisting = "skip",
    ) -> None:
        self.settings, self.folder, self.records = settings, folder, records
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file; name a folder for the images")
        for record in records:
            path = self.path(record)
            if isinstance(record.source, Path) and path.resolve() == record.source.resolve():
                raise OutputError(
                    f"{path} is an input and would be overwritten; name another folder"
                )
        collisions = find_collisions(records, self.path)
        self.refused = [(r, collisions[r.id]) for r in records if r.id in collisions]
        good = [record for record in records if record.id not in collisions]
        about = asdict(settings)
        self.todo = [r for r in good if not is_made(self.path(r), about, on_existing)]
        self.skipped = len(good) - len(self.todo)

    def path(self, record: Record) -> Path:
        """PNG file of a record."""
        parts = [part for part in PurePosixPath(record.id).parts if part not in {"/", "..", "."}]
        relative = Path(*parts)
        return self.folder / (
            relative.with_suffix(".png") if isinstance(record.source, Path) else f"{relative}.png"
        )

    def run(
        self,
        load: Callable[[], VLVPipeline],
        *,
        batch_size: int = 4,
        report: Callable[[Sequence[str | None]], None] = lambda errors: None,
    ) -> Tally:
        """Reconstruct the images that are missing.

        Args:
            load: Loads the model; called only when there is something to do.
            batch_size: Images processed together.
            report: Receives the error of every image of a batch, or None.
        """
        tally = Tally(skipped=self.skipped, failed=len(self.refused))
        report([why for _, why in self.refused])
        if not self.todo:
            return tally
        pipe = load()
        check_embeddings(pipe, self.todo)
        tally.restart()
        for batch in open_batches(self.todo, batch_size, pipe.image_size, pipe.framing):
            good = good_items(batch)
            images = draw(pipe, pipe.context(embeddings(pipe, good)), self.settings) if good else []
            for item, image in zip(good, images, strict=True):
                source = {"source": item.record.name, "sha256": item.sha256}
                write_png(self.path(item.record), image, {**asdict(self.settings), **source})
            tally.done += len(good)
            tally.failed += len(batch) - len(good)
            report([item.error for item in batch])
        return tally

    def write_sheets(self) -> list[Path]:
        """Lay originals and reconstructions side by side; return the sheets.

        Raises:
            OutputError: A file of another origin has the name of a sheet.
        """
        finished = [record for record in self.records if self.path(record).exists()]
        paths = []
        for start in range(0, len(finished), PAIRS_PER_SHEET):
            pairs = list(self._pairs(finished[start : start + PAIRS_PER_SHEET]))
            if pairs:
                size = pairs[0][1].size
                images = [
                    image.resize(size, Image.Resampling.BICUBIC) for pair in pairs for image in pair
                ]
                path = self.folder / f"sheet-{start // PAIRS_PER_SHEET:03d}.png"
                if path.exists() and read_settings(path) is None:
                    raise OutputError(f"{path} was not written by vlv and is kept; move it away")
                write_png(path, sheet(images, 2 * PAIRS_IN_ROW), asdict(self.settings))
                paths.append(path)
        return paths

    def _pairs(self, records: Sequence[Record]) -> Iterator[tuple[Image.Image, Image.Image]]:
        for record in records:
            with Image.open(self.path(record)) as file:
                right = file.convert("RGB")
            left = open_record(record, right.width).image
            if left is not None:
                yield left, right


# Generate ----------------------------------------------------------------------------------------


def generate_files(
    load: Callable[[], VLVPipeline],
    texts: Sequence[str],
    folder: Path,
    settings: SampleSettings,
    on_existing: OnExisting = "skip",
    negative: str | None = None,
) -> tuple[list[Path], Tally]:
    """Generate one image per text into ``folder``, in files that are named after the texts.

    Args:
        load: Loads the model; called only when there is something to do.
        texts: What to show.
        folder: Where the files go.
        settings: How.
        on_existing: A file of the same text and settings is kept, replaced or refused; one of others gets a
            neighbour with a number, unless files are replaced or refused.
        negative: What the images must not show.

    Returns:
        The files, and the counts: ``truncated`` texts were longer than the decoder reads.
    """
    if blank := [number for number, text in enumerate(texts, start=1) if not text.strip()]:
        raise ConfigError(f"text number {blank[0]} is empty; describe an image in words")
    tally, paths = Tally(), []
    pipe: VLVPipeline | None = None
    for text in texts:
        about = {**asdict(settings), "text": text, "negative": negative}
        path, there = _place(folder, slug(text), about, on_existing)
        paths.append(path)
        if there:
            tally.skipped += 1
            continue
        if pipe is None:
            pipe = load()
            tally.restart()
        context = pipe.decoder.encode_text([text])
        away = None if negative is None else pipe.decoder.encode_text([negative]).c
        (image,) = draw(pipe, context.c, settings, away)
        write_png(path, image, about)
        tally.done += 1
        tally.truncated += int(context.num_truncated)
    return paths, tally


def _place(folder: Path, stem: str, about: Json, on_existing: OnExisting) -> tuple[Path, bool]:
    """The file for an image, and whether the image is there."""
    names = (f"{stem}.png", *(f"{stem}-{number}.png" for number in range(2, 10_000)))
    for path in (folder / name for name in names):
        if on_existing == "skip" and path.exists() and read_settings(path) != plain(about):
            continue
        return path, is_made(path, about, on_existing)
    raise OutputError(f"{folder} holds ten thousand images of {stem}; name another folder")


# Mix ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixSettings:
    """How embeddings are put together.

    Attributes:
        mode: ``concat`` joins leading vectors; ``average`` and ``slerp`` blend position by position.
        keep: Vectors taken of each embedding, for ``concat``; None shares them evenly.
        weights: Share of each embedding, for the other two; None is equal shares.
    """

    mode: MixMode
    keep: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None

    @classmethod
    def parse(
        cls, num_images: int, keep: str | None, weights: str | None, mode: MixMode | None
    ) -> Self:
        """Make sense of what the command line says.

        >>> MixSettings.parse(2, "20,12", None, None)
        MixSettings(mode='concat', keep=(20, 12), weights=None)

        Raises:
            ConfigError: The options contradict each other or do not fit the number of images.
        """
        if num_images < 2:
            raise ConfigError(f"{num_images} image cannot be mixed; name two or more")
        if keep is not None and (weights is not None or mode in {"average", "slerp"}):
            raise ConfigError("--keep belongs to --mode concat; blend with --weights instead")
        if mode == "concat" and weights is not None:
            raise ConfigError(
                "--weights belongs to --mode average or slerp; use --keep with concat"
            )
        if keep is not None:
            return cls("concat", keep=tuple(_numbers(keep, int, num_images, "--keep 20,12")))
        if weights is None:
            return cls(mode or "concat")
        shares = tuple(_numbers(weights, float, num_images, "--weights .5,.5"))
        return cls(mode or "average", weights=shares)


def _numbers(text: str, kind: type[Number], count: int, example: str) -> list[Number]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r} is no list of numbers; write it as {example}") from None
    if len(numbers) != count:
        raise ConfigError(
            f"{text!r} has {len(numbers)} numbers for {count} images; give one for each"
        )
    return numbers


def mix_files(
    load: Callable[[], VLVPipeline],
    records: Sequence[Record],
    output: Path,
    how: MixSettings,
    settings: SampleSettings,
    on_existing: OnExisting = "skip",
    negative: Record | None = None,
) -> bool:
    """Mix the embeddings of images, or embeddings themselves, and make an image of the result, a PNG file.

    Args:
        load: Loads the model; called only when there is something to do.
        records: Two or more.
        output: The PNG file.
        how: How the embeddings are put together.
        settings: How the image is sampled.
        on_existing: What to do with a file that is there.
        negative: An image, or an embedding, that the result must not resemble.

    Returns:
        Whether it was made; False where it was there.

    Raises:
        DataError: An input cannot be read, or is an embedding of another model.
        OutputError: The output is one of the inputs, is no ``.png``, or exists and was made otherwise.
    """
    if output.suffix.lower() != ".png":
        raise OutputError(f"{output} must end in .png")
    given = [*records, *([negative] if negative is not None else [])]
    files = {record.source.resolve() for record in given if isinstance(record.source, Path)}
    if output.resolve() in files:
        raise OutputError(f"{output} is an input and would be overwritten; name another file")
    about = {**asdict(settings), **asdict(how), "sources": [record.name for record in records]}
    about["negative"] = None if negative is None else negative.name
    items = [_content(record) for record in records]
    unwanted = None if negative is None else _content(negative)
    if is_made(output, about, on_existing):
        return False
    pipe = load()
    check_embeddings(pipe, given)
    away = None
    if unwanted is not None:
        away = pipe.context(unwanted if isinstance(unwanted, Tensor) else pipe.embed(unwanted))
    z = pipe.mix(items, keep=how.keep, weights=how.weights, mode=how.mode)
    (image,) = draw(pipe, pipe.context(z), settings, away)
    write_png(output, image, about)
    return True


def _content(record: Record) -> Tensor | Image.Image:
    return record.embedding() if record.is_embedding else record.load()
