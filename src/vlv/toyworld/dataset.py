"""Rendered data sets: tar shards that the ordinary data path reads, and sheets for a person.

A record holds the picture (`.png`), a detailed caption (`.txt`) and, in `.json`, the scene and the
pixel box (left, top, right, bottom) of every solid.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vlv.data.shards import TarShardWriter, shard_path
from vlv.errors import ConfigError, OutputError
from vlv.storage import write_text
from vlv.toyworld.render import image_box, render
from vlv.toyworld.scene import SPLITS, Scene, Split, sample_scene
from vlv.toyworld.writing import describe

MANIFEST = "dataset.json"
"""Beside the shards: what they were rendered with."""

CAPTION_STREAM = 7
"""Last part of the seed of a record's caption, after the seed and the index of its scene."""

REFRESH_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything that the content of a data set depends on."""

    split: Split
    num: int
    seed: int
    per_shard: int = 1000
    start: int = 0

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

    @property
    def shards(self) -> list[range]:
        """The scene numbers of every shard."""
        scenes = range(self.start, self.start + self.num)
        return [scenes[i : i + self.per_shard] for i in range(0, self.num, self.per_shard)]


def render_shards(
    out: Path,
    *,
    split: Split,
    num: int,
    seed: int,
    per_shard: int = 1000,
    workers: int | None = None,
    start: int = 0,
) -> list[Path]:
    """Render scenes into tar shards; the same call goes on after an interruption.

    Only whole shards bear their final name, and those that are there already are kept. The bytes
    depend on neither the number of workers nor on interruptions.

    Args:
        out: Folder of the shards `SPLIT-00000.tar`; created.
        split: Of the scenes.
        num: Number of scenes.
        seed: Of scenes and captions.
        per_shard: Scenes in a full shard.
        workers: Processes, each of which renders one shard at a time; by default one for every
            processor. With more than one the calling script needs `if __name__ == "__main__":`.
        start: Number of the first scene.

    Returns:
        All shards of the data set, in their order.

    Raises:
        ConfigError: The split is unknown, or a number is out of range.
        OutputError: The folder holds other data, or cannot be written.
    """
    layout = Layout(split, num, seed, per_shard, start)
    layout.check()
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be at least 1, not {workers}")
    _claim(out, layout)
    paths = [shard_path(out, number, split) for number in range(len(layout.shards))]
    todo = [number for number, path in enumerate(paths) if not path.exists()]
    left = sum(len(layout.shards[number]) for number in todo)
    workers = min(workers or os.cpu_count() or 1, len(todo))
    with tqdm(total=num, initial=num - left, desc=split, unit="scene", disable=None) as bar:
        if workers > 1:
            _render_in_processes(out, layout, todo, workers, bar)
        for number in todo if workers == 1 else ():
            _render_shard(out, layout, number, bar.update)
    return paths


def _claim(out: Path, layout: Layout) -> None:
    """Write down what the folder will hold, or refuse one that holds something else."""
    file = out / MANIFEST
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if any(out.glob("*.tar")):
                raise OutputError(
                    f"{out} holds shards but no {MANIFEST} that says what they are; name another folder"
                )
            write_text(file, json.dumps(asdict(layout)) + "\n")
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise OutputError(f"{file} is damaged ({error}); delete the folder") from error
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}") from error
    for name, value in asdict(layout).items():
        if found.get(name) != value:
            raise OutputError(
                f"{out} was rendered with {name} {found.get(name)}, not {value}; name another folder, "
                "or delete this one"
            )


def _render_shard(out: Path, layout: Layout, number: int, tick: Callable[[], object]) -> None:
    """Render one shard; `tick` is called after every scene and may raise to abandon the shard."""
    with TarShardWriter(out, layout.split, layout.per_shard, index=number) as writer:
        for index in layout.shards[number]:
            writer.write(f"{layout.split}-{index:07d}", _record(layout, index))
            tick()


def _record(layout: Layout, index: int) -> dict[str, bytes | str]:
    scene = sample_scene(layout.seed, index, layout.split)
    rng = np.random.default_rng([layout.seed, index, CAPTION_STREAM])
    meta = {"scene": scene.to_dict(), "boxes": [image_box(scene, solid) for solid in scene.solids]}
    picture = io.BytesIO()
    Image.fromarray(render(scene).image).save(picture, "png")
    return {
        "png": picture.getvalue(),
        "txt": describe(scene, "detailed", rng),
        "json": json.dumps(meta),
    }


# --- worker processes ---------------------------------------------------------------------------


def _render_in_processes(
    out: Path, layout: Layout, todo: list[int], workers: int, bar: tqdm[Any]
) -> None:
    """Hand the shards to worker processes; when anything goes wrong they abandon theirs at once."""
    context = multiprocessing.get_context("spawn")
    stop, done = context.Event(), context.Value("q", 0)
    before = bar.n
    with ProcessPoolExecutor(workers, context, _start_worker, (stop, done)) as pool:
        try:
            waiting = {pool.submit(_work, out, layout, number) for number in todo}
            while waiting:
                ended, waiting = wait(waiting, REFRESH_SECONDS, FIRST_COMPLETED)
                bar.n = before + done.value
                bar.refresh()
                for future in ended:
                    future.result()
        except BrokenProcessPool as error:
            raise OutputError(
                f"a process that rendered into {out} was killed; the same call goes on, perhaps with "
                "fewer workers"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}
"""What a worker process was started with: the event `stop` and the counter `done`."""


def _start_worker(stop: Event, done: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent acts
    _worker.update(stop=stop, done=done)


def _work(out: Path, layout: Layout, number: int) -> None:
    _render_shard(out, layout, number, _tick)


def _tick() -> None:
    if _worker["stop"].is_set():
        raise InterruptedError("the rendering was interrupted")
    with _worker["done"].get_lock():
        _worker["done"].value += 1


# --- looking ------------------------------------------------------------------------------------


def contact_sheet(
    pictures: Sequence[Scene | Image.Image], columns: int = 8, *, gap: int = 4
) -> Image.Image:
    """Lay pictures out on a white page, row by row.

    Args:
        pictures: Scenes, which are rendered, or pictures of one size.
        columns: Pictures in a row.
        gap: Pixels between the pictures and around the page.

    Raises:
        ConfigError: There is no picture, or no column.
    """
    if not pictures or columns < 1:
        raise ConfigError(f"a sheet of {len(pictures)} pictures in {columns} columns is empty")
    images = [_picture(picture) for picture in pictures]
    columns = min(columns, len(images))
    width, height = images[0].width + gap, images[0].height + gap
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        page.paste(image, (column * width + gap, row * height + gap))
    return page


def _picture(picture: Scene | Image.Image) -> Image.Image:
    return Image.fromarray(render(picture).image) if isinstance(picture, Scene) else picture
