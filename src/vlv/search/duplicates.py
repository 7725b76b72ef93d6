"""Images of an index that show nearly the same, by their pooled vectors and late interaction; no model is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlv.errors import ConfigError
from vlv.models.arguments import finite
from vlv.search.space import alikeness

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlv.search.store import Store

NEIGHBOURS = 32
"""Of each image, that are compared with it."""


def near_duplicates(
    store: Store, at_least: float, report: Callable[[int], None] = lambda count: None
) -> list[list[int]]:
    """Groups of images of which each is nearly the same as another one of its group.

    Args:
        store: The index.
        at_least: Score of late interaction in both directions, up to 1.
        report: Receives how many images are done.

    Returns:
        Keys of each group of two or more, the largest group first.

    Raises:
        ConfigError: `at_least` is no cosine.
    """
    if not -1 <= finite("at_least", at_least) <= 1:
        raise ConfigError(f"at_least is {at_least}; choose a cosine, from -1 to 1")
    leader: dict[int, int] = {}

    def find(key: int) -> int:
        while leader.setdefault(key, key) != key:
            leader[key] = leader[leader[key]]
            key = leader[key]
        return key

    for key, pooled in store.pooled():
        keys, _ = store.nearest(pooled, NEIGHBOURS)
        near = np.sort(keys[keys > key])
        if len(near):
            own = store.tokens(np.array([key], np.uint64))[0]
            scores = alikeness(own, store.tokens(near)).numpy()
            for other in near[scores >= at_least].tolist():
                leader[find(other)] = find(key)
        report(1)
    groups: dict[int, list[int]] = {}
    for key in sorted(leader):
        groups.setdefault(find(key), []).append(key)
    found = [group for group in groups.values() if len(group) > 1]
    return sorted(found, key=lambda group: (-len(group), group))
