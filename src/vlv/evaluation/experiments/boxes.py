"""Experiment 6: do rebuilt pictures keep angle, place and size of the objects? (paper, section 4.4.1 and Table 6).

3-D boxes are read from the original and from the picture, matched by their labels, and compared. In the toy world the inspector
reads them, and its own error against the truth of the scene is the noise floor; for real pictures a vision model behind an address
reads them, as Gemini 2.0 Flash does in the paper, whose prompt and units are not known.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlv.endpoint import Answer, ChatRequest, Client, user
from vlv.evaluation.experiments.instruments import Look
from vlv.evaluation.experiments.scoring import Scores
from vlv.evaluation.experiments.sources import ask_all, png
from vlv.evaluation.metrics.boxes import Box, deviation
from vlv.jobs.table import Row
from vlv.toyworld.language import true_claims
from vlv.toyworld.scene import HALF_HEIGHT, HALF_WIDTH, RADIUS, Scene

MAX_BOXES_TOKENS = 1500

BOXES_PROMPT = """Estimate 3-D boxes of the main objects of this picture, at most eight. Use a camera frame in which x points right, \
y points away from the camera and z points up, scaled so that the scene fits into a cube of edge 1 with its centre at the origin. \
Answer with JSON only: a list of objects with "label" (a short noun in lower case), "center" (x, y, z), "size" (width, depth, \
height) and "angle" (rotation about the vertical axis, in radians)."""


def toy_box(facts: Mapping[str, str], place: Sequence[float]) -> Box:
    """The box of an object of the toy world from its attributes and (x, y, yaw): shape and size fix the rest."""
    shape, radius = facts["shape"], RADIUS[facts["size"]]
    width, height = 2 * radius * HALF_WIDTH[shape], 2 * radius * HALF_HEIGHT[shape]
    x, y, yaw = place
    return Box(
        label=" ".join(facts[fact] for fact in ("colour", "shape") if fact in facts),
        centre=(x, y, height / 2),
        scale=(width, width, height),
        angle=yaw,
        period=math.pi / 2 if shape == "cube" else 0.0,
    )


def true_boxes(scene: Scene) -> list[Box]:
    """Boxes of the scene itself."""
    objects = zip(true_claims(scene).objects, scene.solids, strict=True)
    return [toy_box(facts, (solid.x, solid.y, solid.yaw)) for facts, solid in objects]


def boxes_of(row: Row) -> list[Box]:
    """The boxes in a row of judgements, of the inspector or of an endpoint."""
    if "objects" in row:
        return [toy_box(o, place) for o, place in zip(row["objects"], row["boxes"], strict=True)]
    return [
        Box(b["label"], tuple(b["center"]), tuple(b["size"]), float(b["angle"]))
        for b in row["boxes"]
    ]


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
        """Boxes of each picture, or an error."""
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


def measure(
    scores: Scores,
    key: str,
    text: str,
    first: Mapping[str, Sequence[Box]],
    second: Mapping[str, Sequence[Box]],
) -> None:
    """Add the deviations of the boxes of every sample that both have.

    Args:
        scores: Gets the measures.
        key: Begins their keys.
        text: Begins their labels.
        first: By sample id, of the original, or the truth.
        second: Of the picture, or of what the instrument reads of the original.
    """
    found = {id: deviation(first[id], second[id]) for id in first.keys() & second.keys()}
    found = {id: found[id] for id in first if id in found}  # in the order of the samples
    if not found:
        return
    angle = {id: (d.angle, d.num_angles) for id, d in found.items()}
    scores.add(f"{key}.angle", f"{text}: L1 of the angle, radians", angle, "ratio", "length")
    for name in ("centre", "scale"):
        columns = {id: (getattr(d, name), d.pairs) for id, d in found.items()}
        label = f"{text}: L1 of the {name}, mean over three axes"
        scores.add(f"{key}.{name}", label, columns, "ratio", "length")
    matched = {id: (d.pairs, d.pairs + d.missing) for id, d in found.items()}
    scores.add(
        f"{key}.matched", f"{text}: boxes that have a partner of their label", matched, "ratio"
    )
