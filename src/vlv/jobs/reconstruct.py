"""Rebuild many images from their caption embeddings, as PNG files that carry their settings; resumable."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from PIL import Image

from vlv.errors import ConfigError, OutputError
from vlv.jobs.inputs import file_name, good_images, open_batches, open_record
from vlv.jobs.pictures import read_settings, sheet, slug, write_png
from vlv.jobs.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vlv.data.records import Record
    from vlv.jobs.inputs import Opened
    from vlv.models.context import Context
    from vlv.models.diffusion import Sampler
    from vlv.models.pipeline import VLVPipeline

OnExistingImage = Literal["skip", "overwrite", "error"]
PAIRS_PER_SHEET = 32


@dataclass(frozen=True)
class SampleSettings:
    """Everything that a sampled image depends on, besides what it is sampled from.

    Attributes:
        model: Name or folder of the model.
        revision: Its revision on the hub.
        steps: Denoising steps.
        guidance: Guidance scale; 1 is none.
        sampler: ``dpm`` or ``ddim``.
        seed: Seed of the first noise, the same for every image.
    """

    model: str
    revision: str | None = None
    steps: int = 20
    guidance: float = 2.0
    sampler: Sampler = "dpm"
    seed: int = 0


class ReconstructJob:
    """The images that are to be rebuilt, and the way to do it.

    Building it reads and checks, and writes nothing.

    Args:
        records: Images to rebuild.
        settings: How.
        folder: Where the PNG files go; they keep the names and subfolders of the inputs.
        on_existing: What to do with files that are there.

    Raises:
        OutputError: Two inputs would share a file, or a file is there that was made with other settings.
    """

    def __init__(
        self,
        records: Sequence[Record],
        settings: SampleSettings,
        folder: Path,
        on_existing: OnExistingImage = "skip",
    ) -> None:
        self.settings, self.folder, self.records = settings, folder, records
        self._check_names()
        self.todo = [
            r for r in records if on_existing == "overwrite" or not self._is_done(r, on_existing)
        ]
        self.skipped = len(records) - len(self.todo)

    def path(self, record: Record) -> Path:
        """PNG file of a record."""
        parts = [part for part in PurePosixPath(record.id).parts if part not in {"/", "..", "."}]
        relative = Path(*parts)
        return self.folder / (
            relative.with_suffix(".png") if isinstance(record.source, Path) else f"{relative}.png"
        )

    def _check_names(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"{self.folder} is a file; name a folder for the images")
        owners: dict[Path, Record] = {}
        for record in self.records:
            path = self.path(record)
            if path in owners:
                names = f"{file_name(record)} and {file_name(owners[path])}"
                raise OutputError(
                    f"{names} would share {path}; rename one of them or run them one by one"
                )
            if isinstance(record.source, Path) and path.resolve() == record.source.resolve():
                raise OutputError(
                    f"{path} is an input and would be overwritten; name another folder"
                )
            owners[path] = record

    def _is_done(self, record: Record, on_existing: OnExistingImage) -> bool:
        path = self.path(record)
        if not path.exists():
            return False
        if on_existing == "error":
            raise OutputError(f"{path} exists; name another folder, or use --on-existing skip")
        written = read_settings(path)
        if written is None or any(written.get(k) != v for k, v in asdict(self.settings).items()):
            raise OutputError(
                f"{path} exists and was not made with these settings; name another folder, "
                "or use --on-existing overwrite"
            )
        return True

    def run(
        self,
        load: Callable[[], VLVPipeline],
        *,
        batch_size: int = 4,
        report: Callable[[Sequence[Opened]], None] = lambda batch: None,
    ) -> Tally:
        """Rebuild the images that are missing; ``load`` is called only when there are some."""
        tally = Tally(skipped=self.skipped)
        if not self.todo:
            return tally
        pipe = load()
        tally.restart()
        for batch in open_batches(self.todo, batch_size, pipe.image_size, pipe.framing):
            good = [item for item in batch if item.error is None]
            for item, image in zip(good, self._rebuild(pipe, batch), strict=True):
                self._write(item, image)
            tally.done += len(good)
            tally.failed += len(batch) - len(good)
            report(batch)
        return tally

    def _rebuild(self, pipe: VLVPipeline, batch: Sequence[Opened]) -> list[Image.Image]:
        images = good_images(batch)
        if not images:
            return []
        context = pipe.context(pipe.embed(images))
        return draw(pipe, context, self.settings)

    def _write(self, item: Opened, image: Image.Image) -> None:
        source = {"source": file_name(item.record), "sha256": item.sha256}
        write_png(self.path(item.record), image, {**asdict(self.settings), **source})

    def write_sheets(self) -> list[Path]:
        """Lay originals and reconstructions side by side; return the sheets."""
        finished = [record for record in self.records if self.path(record).exists()]
        paths = []
        for start in range(0, len(finished), PAIRS_PER_SHEET):
            pairs = list(self._pairs(finished[start : start + PAIRS_PER_SHEET]))
            if pairs:
                paths.append(self.folder / f"sheet-{start // PAIRS_PER_SHEET:03d}.png")
                write_png(paths[-1], sheet(pairs), asdict(self.settings))
        return paths

    def _pairs(self, records: Sequence[Record]) -> Iterator[tuple[Image.Image, Image.Image]]:
        for record in records:
            with Image.open(self.path(record)) as file:
                right = file.convert("RGB")
            left = open_record(record, right.width).image
            if left is not None:
                yield left, right


def draw(pipe: VLVPipeline, context: Context, settings: SampleSettings) -> list[Image.Image]:
    """Draw one image per context, all from the same first noise, so that batches do not matter."""
    return pipe.draw(
        context,
        seed=settings.seed,
        steps=settings.steps,
        guidance=settings.guidance,
        sampler=settings.sampler,
    )


def generate_files(
    pipe: VLVPipeline, texts: Sequence[str], folder: Path, settings: SampleSettings
) -> tuple[list[Path], Tally]:
    """Draw one image per text into ``folder``; the names are made of the texts and never replace a file.

    Returns:
        The files, and the counts: ``truncated`` texts were longer than the decoder reads.
    """
    if blank := [number for number, text in enumerate(texts, start=1) if not text.strip()]:
        raise ConfigError(f"text number {blank[0]} is empty; describe an image in words")
    tally, paths = Tally(), []
    for text in texts:
        context = pipe.decoder.encode_text([text])
        (image,) = draw(pipe, context.c, settings)
        paths.append(_free_name(folder, slug(text)))
        write_png(paths[-1], image, {**asdict(settings), "text": text})
        tally.done += 1
        tally.truncated += int(context.num_truncated)
    return paths, tally


def _free_name(folder: Path, stem: str) -> Path:
    names = (f"{stem}.png", *(f"{stem}-{number}.png" for number in range(2, 10_000)))
    return next(folder / name for name in names if not (folder / name).exists())
