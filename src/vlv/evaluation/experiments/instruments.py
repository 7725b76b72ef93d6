"""What looks at pictures: pixels, the inspector of the toy world, feature extractors, CLIP.

An instrument is written ``KIND`` or ``KIND:VALUE``:

| instrument | says of each picture |
|---|---|
| ``pixels`` | PSNR to the original, in dB |
| ``inspector:FOLDER`` | claims against the scene's truth, 3-D boxes; features for toy FID and KID |
| ``inception:FILE`` | features for FID and KID |
| ``vision:MODEL`` | features of a vision backbone (DINOv2, CLIP) for the distances, and their cosine with the original's |
| ``clip:MODEL`` | CLIPScore of the picture with the text it was drawn from |
| ``boxes:MODEL@URL`` | 3-D boxes estimated by a vision model behind an address, see `vlv.evaluation.experiments.boxes` |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vlv.errors import ConfigError, ModelFolderError
from vlv.evaluation.metrics.features import (
    ClipScore,
    Extractor,
    InceptionFeatures,
    InspectorFeatures,
    Resize,
    VisionFeatures,
    cosine,
    stack,
)
from vlv.evaluation.pixels import psnr
from vlv.models.hashing import weights_hash
from vlv.toyworld.inspector import Inspector
from vlv.toyworld.language import compare

if TYPE_CHECKING:
    from PIL import Image

    from vlv.evaluation.experiments.samples import Sample
    from vlv.jobs.table import Row

KINDS = ("pixels", "inspector", "inception", "vision", "clip")


class Look(NamedTuple):
    """Pictures to be judged, and what belongs to each."""

    pictures: Sequence[Image.Image]
    originals: Sequence[Image.Image]
    """Of one size with the pictures; none where the instrument does not compare pixels."""
    samples: Sequence[Sample]
    texts: Sequence[str | None]
    """What each was drawn from."""


class Instrument(Protocol):
    """Judges pictures."""

    compares_pixels: bool
    """Whether it looks at the originals beside the pictures; opening them takes time."""

    @property
    def width(self) -> int:
        """Of the features that it gives; 0 is none."""
        ...

    def identity(self) -> dict[str, Any]:
        """What its judgements depend on, as JSON values."""
        ...

    def judge(
        self, look: Look, originals: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32] | None, list[Row]]:
        """Features (B, width) and further columns of each picture.

        Args:
            look: B pictures.
            originals: Features of the originals (B, width); None when these are the originals.
        """
        ...


class Pixels:
    """PSNR to the original."""

    width = 0
    compares_pixels = True

    def identity(self) -> dict[str, Any]:
        """Nothing to know."""
        return {"instrument": "pixels"}

    def judge(
        self, look: Look, originals: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32] | None, list[Row]]:
        """Decibels, capped at 100 where pictures are equal."""
        del originals
        decibels = psnr(stack(look.pictures), stack(look.originals)).clamp_max(100)
        return None, [{"psnr": value} for value in decibels.tolist()]


class InspectorLook:
    """The inspector of the toy world."""

    compares_pixels = False

    def __init__(self, inspector: Inspector) -> None:
        self._inspector = inspector
        self._features = InspectorFeatures(inspector)
        self.width = self._features.width

    def identity(self) -> dict[str, Any]:
        """Its weights."""
        return {
            "instrument": "inspector",
            "sha256": weights_hash(self._inspector),
            "resize": self._features.resize,
        }

    def judge(
        self, look: Look, originals: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32] | None, list[Row]]:
        """Claims (stated, true, correct), objects and boxes; cosine with the original."""
        features = self._features(look.pictures)
        reports = self._inspector.inspect(stack(look.pictures).to(self._inspector.device))
        rows: list[Row] = []
        for report, sample in zip(reports, look.samples, strict=True):
            row: Row = {"scene": report.claims.scene, "objects": list(report.claims.objects)}
            row["boxes"] = [list(box) for box in report.boxes]
            if sample.scene is not None:
                counts = compare(report.claims, sample.scene)
                row["claims"] = [counts.stated, counts.true, counts.correct]
            rows.append(row)
        return features, rows


@dataclass
class FeatureLook:
    """A feature extractor.

    Args:
        kind: Of the instrument.
        extractor: What it looks with.
        about: What it depends on.
        paired: Whether the cosine with the original means something.
    """

    kind: str
    extractor: Extractor
    about: dict[str, Any]
    paired: bool
    compares_pixels: bool = False

    @property
    def width(self) -> int:
        """Of the features."""
        return self.extractor.width

    def identity(self) -> dict[str, Any]:
        """Kind, model and resizing."""
        return {"instrument": self.kind, "resize": self.extractor.resize, **self.about}

    def judge(
        self, look: Look, originals: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32] | None, list[Row]]:
        """Features, and the cosine with those of the original."""
        features = self.extractor(look.pictures)
        if originals is None or not self.paired:
            return features, [{} for _ in look.pictures]
        return features, [{"cosine": value} for value in cosine(features, originals).tolist()]


class ClipLook:
    """CLIPScore."""

    width = 0
    compares_pixels = False

    def __init__(self, name: str, device: torch.device) -> None:
        self._name, self._score = name, ClipScore(name, device)

    def identity(self) -> dict[str, Any]:
        """The model."""
        return {"instrument": "clip", "model": self._name}

    def judge(
        self, look: Look, originals: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32] | None, list[Row]]:
        """Score and whether the text was cut; nothing for a picture that was drawn from no text."""
        del originals
        having = [row for row, text in enumerate(look.texts) if text]
        rows: list[Row] = [{} for _ in look.pictures]
        if having:
            found = self._score(
                [look.pictures[row] for row in having], [str(look.texts[row]) for row in having]
            )
            for row, score, cut in zip(having, found.scores, found.truncated, strict=True):
                rows[row] = {"clip_score": float(score), "clip_truncated": bool(cut)}
        return None, rows


def make_instrument(text: str, device: torch.device, resize: Resize = "pytorch-fid") -> Instrument:
    """Load the instrument that a text such as ``vision:facebook/dinov2-base`` names.

    Raises:
        ConfigError: It names none.
        ModelFolderError: There is no such model.
    """
    kind, _, value = text.partition(":")
    if kind not in KINDS or bool(value) == (kind == "pixels"):
        raise ConfigError(
            f'"{text}" is no instrument; write pixels, inspector:FOLDER, inception:FILE, vision:MODEL, clip:MODEL or boxes:MODEL@URL'
        )
    if kind == "pixels":
        return Pixels()
    if kind == "inspector":
        return InspectorLook(load_inspector(Path(value), device))
    if kind == "clip":
        return ClipLook(value, device)
    if kind == "inception":
        extractor = InceptionFeatures(Path(value), resize, device)
        return FeatureLook(kind, extractor, {"weights": Path(value).name}, paired=False)
    return FeatureLook(kind, VisionFeatures(value, device), {"model": value}, paired=True)


def load_inspector(folder: Path, device: torch.device | str = "cpu") -> Inspector:
    """The inspector in a folder, or in the folder ``inspector`` of a model.

    Raises:
        ModelFolderError: There is none.
    """
    from vlv.models.folder import find_folder

    if not (folder / "config.json").is_file():
        folder = find_folder(str(folder)) / "inspector"
    if not (folder / "config.json").is_file():
        raise ModelFolderError(f"there is no inspector in {folder}; name the folder of one")
    found: Any = Inspector.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    inspector: Inspector = found.eval().to(device)
    return inspector
