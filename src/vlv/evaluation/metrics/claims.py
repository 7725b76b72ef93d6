"""What captions, and the inspector, say about rendered scenes, counted against the truth.

Every function returns one row of counts per scene, so that a figure and its bootstrap interval are computed from sums.
Shapes: N scenes, F facts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vlv.toyworld.language import Claims, compare, name_of, pair_objects, true_claims
from vlv.toyworld.scene import COLOURED_STYLES, COLUMNS, HELD_OUT, Scene
from vlv.toyworld.words import NAME_FACTS, OBJECT_FACTS, SCENE_FACTS

Counts = NDArray[np.float64]
Place = Sequence[float]
"""x and y of an object in world units, first of all."""

FACTS = (*SCENE_FACTS, *OBJECT_FACTS, "relation")


def claim_counts(claims: Sequence[Claims], scenes: Sequence[Scene]) -> Counts:
    """Claims stated, true and correct for every scene and fact of `FACTS`, (N, F, 3)."""
    rows = [[row[1:] for row in compare(c, s).by_fact] for c, s in zip(claims, scenes, strict=True)]
    return np.array(rows, np.float64).reshape(-1, len(FACTS), 3)


def recall_columns(counts: Counts) -> Counts:
    """(correct, true) claims of every scene, (N, 2)."""
    return np.asarray(counts.sum(1)[:, [2, 1]])


def precision_columns(counts: Counts) -> Counts:
    """(correct, stated) claims of every scene, (N, 2)."""
    return np.asarray(counts.sum(1)[:, [2, 0]])


def relation_columns(counts: Counts) -> Counts:
    """(correct, stated) relations of every scene, (N, 2)."""
    return np.asarray(counts[:, FACTS.index("relation")][:, [2, 0]])


def relations_shown(texts: Sequence[Claims], seen: Sequence[Claims]) -> Counts:
    """Relations of a text that hold among the objects seen in the image generated from it: (shown, stated), (N, 2).

    Args:
        texts: Claims of the texts.
        seen: What the inspector sees in the images.
    """
    rows = [
        (sum(shows_relation(relation, s)[0] for relation in said), len(said))
        for said, s in zip((set(t.relations) for t in texts), seen, strict=True)
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


def facts_shown(texts: Sequence[Claims], seen: Sequence[Claims]) -> Counts:
    """How many of the facts that texts state the inspector finds in their images.

    Args:
        texts: Claims of the texts.
        seen: What the inspector sees in the images.

    Returns:
        For every text (N, 4): facts shown, facts stated; objects shown with all their stated facts, objects that are
        stated or shown.
    """
    return np.array([_facts(t, s) for t, s in zip(texts, seen, strict=True)], np.float64)


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


def unseen_pairs(claims: Sequence[Claims], scenes: Sequence[Scene]) -> Counts:
    """Objects whose shape and colour never occur together in training: (claimed, there to be seen), (N, 2)."""
    rows = [_pairs(c, s) for c, s in zip(claims, scenes, strict=True)]
    return np.array(rows, np.float64).reshape(-1, 2)


def _pairs(claims: Claims, scene: Scene) -> tuple[int, int]:
    if scene.style not in COLOURED_STYLES:
        return 0, 0
    wanted = [(o.shape, o.colour) for o in scene.solids if (o.shape, o.colour) in HELD_OUT]
    stated = [(o.get("shape"), o.get("colour")) for o in claims.objects]
    return sum(min(wanted.count(p), stated.count(p)) for p in set(wanted)), len(wanted)


def object_counts(claims: Sequence[Claims], scenes: Sequence[Scene]) -> Counts:
    """Count objects by their columns; a missing object and one that is not there are both wrong.

    Returns:
        (N, 4): columns with every visible attribute right, columns with an object in the scene or in the claims, columns
        rightly empty or taken, columns.
    """
    return np.array([_objects(c, s) for c, s in zip(claims, scenes, strict=True)], np.float64)


def _objects(claims: Claims, scene: Scene) -> tuple[int, int, int, int]:
    there = {o["column"]: o for o in true_claims(scene).objects}
    seen = {o["column"]: o for o in claims.objects}
    right = sum(seen.get(column) == facts for column, facts in there.items())
    return right, len(there | seen), len(COLUMNS) - len(there.keys() ^ seen.keys()), len(COLUMNS)


def place_errors(
    claims: Sequence[Claims], places: Sequence[Sequence[Place]], scenes: Sequence[Scene]
) -> Counts:
    """How far objects stand from where they should, of the objects found in their columns.

    Captions name the column and the row; the offset within them is in the image alone.

    Args:
        claims: What the inspector sees.
        places: Of the objects of the claims.
        scenes: The truth.

    Returns:
        (N, 3): summed |dx| and |dy| in world units, number of objects.
    """
    rows = zip(claims, places, scenes, strict=True)
    return np.array([_places(*row) for row in rows], np.float64)


def _places(claims: Claims, places: Sequence[Place], scene: Scene) -> tuple[float, float, int]:
    seen = {o["column"]: place for o, place in zip(claims.objects, places, strict=True)}
    found = [(solid, seen[solid.column]) for solid in scene.solids if solid.column in seen]
    errors = ([abs(s.x - place[0]), abs(s.y - place[1])] for s, place in found)
    dx, dy = np.sum(list(errors), 0) if found else (0.0, 0.0)
    return float(dx), float(dy), len(found)


def equal_tokens(ids: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> Counts:
    """How far token ids read off z repeat those of a text, place by place: (equal, compared), (N, 2).

    >>> equal_tokens([[5, 7, 9]], [[5, 8]])
    array([[1., 2.]])
    """
    rows = [
        (sum(a == b for a, b in zip(own, text, strict=False)), min(len(own), len(text)))
        for own, text in zip(ids, texts, strict=True)
    ]
    return np.array(rows, np.float64)
