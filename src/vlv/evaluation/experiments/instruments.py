"""What looks at images: pixels, the inspector of the toy world, feature extractors, CLIP, vision models behind an address.

An instrument is written ``KIND`` or ``KIND:VALUE``:

| instrument | says of each image |
|---|---|
| ``pixels`` | PSNR to the original, in dB |
| ``inspector:FOLDER`` | claims against the scene's truth, 3-D boxes; features for toy FID and KID |
| ``inception:FILE`` | features for FID and KID |
| ``vision:MODEL`` | features of a vision backbone (DINOv2, CLIP) for the distances, and their cosine with the original's |
| ``clip:MODEL`` | CLIPScore of the image with the text it was drawn from |
| ``boxes:MODEL@URL`` | 3-D boxes estimated by a vision model behind an address |
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vlv.endpoint import Answer, ChatRequest, Client, user
from vlv.errors import ConfigError
from vlv.evaluation.experiments.sources import ask_all, png
from vlv.evaluation.metrics.features import (
    ClipScore,
    Extractor,
    InceptionFeatures,
    InspectorFeatures,
    VisionFeatures,
    cosine,
    stack,
)
from vlv.evaluation.metrics.pixels import psnr
from vlv.models.hashing import weights_hash
from vlv.toyworld.inspector import Inspector
from vlv.toyworld.language import compare

if TYPE_CHECKING:
    from PIL import Image

    from vlv.evaluation.experiments.backends import Backends
    from vlv.evaluation.experiments.run import Judge
    from vlv.evaluation.experiments.samples import Sample
    from vlv.jobs.table import Row

KINDS = ("pixels", "inspector", "inception", "vision", "clip", "boxes")


class Look(NamedTuple):
    """Images to be judged, and what belongs to each."""

    pictures: Sequence[Image.Image]
    originals: Sequence[Image.Image]
    """Of one size with the images; none where the instrument does not compare pixels."""
    samples: Sequence[Sample]
    texts: Sequence[str | None]
    """What each was drawn from."""


class Instrument(Protocol):
    """Judges images."""

    compares_pixels: bool
    """Whether it looks at the originals beside the images; opening them takes time."""

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
        """Features (B, width) and further columns of each image.

        Args:
            look: B images.
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
        """Decibels, capped at 100 where images are equal."""
        del originals
        decibels = psnr(stack(look.pictures), stack(look.originals)).clamp_max(100)
        return None, [{"psnr": value} for value in decibels.tolist()]


class InspectorLook:
    """The inspector of the toy world."""

    compares_pixels = False

    def __init__(self, inspector: Inspector) -> None:
        self._inspector = inspector
        self.features = InspectorFeatures(inspector)
        self.width = self.features.width

    def identity(self) -> dict[str, Any]:
        """Its weights."""
        return {
            "instrument": "inspector",
            "sha256": weights_hash(self._inspector),
            "resize": self.features.resize,
        }

    def judge(
        self, look: Look, originals: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32] | None, list[Row]]:
        """Claims (stated, true, correct), objects and boxes; cosine with the original."""
        features = self.features(look.pictures)
        reports = self._inspector.inspect(stack(look.pictures).to(self._inspector.device))
        rows: list[Row] = []
        for report, sample in zip(reports, look.samples, strict=True):
            row: Row = {"scene": report.claims.scene, "objects": list(report.claims.objects)}
            row["boxes"] = [list(place) for place in report.boxes]
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
        """Score and whether the text was cut; nothing for a image that was drawn from no text."""
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


MAX_BOXES_TOKENS = 1500

BOXES_PROMPT = """Estimate 3-D boxes of the main objects of this picture, at most eight. Use a camera frame in which x points right, \
y points away from the camera and z points up, scaled so that the scene fits into a cube of edge 1 with its centre at the origin. \
Answer with JSON only: a list of objects with "label" (a short noun in lower case), "center" (x, y, z), "size" (width, depth, \
height) and "angle" (rotation about the vertical axis, in radians)."""


class BoxesLook:
    """A vision model behind an address that estimates boxes; an instrument."""

    width = 0
    compares_pixels = False

    def __init__(self, connect: Callable[[], Client]) -> None:
        self._connect = (
            connect  # a client serves one round of requests, and there is one for each batch
        )

    def identity(self) -> dict[str, Any]:
        """The model and what it is asked."""
        model = self._connect().endpoint.model
        return {"instrument": "boxes", "model": model, "prompt": BOXES_PROMPT}

    def judge(
        self, look: Look, originals: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32] | None, list[Row]]:
        """Boxes of each image, or an error."""
        del originals
        rows: dict[int, Row] = {}

        def requests() -> Iterator[tuple[Row, ChatRequest]]:
            for number, picture in enumerate(look.pictures):
                asked = user(BOXES_PROMPT, png(picture))
                yield {"number": number}, ChatRequest([asked], max_tokens=MAX_BOXES_TOKENS, temperature=0.0)  # fmt: skip

        def keep(found: Sequence[Row]) -> None:
            for row in found:
                rows[row["number"]] = {k: v for k, v in row.items() if k != "number"}

        ask_all(self._connect(), requests(), _read, keep)
        return None, [rows[number] for number in range(len(look.pictures))]


def _read(answer: Answer) -> Row:
    return {"boxes": read_boxes(answer.text)}


def read_boxes(text: str) -> list[Row]:
    """The boxes in an answer, with or without a fence of Markdown around them.

    Raises:
        ValueError: The answer holds no list of boxes.

    >>> read_boxes('[{"label": "Dog ", "center": [0, 0, 0], "size": [1, 1, 1], "angle": 0}]')[0]["label"]
    'dog'
    """
    match = re.search(r"\[.*\]", text, re.DOTALL)
    try:
        found = json.loads(match.group() if match else "")
        boxes: list[Row] = [
            {
                "label": str(box["label"]).strip().lower(),
                "center": [float(value) for value in box["center"]],
                "size": [float(value) for value in box["size"]],
                "angle": float(box["angle"]),
            }
            for box in found
        ]
    except (ValueError, KeyError, TypeError):
        raise ValueError("the answer is no list of boxes") from None
    numbers = [n for box in boxes for n in (*box["center"], *box["size"], box["angle"])]
    if any(len(box[k]) != 3 for box in boxes for k in ("center", "size")) or not all(
        map(math.isfinite, numbers)
    ):
        raise ValueError("the answer has a box without three finite numbers")
    return boxes


def make_instrument(judge: Judge, backends: Backends) -> Instrument:
    """Load the instrument that a judge such as ``vision:facebook/dinov2-base`` names.

    Raises:
        ConfigError: It names none.
        ModelFolderError: There is no such model.
    """
    kind, value, device = judge.kind, judge.value, backends.device
    if kind not in KINDS or bool(value) == (kind == "pixels"):
        raise ConfigError(
            f'"{judge}" is no instrument; write pixels, inspector:FOLDER, inception:FILE, vision:MODEL, clip:MODEL or boxes:MODEL@URL'
        )
    match kind:
        case "pixels":
            return Pixels()
        case "inspector":
            return InspectorLook(backends.inspector(value))
        case "clip":
            return ClipLook(value, device)
        case "boxes":
            return BoxesLook(lambda: backends.client(value))
        case "inception":
            inception = InceptionFeatures(Path(value), judge.resize, device)
            return FeatureLook(kind, inception, {"weights": Path(value).name}, paired=False)
    return FeatureLook(kind, VisionFeatures(value, device), {"model": value}, paired=True)
