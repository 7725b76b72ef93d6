"""Images as they are sent to a teacher: upright, small enough, and without what a file says beside its pixels."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image

from vlv.errors import ConfigError
from vlv.jobs.inputs import open_record

if TYPE_CHECKING:
    from vlv.data.records import Record
    from vlv.jobs.inputs import Opened


@dataclass(frozen=True)
class Shrink:
    """How images are made smaller before they are sent.

    Attributes:
        max_side: Longest side, in pixels; smaller images stay as they are.
        quality: Of the JPEG, 1 to 100.
    """

    max_side: int = 1024
    quality: int = 90

    def __post_init__(self) -> None:
        if self.max_side < 16:
            raise ConfigError(
                f"an image of at most {self.max_side} pixels shows nothing; 16 is the least"
            )
        if not 1 <= self.quality <= 100:
            raise ConfigError(
                f"a JPEG quality of {self.quality} does not exist; it goes from 1 to 100"
            )

    def __call__(self, image: Image.Image) -> bytes:
        """An upright RGB image as a JPEG file, without EXIF: no place, no time, no camera."""
        side = max(image.size)
        if side > self.max_side:
            scale = self.max_side / side
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()


def prepare(record: Record, shrink: Shrink) -> tuple[Opened, bytes]:
    """Open a record and make its JPEG; for a bad file the bytes are empty and `Opened.error` says why."""
    opened = open_record(record)
    return opened, b"" if opened.image is None else shrink(opened.image)
