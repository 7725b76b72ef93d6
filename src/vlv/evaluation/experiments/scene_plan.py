"""Rendered scenes that an experiment takes as they come from the toy world, without a data set."""

from __future__ import annotations

from dataclasses import dataclass

from vlv.models.arguments import MAX_SEED, whole_number
from vlv.toyworld.scene import MOST_SCENES, Scene, Split, sample_scene


@dataclass(frozen=True, slots=True)
class ScenePlan:
    """Which scenes, and how many are worked on together.

    Raises:
        ConfigError: A number is out of its range.
    """

    split: Split = "test"
    num: int = 2000
    seed: int = 1
    batch_size: int = 8

    def __post_init__(self) -> None:
        whole_number("num", self.num, 1, MOST_SCENES)
        whole_number("seed", self.seed, 0, MAX_SEED)
        whole_number("batch_size", self.batch_size, 1)

    def scene(self, index: int) -> Scene:
        """One of them."""
        return sample_scene(self.seed, index, self.split)
