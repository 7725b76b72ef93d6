"""Fresh scenes to measure on, and what the inspector or a caption says about them, counted against the truth.

Shapes: N scenes, S pixels, F facts, W feature width.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from vlv.toyworld.inspector import Inspector, Report
from vlv.toyworld.language import Claims, compare, true_claims
from vlv.toyworld.render import render
from vlv.toyworld.scene import COLOURED_STYLES, COLUMNS, HELD_OUT, Scene, Split, sample_scene
from vlv.toyworld.words import OBJECT_FACTS, SCENE_FACTS
from vlv.toyworld.writing import describe

FACTS = (*SCENE_FACTS, *OBJECT_FACTS, "relation")
NUM_EXAMPLES = 12
"""Pictures of each kind that are kept for a person to look at."""

Counts = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class World:
    """Scenes that no training has seen, rendered."""

    split: Split
    scenes: tuple[Scene, ...]
    captions: tuple[str, ...]
    """A true detailed caption of each."""
    pixels: Tensor
    """uint8 (N, 3, S, S)."""
    objects: Tensor
    """bool (N, S, S), where a solid is seen."""
    seeds: tuple[int, ...]
    """Of the noise from which the picture of each scene is drawn, whatever it is drawn from."""

    def floats(self, rows: slice) -> Tensor:
        """Pixels (B, 3, S, S), float in [0, 1]."""
        return self.pixels[rows].float() / 255


def make_world(
    split: Split, seed: int, indices: range, size: int, *, progress: bool = False
) -> World:
    """Draw and render the scenes of a split with the given seed and indices; S = `size`."""
    scenes = tuple(sample_scene(seed, index, split) for index in indices)
    pixels = torch.empty(len(scenes), 3, size, size, dtype=torch.uint8)
    objects = torch.empty(len(scenes), size, size, dtype=torch.bool)
    for row in bar(range(len(scenes)), f"rendering {split}", progress):
        rendering = render(scenes[row], size)
        pixels[row] = torch.from_numpy(rendering.image).permute(2, 0, 1)
        objects[row] = torch.from_numpy(rendering.objects >= 0)
    rngs = [np.random.default_rng([seed, index, 1]) for index in indices]
    return World(
        split=split,
        scenes=scenes,
        captions=tuple(describe(s, "detailed", r) for s, r in zip(scenes, rngs, strict=True)),
        pixels=pixels,
        objects=objects,
        seeds=tuple(int(rng.integers(2**62)) for rng in rngs),
    )


def shuffle_words(captions: Sequence[str], seed: int) -> list[str]:
    """The words of each caption in random order."""
    rng = np.random.default_rng([seed, 2])
    return [" ".join(rng.permutation(caption.split())) for caption in captions]


def bar(rows: range, what: str, progress: bool) -> Iterator[int]:
    """Rows with a bar on stderr."""
    return iter(tqdm(rows, desc=what, disable=not progress, file=sys.stderr, leave=False))


# --- counting -----------------------------------------------------------------------------------


def claim_counts(claims: Sequence[Claims], scenes: Sequence[Scene]) -> Counts:
    """Claims stated, true and correct, for every scene and fact: (N, F, 3)."""
    rows = [[row[1:] for row in compare(c, s).by_fact] for c, s in zip(claims, scenes, strict=True)]
    return np.array(rows, np.float64)


def held_out_pairs(claims: Sequence[Claims], scenes: Sequence[Scene]) -> Counts:
    """Objects of a held-out shape and colour that the claims have, and that are there to be seen: (N, 2)."""
    return np.array([_pairs(c, s) for c, s in zip(claims, scenes, strict=True)], np.float64)


def _pairs(claims: Claims, scene: Scene) -> tuple[int, int]:
    if scene.style not in COLOURED_STYLES:
        return 0, 0
    wanted = [(o.shape, o.colour) for o in scene.solids if (o.shape, o.colour) in HELD_OUT]
    stated = [(o.get("shape"), o.get("colour")) for o in claims.objects]
    return sum(min(wanted.count(p), stated.count(p)) for p in set(wanted)), len(wanted)


def object_counts(reports: Sequence[Report], scenes: Sequence[Scene]) -> Counts:
    """Count objects by their columns; a missing object and one that is not there are both wrong.

    Returns:
        For every scene (N, 4): columns with every visible attribute right, columns with an object in the scene or in the
        report, columns whose occupation is right, columns.
    """
    return np.array([_objects(r, s) for r, s in zip(reports, scenes, strict=True)], np.float64)


def _objects(report: Report, scene: Scene) -> tuple[int, int, int, int]:
    there = {o["column"]: o for o in true_claims(scene).objects}
    seen = {o["column"]: o for o in report.claims.objects}
    right = sum(seen.get(column) == facts for column, facts in there.items())
    return right, len(there | seen), len(COLUMNS) - len(there.keys() ^ seen.keys()), len(COLUMNS)


def box_errors(reports: Sequence[Report], scenes: Sequence[Scene]) -> Counts:
    """Errors of the 3-D boxes of the objects found in their columns; a cube looks the same after a quarter turn.

    Returns:
        For every scene (N, 5): summed |dx| and |dy| in world units, number of objects; summed angle between the yaws of cubes
        in degrees, number of cubes.
    """
    return np.array([_boxes(r, s) for r, s in zip(reports, scenes, strict=True)], np.float64)


def _boxes(report: Report, scene: Scene) -> tuple[float, float, int, float, int]:
    seen = {o["column"]: box for o, box in zip(report.claims.objects, report.boxes, strict=True)}
    found = [(solid, seen[solid.column]) for solid in scene.solids if solid.column in seen]
    turns = [
        abs(solid.yaw - box[2]) % (math.pi / 2) for solid, box in found if solid.shape == "cube"
    ]
    return (
        sum(abs(solid.x - box[0]) for solid, box in found),
        sum(abs(solid.y - box[1]) for solid, box in found),
        len(found),
        sum(math.degrees(min(turn, math.pi / 2 - turn)) for turn in turns),
        len(turns),
    )


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the inspector found in one picture of every scene."""

    claims: tuple[Claims, ...]
    counts: Counts
    """From `claim_counts`."""
    objects: Counts
    """From `object_counts`."""
    boxes: Counts
    """From `box_errors`."""
    places: tuple[tuple[tuple[float, float, float], ...], ...]
    """(x, y, yaw) of every object of `claims`, in its order."""
    pairs: Counts
    """From `held_out_pairs`."""
    features: NDArray[np.float32]
    """(N, W): scene and columns side by side."""
    examples: Tensor
    """The first pictures, uint8 (E, 3, S, S)."""


