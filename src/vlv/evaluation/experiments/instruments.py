"""What looks at images: pixels, the inspector of the toy world, feature extractors, CLIP, vision models behind an address.

An instrument is written ``KIND`` or ``KIND:VALUE``:

| instrument | says of each image |
|---|---|
| ``pixels`` | PSNR to the original, in dB |
| ``inspector:FOLDER`` | claims against the scene's truth, 3-D boxes; features for toy FID and KID |
| ``inception:FILE`` | features for FID and KID |
| ``vision:MODEL`` | features of a vision backbone (DINOv2, CLIP) for the distances, and their cosine with the original's |
| ``clip:MODEL`` | CLIPScore of the image with the text it was generated from |
| ``boxes:MODEL@URL`` | 3-D boxes estimated by a vision model behind an address |
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vlv.endpoint import Answer, ChatRequest, Client, user
from vlv.errors import ConfigError
from vlv.evaluation.experiments.sources import ask_all, png
from vlv.evaluation.metrics.features import (
    ClipScore,
    Extractor,
    cosine,
    inception_features,
    inspector_features,
    stack,
    vision_features,
)
from vlv.evaluation.metrics.pixels import psnr
from vlv.jobs.table import Row
from vlv.models.hashing import weights_hash
from vlv.toyworld.inspector import Inspector
from vlv.toyworld.language import compare

if TYPE_CHECKING:
    from PIL import Image

    from vlv.evaluation.experiments.backends import Backends
    from vlv.evaluation.experiments.run import Judge, Settings
    from vlv.evaluation.experiments.samples import Sample

KINDS = ("pixels", "inspector", "inception", "vision", "clip", "boxes")


Features = NDArray[np.float32]


class Look(NamedTuple):
    """Images to be judged, and what belongs to each."""

    images: Sequence[Image.Image]
    originals: Sequence[Image.Image]
    """Of one size with the images; none where the instrument does not compare pixels."""
    samples: Sequence[Sample]
    texts: Sequence[str | None]
    """What each was generated from."""
    features: Features | None
    """(B, W) of their originals; None where these are the originals, or the instrument gives no features."""


Seen = tuple[Features | None, list[Row]]
"""Features (B, W) and further columns of each image."""


@dataclass(frozen=True)
class Instrument:
    """Judges images.

    Attributes:
        about: What its judgements depend on, as JSON values.
        look: Judges B images.
        width: W of the features that it gives; 0 is none.
        compares_pixels: Whether it looks at the originals beside the images; opening them takes time.
    """

    about: Settings
    look: Callable[[Look], Seen]
    width: int = 0
    compares_pixels: bool = False


def pixels() -> Instrument:
    """PSNR to the original in dB, capped at 100 where images are equal."""

    def look(at: Look) -> Seen:
        decibels = psnr(stack(at.images), stack(at.originals)).clamp_max(100)
        return None, [{"psnr": value} for value in decibels.tolist()]

    return Instrument({"instrument": "pixels"}, look, compares_pixels=True)


def inspector_instrument(inspector: Inspector, *, features: bool = True) -> Instrument:
    """The inspector of the toy world: objects and where they stand, claims (stated, true, correct), and features."""
    extract = inspector_features(inspector)

    def look(at: Look) -> Seen:
        reports = inspector.inspect(stack(at.images).to(inspector.device))
        rows: list[Row] = []
        for report, sample in zip(reports, at.samples, strict=True):
            row: Row = {"scene": report.claims.scene, "objects": list(report.claims.objects)}
            row["boxes"] = [list(place) for place in report.boxes]
            if sample.scene is not None:
                counts = compare(report.claims, sample.scene)
                row["claims"] = [counts.stated, counts.true, counts.correct]
            rows.append(row)
        return extract(at.images) if features else None, rows

    about = {
        "instrument": "inspector",
        "sha256": weights_hash(inspector),
        "resize": extract.resize,
    }
    return Instrument(about, look, extract.width if features else 0)


def features_instrument(
    kind: str, extractor: Extractor, about: Settings, *, paired: bool
) -> Instrument:
    """A feature extractor.

    Args:
        kind: Of the instrument.
        extractor: What it looks with.
        about: What it depends on beside its resizing.
        paired: Whether the cosine with the original means something.
    """

    def look(at: Look) -> Seen:
        found = extractor(at.images)
        if at.features is None or not paired:
            return found, [{} for _ in at.images]
        return found, [{"cosine": value} for value in cosine(found, at.features).tolist()]

    return Instrument(
        {"instrument": kind, "resize": extractor.resize, **about}, look, extractor.width
    )


def clip_instrument(name: str, device: torch.device) -> Instrument:
    """CLIPScore, and whether the text was cut; nothing for an image that was generated from no text."""
    score = ClipScore(name, device)

    def look(at: Look) -> Seen:
        having = [row for row, text in enumerate(at.texts) if text]
        rows: list[Row] = [{} for _ in at.images]
        if having:
            images = [at.images[row] for row in having]
            found = score(images, [str(at.texts[row]) for row in having])
            for row, value, cut in zip(having, found.scores, found.truncated, strict=True):
                rows[row] = {"clip_score": float(value), "clip_truncated": bool(cut)}
        return None, rows

    return Instrument({"instrument": "clip", "model": name}, look)


MAX_BOXES_TOKENS = 1500

BOXES_PROMPT = """Estimate 3-D boxes of the main objects of this picture, at most eight. Use a camera frame in which x points right, \
y points away from the camera and z points up, scaled so that the scene fits into a cube of edge 1 with its centre at the origin. \
Answer with JSON only: a list of objects with "label" (a short noun in lower case), "center" (x, y, z), "size" (width, depth, \
height) and "angle" (rotation about the vertical axis, in radians)."""


def boxes_instrument(connect: Callable[[], Client]) -> Instrument:
    """Boxes of each image as a vision model behind an address estimates them, or an error.

    Args:
        connect: Gives a client, which serves one round of requests; there is one for each batch.
    """

    def look(at: Look) -> Seen:
        rows: dict[int, Row] = {}

        def requests() -> Iterator[tuple[Row, ChatRequest]]:
            for number, image in enumerate(at.images):
                asked = user(BOXES_PROMPT, png(image))
                yield {"number": number}, ChatRequest([asked], max_tokens=MAX_BOXES_TOKENS, temperature=0.0)  # fmt: skip

        def keep(found: Sequence[Row]) -> None:
            for row in found:
                rows[row["number"]] = {k: v for k, v in row.items() if k != "number"}

        ask_all(connect(), requests(), _read, keep)
        return None, [rows[number] for number in range(len(at.images))]

    model = connect().endpoint.model
    return Instrument({"instrument": "boxes", "model": model, "prompt": BOXES_PROMPT}, look)


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
            return pixels()
        case "inspector":
            return inspector_instrument(backends.inspector(value))
        case "clip":
            return clip_instrument(value, device)
        case "boxes":
            return boxes_instrument(lambda: backends.client(value))
        case "inception":
            inception = inception_features(Path(value), judge.resize, device)
            about = {"weights": Path(value).name}
            return features_instrument(kind, inception, about, paired=False)
    vision = vision_features(value, device)
    return features_instrument(kind, vision, {"model": value}, paired=True)
