"""Questions put to images that were drawn from sentences: do they show what was said, and how it was arranged?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vlv.toyworld.language import Claims, name_of, pair_objects, parse
from vlv.toyworld.scene import COLUMNS, Scene, Split, sample_scene
from vlv.toyworld.words import NAME_FACTS
from vlv.toyworld.writing import describe, relation_only

Counts = NDArray[np.float64]


def relation_sentences(num: int, seed: int, split: Split = "test") -> tuple[list[Scene], list[str]]:
    """Scenes of two objects of different names, and a sentence on each that says where they stand by their relation alone."""
    scenes: list[Scene] = []
    index = 0
    while len(scenes) < num:
        scene = sample_scene(seed, index, split)
        names = {(solid.shape, solid.colour) for solid in scene.solids}
        if len(scene.solids) == len(names) == 2 and scene.style in ("photo", "cartoon"):
            scenes.append(scene)
        index += 1
    rngs = [np.random.default_rng([seed, row, 3]) for row in range(num)]
    return scenes, [relation_only(s, r) for s, r in zip(scenes, rngs, strict=True)]


def plain_sentences(num: int, seed: int, split: Split = "test") -> list[str]:
    """Sentences as people type them."""
    rngs = [np.random.default_rng([seed, row, 4]) for row in range(num)]
    return [describe(sample_scene(seed, row, split), "plain", rng) for row, rng in enumerate(rngs)]


def relations_shown(texts: Sequence[str], seen: Sequence[Claims]) -> Counts:
    """Whether images show the relation that a text states of two objects.

    Args:
        texts: With one relation each.
        seen: What the inspector found in the image of each.

    Returns:
        For every text (N, 3): the relation is shown, both objects are shown, 1.
    """
    rows = [
        (*shows_relation(parse(text).relations[0], view), 1)
        for text, view in zip(texts, seen, strict=True)
    ]
    return np.array(rows, np.float64)


def shows_relation(relation: tuple[str, str, str], seen: Claims) -> tuple[bool, bool]:
    """Whether two of the objects seen stand as a relation says, and whether both of its objects are there."""
    first, kind, second = relation
    pairs = [
        (a, b)
        for a, b in itertools.permutations(seen.objects, 2)
        if _is_called(a, first) and _is_called(b, second)
    ]
    return any(_stands(kind, a, b) for a, b in pairs), bool(pairs)


def _is_called(facts: Mapping[str, str], name: str) -> bool:
    own = {facts[fact] for fact in NAME_FACTS if fact in facts} | {name_of({})}
    return set(name.split()) <= own


def _stands(kind: str, a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    step = COLUMNS.index(a["column"]) - COLUMNS.index(b["column"])
    if kind in ("left", "right"):
        return step < 0 if kind == "left" else step > 0
    return (a["row"], b["row"]) == (("front", "back") if kind == "front" else ("back", "front"))


def facts_shown(texts: Sequence[str], seen: Sequence[Claims]) -> Counts:
    """How many of the facts that texts state the inspector finds in their images.

    Returns:
        For every text (N, 4): facts shown, facts stated; objects shown with all their stated facts, objects that are
        stated or shown.
    """
    return np.array([_facts(parse(t), s) for t, s in zip(texts, seen, strict=True)], np.float64)


def _facts(said: Claims, seen: Claims) -> tuple[int, int, int, int]:
    shown = len(said.scene.items() & seen.scene.items())
    stated = len(said.scene)
    whole = 0
    pairs = pair_objects(said.objects, seen.objects)
    for mine, real in pairs:
        shown += len(mine.items() & real.items())
        stated += len(mine)
        whole += bool(mine) and mine.items() <= real.items()
    return shown, stated, whole, len(pairs)


def feature_distances(
    seen: NDArray[np.float32], originals: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Distance of every image from its original in the inspector's features, (N, W) each to (N,)."""
    difference = seen.astype(np.float64) - originals.astype(np.float64)
    return np.asarray(np.linalg.norm(difference, axis=1))
