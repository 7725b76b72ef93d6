"""Experiment 6: do reconstructions keep place and size of the objects? (paper, section 4.4.1 and Table 6).

3-D boxes are read from the original and from the image, matched by their labels, and compared. In the toy world the inspector
reads them, and its own error against the truth of the scene is the noise floor; captions do not say how objects are turned, so
the angle is compared only where a vision model behind an address reads the boxes, as Gemini 2.0 Flash does in the paper, whose
prompt and units are not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlv.evaluation.experiments.scoring import Scores
from vlv.evaluation.metrics.boxes import Box, deviation
from vlv.jobs.table import Row
from vlv.toyworld.language import true_claims
from vlv.toyworld.scene import HALF_HEIGHT, HALF_WIDTH, RADIUS, Scene


def toy_box(facts: Mapping[str, str], place: Sequence[float]) -> Box:
    """The box of an object of the toy world from its attributes and where it stands: shape and size fix the rest."""
    shape, radius = facts["shape"], RADIUS[facts["size"]]
    width, height = 2 * radius * HALF_WIDTH[shape], 2 * radius * HALF_HEIGHT[shape]
    return Box(
        label=" ".join(facts[fact] for fact in ("colour", "shape") if fact in facts),
        centre=(place[0], place[1], height / 2),
        scale=(width, width, height),
        angle=0.0,
        period=0.0,
    )


def true_boxes(scene: Scene) -> list[Box]:
    """Boxes of the scene itself."""
    objects = zip(true_claims(scene).objects, scene.solids, strict=True)
    return [toy_box(facts, (solid.x, solid.y)) for facts, solid in objects]


def boxes_of(row: Row) -> list[Box]:
    """The boxes in a row of judgements, of the inspector or of an endpoint."""
    if "objects" in row:
        return [toy_box(o, place) for o, place in zip(row["objects"], row["boxes"], strict=True)]
    return [
        Box(b["label"], tuple(b["center"]), tuple(b["size"]), float(b["angle"]))
        for b in row["boxes"]
    ]


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
        second: Of the image, or of what the instrument reads of the original.
    """
    found = {id: deviation(first[id], second[id]) for id in first.keys() & second.keys()}
    found = {id: found[id] for id in first if id in found}  # in the order of the samples
    if not found:
        return
    angle = {id: (d.angle, d.num_angles) for id, d in found.items()}
    if any(d.num_angles for d in found.values()):
        scores.add(f"{key}.angle", f"{text}: L1 of the angle, radians", angle, "ratio", "length")
    for name in ("centre", "scale"):
        columns = {id: (getattr(d, name), d.pairs) for id, d in found.items()}
        label = f"{text}: L1 of the {name}, mean over three axes"
        scores.add(f"{key}.{name}", label, columns, "ratio", "length")
    matched = {id: (d.pairs, d.pairs + d.missing) for id, d in found.items()}
    scores.add(
        f"{key}.matched", f"{text}: boxes that have a partner of their label", matched, "ratio"
    )
