"""Images that the workbench makes, as the command line would: reconstructions, mixes, and mixes along a path."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from vlv.data.framing import frame
from vlv.data.images import load_image
from vlv.data.records import Record
from vlv.data.source import Source
from vlv.errors import ConfigError, DataError
from vlv.jobs.images import MixSettings, ReconstructJob, SampleSettings, mix_files
from vlv.jobs.pictures import write_png
from vlv.pages import sheet
from vlv.ui import commands
from vlv.ui.commands import command

if TYPE_CHECKING:
    from vlv.models.mixing import MixMode
    from vlv.ui.commands import ModelFlags
    from vlv.ui.desk import Desk, Work

MOST_MIXED = 4
MOST_FRAMES = 25
FOLDERS = ("reconstructed", "mixed")
"""In the folder of the workbench."""


def _records(paths: Sequence[Path]) -> list[Record]:
    return [record for path in paths for record in Source([str(path)], detail="images").records()]


@dataclass(frozen=True)
class ReconstructPlan:
    """A reconstruction that is wanted.

    Attributes:
        image: Of what.
        settings: How.
        folder: Where it goes.
        flags: Which model.
    """

    image: Path
    settings: SampleSettings
    folder: Path
    flags: ModelFlags

    @property
    def command(self) -> str:
        """The command that does the same."""
        return command(
            "vlv",
            "reconstruct",
            *commands.inputs([str(self.image)]),
            *("--output", str(self.folder), "--on-existing", "overwrite"),
            *commands.sampling(self.settings),
            *self.flags.words(),
        )

    def run(self, desk: Desk, work: Work) -> tuple[Image.Image, Image.Image]:
        """Draw it; returns what the model sees of the image, and the reconstruction.

        Raises:
            VLVError: The image cannot be read, or the model lacks a part.
        """
        (record,) = _records([self.image])
        job = ReconstructJob([record], self.settings, self.folder, "overwrite")
        original = record.load()
        work.message = "loading the model"
        pipe = desk.pipe()
        work.message = ""
        errors: list[str | None] = []
        job.run(desk.pipe, batch_size=1, report=errors.extend)
        if found := [error for error in errors if error is not None]:
            raise DataError(found[0])
        return frame(original, pipe.image_size, pipe.framing), load_image(job.path(record))


@dataclass(frozen=True)
class MixPlan:
    """A mix, or several along a path, each from the same first noise.

    Attributes:
        images: Two or more.
        hows: How each mix is made.
        settings: How images are sampled.
        folder: Where they go.
        flags: Which model.
        negative: An image that no mix must resemble.
    """

    images: tuple[Path, ...]
    hows: tuple[MixSettings, ...]
    settings: SampleSettings
    folder: Path
    flags: ModelFlags
    negative: Path | None = None
    stem: str = field(init=False)

    def __post_init__(self) -> None:
        if not 2 <= len(self.images) <= MOST_MIXED:
            raise ConfigError(
                f"{len(self.images)} images are chosen; a mix takes 2 to {MOST_MIXED}"
            )
        names = "\0".join(str(path) for path in (*self.images, self.negative) if path)
        stem = f"mix-{hashlib.sha256(names.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
        object.__setattr__(self, "stem", stem)

    @property
    def outputs(self) -> list[Path]:
        """Files of the mixes."""
        if len(self.hows) == 1:
            return [self.folder / f"{self.stem}.png"]
        return [self.folder / f"{self.stem}-{n:02d}.png" for n in range(len(self.hows))]

    @property
    def strip(self) -> Path:
        """The mixes of a path side by side."""
        return self.folder / f"{self.stem}-strip.png"

    @property
    def commands(self) -> list[str]:
        """The commands that do the same, one for each mix."""
        return [
            command(
                "vlv",
                "mix",
                *commands.inputs([str(path) for path in self.images]),
                *commands.mixing(how),
                *commands.options([("--negative", self.negative, None)]),
                *("--output", str(output), "--on-existing", "overwrite"),
                *commands.sampling(self.settings),
                *self.flags.words(),
            )
            for how, output in zip(self.hows, self.outputs, strict=True)
        ]

    def run(self, desk: Desk, work: Work) -> list[Image.Image]:
        """Draw them; a stop keeps those that are drawn.

        Raises:
            VLVError: An image cannot be read, the settings contradict each other, or the model lacks a part.
        """
        records = _records(self.images)
        negative = None if self.negative is None else _records([self.negative])[0]
        work.total, work.message = len(self.hows), "loading the model"
        desk.pipe()
        drawn: list[Image.Image] = []
        for how, output in zip(self.hows, self.outputs, strict=True):
            mix_files(desk.pipe, records, output, how, self.settings, "overwrite", negative)
            drawn.append(load_image(output))
            work.advance()
        if len(drawn) > 1:
            write_png(
                self.strip, sheet(drawn, len(drawn)), {"frames": [str(x) for x in self.outputs]}
            )
        return drawn


def path_of(mode: MixMode, num_frames: int, num_tokens: int) -> tuple[MixSettings, ...]:
    """Mixes of two images on the way from the first to the second.

    With "concat" the first image gives up its tokens to the second one; otherwise the weight moves.

    >>> [how.weights for how in path_of("slerp", 3, 77)]
    [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    >>> [how.keep for how in path_of("concat", 3, 64)]
    [(64, 0), (32, 32), (0, 64)]

    Raises:
        ConfigError: The number of frames makes no sense.
    """
    if not 2 <= num_frames <= MOST_FRAMES:
        raise ConfigError(f"{num_frames} frames make no path; choose 2 to {MOST_FRAMES}")
    shares = [number / (num_frames - 1) for number in range(num_frames)]
    if mode == "concat":
        kept = [round(share * num_tokens) for share in shares]
        return tuple(MixSettings(mode, keep=(num_tokens - k, k)) for k in kept)
    return tuple(MixSettings(mode, weights=(round(1 - t, 4), round(t, 4))) for t in shares)


def mix_of(
    mode: MixMode, num_images: int, weights: Sequence[float], keep: Sequence[float]
) -> MixSettings:
    """How one mix is made, from a form that has a place for `MOST_MIXED` images."""
    if mode == "concat":
        return MixSettings(mode, keep=tuple(int(k) for k in keep[:num_images]))
    return MixSettings(mode, weights=tuple(round(float(w), 4) for w in weights[:num_images]))