@torch.no_grad()
def inspect(inspector: Inspector, batches: Iterator[Tensor], scenes: Sequence[Scene]) -> Inspection:
    """Look at pictures batch by batch; none but the examples is kept.

    Args:
        inspector: The instrument.
        batches: Pixels (B, 3, S, S) in [0, 1], in the order of the scenes.
        scenes: The truth.
    """
    reports: list[Report] = []
    features: list[NDArray[np.float32]] = []
    examples: list[Tensor] = []
    for pixels in batches:
        stored = (pixels * 255).round().to(torch.uint8)  # as a file would hold them
        pixels = (stored.float() / 255).to(inspector.device)
        reports += inspector.inspect(pixels)
        features.append(inspector.features(pixels).flatten(1).float().cpu().numpy())
        if sum(map(len, examples)) < NUM_EXAMPLES:
            examples.append(stored.cpu())
    claims = tuple(report.claims for report in reports)
    return Inspection(
        claims=claims,
        counts=claim_counts(claims, scenes),
        objects=object_counts(reports, scenes),
        boxes=box_errors(reports, scenes),
        places=tuple(report.boxes for report in reports),
        pairs=held_out_pairs(claims, scenes),
        features=np.concatenate(features),
        examples=torch.cat(examples)[:NUM_EXAMPLES],
    )
