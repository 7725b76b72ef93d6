"""One image from the caption embeddings of several (paper, section 4.4.2)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self, TypeVar

from vlv.data.images import load_image
from vlv.errors import ConfigError, OutputError
from vlv.jobs.pictures import write_png
from vlv.jobs.reconstruct import SampleSettings, draw

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vlv.models.mixing import MixMode
    from vlv.models.pipeline import VLVPipeline

Number = TypeVar("Number", int, float)


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
    pipe: VLVPipeline,
    inputs: Sequence[Path],
    output: Path,
    how: MixSettings,
    settings: SampleSettings,
) -> None:
    """Mix the embeddings of some image files and draw the result into ``output``, a PNG file.

    Raises:
        ImageError: A file is no readable image.
        OutputError: The output is one of the inputs, or is no ``.png``.
    """
    if output.suffix.lower() != ".png":
        raise OutputError(f"{output} must end in .png")
    if output.resolve() in {path.resolve() for path in inputs}:
        raise OutputError(f"{output} is an input and would be overwritten; name another file")
    images = [load_image(path) for path in inputs]
    z = pipe.mix(images, keep=how.keep, weights=how.weights, mode=how.mode)
    (image,) = draw(pipe, pipe.context(z), settings)
    sources = {"sources": [str(path) for path in inputs]}
    write_png(output, image, {**asdict(settings), **asdict(how), **sources})
