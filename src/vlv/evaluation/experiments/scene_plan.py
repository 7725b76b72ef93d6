"""Rendered scenes that an experiment takes as they come from the toy world, without a data set."""

from __future__ import annotations

from dataclasses import dataclass

from vlv.toyworld.scene import Scene, Split, sample_scene


@dataclass(frozen=True, slots=True)
class ScenePlan:
    """Which scenes, and how many are worked on together."""

    split: Split = "test"
    num: int = 2000
    seed: int = 1
    batch_size: int = 8

    def scene(self, index: int) -> Scene:
        """One of them."""
        return sample_scene(self.seed, index, self.split)
