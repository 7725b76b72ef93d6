"""Images that mean the same: pairs of embeddings with a high cosine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlv.curation.tables import read_groups
from vlv.errors import DataError

_BLOCK = 1024


def similar_pairs(
    vectors: NDArray[np.float32], cosine: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """All pairs with at least this cosine, block by block: time grows with the square of n.

    Args:
        vectors: Unit vectors (n,D); zeros are like nothing.
        cosine: Least similarity.

    Returns:
        Places, the smaller first (pairs, 2), and the cosine of each pair.
    """
    pairs = [np.empty((0, 2), np.int64)]
    cosines = [np.empty(0, np.float32)]
    for top in range(0, len(vectors), _BLOCK):
        rows = vectors[top : top + _BLOCK]
        for left in range(top, len(vectors), _BLOCK):
            products = rows @ vectors[left : left + _BLOCK].T
            first, second = np.nonzero(products >= cosine)
            later = first + top < second + left
            first, second = first[later], second[later]
            pairs.append(np.stack([first + top, second + left], axis=1))
            cosines.append(products[first, second])
    return np.concatenate(pairs), np.concatenate(cosines)


def measured_vectors(tables: Sequence[Path]) -> NDArray[np.float32]:
    """The embeddings that the backbone made of the survivors, in their order, (n,D)."""
    rows: list[NDArray[np.float32]] = []
    for path in tables:
        for group in read_groups(path, ["reason", "embedding"]):
            rows += [np.asarray(row["embedding"], np.float32) for row in group if not row["reason"]]
    return np.stack(rows) if rows else np.empty((0, 1), np.float32)


def stored_vectors(tables: Sequence[Path], file: str) -> NDArray[np.float32]:
    """The embeddings of the survivors from a file of `vlv embed`, in their order, (n,D).

    z (Q,D) becomes the unit vector of the mean of its Q tokens. An image without an embedding gets zeros.

    Raises:
        DataError: The file is no such file, or has none of the images.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(file)
    try:
        z = load_file(path)["z"].float().numpy()
        ids = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["ids"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no file of vlv embed with its .json ({error})") from error
    means = z.reshape(len(z), -1, z.shape[-1]).mean(axis=1)
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    known = dict(zip(ids, range(len(ids)), strict=True))
    places = [
        known.get(row["id"], -1)
        for table in tables
        for group in read_groups(table, ["reason", "id"])
        for row in group
        if not row["reason"]
    ]
    if places and max(places) < 0:
        raise DataError(f"{file} has none of the images; make it of the same inputs with vlv embed")
    means = np.concatenate([means, np.zeros((1, means.shape[1]), np.float32)])  # -1
    return np.asarray(means[places], np.float32)
