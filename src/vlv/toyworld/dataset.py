"""Rendered data sets: tar shards that the ordinary data path reads.

A record holds the image (`.png`), a detailed caption (`.txt`), which a bad teacher may have written, and, in `.json`, the true scene and the
pixel box (left, top, right, bottom) of every solid. Where instructions are to be learnt, the `.json` also holds captions in
several styles, questions with their answers, and what somebody knows of the scene.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from vlv.curation.engine import LocalEngine
from vlv.data.shards import TarShardWriter, shard_path
from vlv.errors import ConfigError, OutputError
from vlv.progress import Progress
from vlv.storage import Json, check_settings, read_settings, write_json
from vlv.toyworld.bad_teacher import Mistakes, mistaken
from vlv.toyworld.render import image_box, render
from vlv.toyworld.scene import MOST_SCENES, SPLITS, Split, sample_scene
from vlv.toyworld.styles import texts_of
from vlv.toyworld.writing import describe

MANIFEST = "dataset.json"
"""Beside the shards: what they were rendered with."""

CAPTION_STREAM = 7
"""Last part of the seed of a record's caption, after the seed and the index of its scene."""
TEXTS_STREAM = 8
"""Likewise of its captions in several styles and its questions."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything that the content of a data set depends on."""

    split: Split
    num: int
    seed: int
    per_shard: int = 1000
    start: int = 0
    wrong: float = 0.0
    """Share of the objects' attributes that captions state wrongly, see `vlv.toyworld.bad_teacher`."""
    mistakes: Mistakes = "random"
    instruct: bool = False
    """Whether records also hold captions in several styles, and questions, see `vlv.toyworld.styles`."""

    def check(self) -> None:
        """Refuse what cannot be rendered.

        Raises:
            ConfigError: The split is unknown, or a number is out of range.
        """
        if self.split not in SPLITS:
            raise ConfigError(f"unknown split {self.split!r}; choose one of {', '.join(SPLITS)}")
        least = {"num": 1, "seed": 0, "per_shard": 1, "start": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name} must be at least {bound}, not {getattr(self, name)}")
        if self.num > MOST_SCENES:
            raise ConfigError(f"num must be at most {MOST_SCENES}, not {self.num}")
        if not 0 <= self.wrong <= 1:
            raise ConfigError(f"wrong must be a share from 0 to 1, not {self.wrong}")

    @property
    def shards(self) -> list[range]:
        """The scene numbers of every shard."""
        scenes = range(self.start, self.start + self.num)
        return [scenes[i : i + self.per_shard] for i in range(0, self.num, self.per_shard)]


def render_shards(out: Path, layout: Layout, workers: int | None = None) -> list[Path]:
    """Render scenes into tar shards; the same call goes on after an interruption.

    Only whole shards bear their final name, and those that are there already are kept. The bytes
    depend on neither the number of workers nor on interruptions.

    Args:
        out: Folder of the shards `SPLIT-00000.tar`; created.
        layout: What is rendered.
        workers: Processes, each of which renders one shard at a time; by default one for every
            processor. With more than one the calling script needs `if __name__ == "__main__":`.

    Returns:
        All shards of the data set, in their order.

    Raises:
        ConfigError: The split is unknown, or a number is out of range.
        OutputError: The folder holds other data, or cannot be written.
    """
    layout.check()
    engine = LocalEngine(workers)
    _claim(out, layout)
    paths = [shard_path(out, number, layout.split) for number in range(len(layout.shards))]
    todo = [number for number, path in enumerate(paths) if not path.exists()]
    done = layout.num - sum(len(layout.shards[number]) for number in todo)
    progress = Progress(layout.num, done=done, what=layout.split, unit="scene")
    with engine, progress:
        for count in engine.run(partial(_render_shard, out, layout), todo):
            progress.advance(count)
    return paths


def _claim(out: Path, layout: Layout) -> None:
    """Write down what the folder will hold, or refuse one that holds something else."""
    found = read_settings(out / MANIFEST, mend="delete the folder")
    if found is not None:
        mend = "name another folder, or delete this one"
        right = {
            "wrong": 0.0,
            "mistakes": "random",
            "instruct": False,
        }  # of folders that know of neither
        check_settings(out, found, asdict(layout), mend=mend, defaults=right)
        return
    if any(out.glob("*.tar")):
        raise OutputError(
            f"{out} holds shards but no {MANIFEST} that says what they are; name another folder"
        )
    write_json(out / MANIFEST, asdict(layout))


def _render_shard(out: Path, layout: Layout, number: int) -> int:
    """Render one shard; returns the number of its scenes."""
    scenes = layout.shards[number]
    with TarShardWriter(out, layout.split, layout.per_shard, index=number) as writer:
        for index in scenes:
            writer.write(f"{layout.split}-{index:07d}", _record(layout, index))
    return len(scenes)


def _record(layout: Layout, index: int) -> dict[str, bytes | str]:
    scene = sample_scene(layout.seed, index, layout.split)
    rng = np.random.default_rng([layout.seed, index, CAPTION_STREAM])
    meta: Json = {
        "scene": scene.to_dict(),
        "boxes": [image_box(scene, solid) for solid in scene.solids],
    }
    told = scene
    if layout.wrong:
        told = mistaken(scene, layout.wrong, layout.mistakes, rng)
    caption = describe(told, "detailed", rng)
    if layout.instruct:
        meta |= texts_of(told, np.random.default_rng([layout.seed, index, TEXTS_STREAM]))
    png = io.BytesIO()
    Image.fromarray(render(scene).image).save(png, "png")
    return {
        "png": png.getvalue(),
        "txt": caption,
        "json": json.dumps(meta),
    }
