"""How fast is a model of the toy world on this machine?

    python benchmarks/speed.py --model vlv-tiny --json speed.json

Captions, reconstructions, the renderer, and one step of every training: the objectives of the real trainings on freshly
rendered scenes, with backward pass, clipping and AdamW, without checkpoints. Every figure is the median of three repeats
after a warm-up; reading and writing files is not in it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from vlv.config import OptimConfig, load_config
from vlv.data.images import to_tensor
from vlv.evaluation.experiments.samples import DataSet
from vlv.evaluation.experiments.toyworld import describe_model
from vlv.models.batching import side_by_side
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.encoder import VLVEncoderConfig
from vlv.models.pipeline import VLVPipeline
from vlv.toyworld import components
from vlv.toyworld.objectives import (
    FlorenceObjective,
    LlmObjective,
    TeacherObjective,
    VaeObjective,
)
from vlv.toyworld.pretrain import RECIPES
from vlv.toyworld.render import image_box, render
from vlv.toyworld.scene import COLUMNS, Scene, sample_scene
from vlv.training.journal import versions
from vlv.training.objective import Batch, Objective
from vlv.training.optim import Optimizer
from vlv.training.stages import Stage1, Stage2
from vlv.training.weights import set_train_mode, trainable_parameters

AFTER_WARM_START = 10**6
"""Number of the timed step: far behind the warm start, so that the loss is the denoising loss."""


@dataclass(frozen=True)
class World:
    """Rendered scenes with their captions."""

    scenes: tuple[Scene, ...]
    captions: tuple[str, ...]
    pixels: Tensor
    """uint8 (N, 3, S, S)."""

    def floats(self) -> Tensor:
        """Pixels in [0, 1]."""
        return self.pixels.float() / 255


def make_world(num: int, side: int) -> World:
    """Scenes of the split test, of one side."""
    samples = DataSet("test", 0, num).samples()
    return World(
        tuple(sample.known_scene for sample in samples),
        tuple(sample.references[0] for sample in samples),
        torch.stack([to_tensor(sample.square(side)) for sample in samples]),
    )


@dataclass(frozen=True)
class Speed:
    """One line of the report."""

    name: str
    unit: str
    batch: str
    value: float
    """Median of the repeats."""
    repeats: tuple[float, ...]


class Clock:
    """Times actions: one warm-up, then repeats of at least so many seconds each; 0 seconds try it without warm-up."""

    def __init__(self, repeats: int, seconds: float, most: int | None = None) -> None:
        self.repeats, self.seconds, self.most = repeats, seconds, most
        self.speeds: list[Speed] = []

    def size(self, size: int) -> int:
        """Of a batch, unless it is to be smaller."""
        return min(size, self.most or size)

    def rate(self, name: str, unit: str, batch: str, action: Callable[[], Any], items: int) -> None:
        """Items per second of an action that does `items` at a time."""
        self._add(name, unit, batch, [items / t for t in self._times(name, action)])

    def duration(self, name: str, unit: str, batch: str, action: Callable[[], Any]) -> None:
        """Seconds of one action."""
        self._add(name, unit, batch, self._times(name, action))

    def _add(self, name: str, unit: str, batch: str, values: list[float]) -> None:
        self.speeds.append(Speed(name, unit, batch, statistics.median(values), tuple(values)))

    def _times(self, name: str, action: Callable[[], Any]) -> list[float]:
        print(f"{name} ...", file=sys.stderr)
        if self.seconds:
            action()
        return [self._time(action) for _ in range(self.repeats)]

    def _time(self, action: Callable[[], Any]) -> float:
        start, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start < self.seconds:
            action()
            count += 1
        return (time.perf_counter() - start) / count


# --- what is timed -----------------------------------------------------------------------------------


def time_renderer(clock: Clock) -> None:
    """One process; `vlv toyworld render` uses one per core."""
    scenes = [sample_scene(0, index, "test") for index in range(clock.size(64))]
    clock.rate(
        "renderer (one process)",
        "images/s",
        "64x64",
        lambda: [render(s) for s in scenes],
        len(scenes),
    )


def time_inference(clock: Clock, pipe: VLVPipeline, world: World) -> None:
    """Captions and reconstructions, from pixels."""
    images = list(world.floats())
    if pipe.caption_decoder is not None:
        batch = images[: clock.size(32)]
        size = len(batch)
        clock.rate(
            "captions, greedy",
            "captions/s",
            str(size),
            lambda: pipe.caption(batch, batch_size=size, max_new_tokens=160),
            size,
        )
    for size in (1, clock.size(16)):
        action = functools.partial(pipe.reconstruct, images[:size], batch_size=size, steps=20)
        clock.duration("reconstruction, 20 steps", "s", str(size), action)
    time_side_by_side(clock, pipe, images)


def time_side_by_side(clock: Clock, pipe: VLVPipeline, images: list[Tensor]) -> None:
    """The same pictures as an evaluation draws them, and batch after batch."""
    size = clock.size(16)
    c, null = pipe.context(pipe.embed(images[: 4 * size])), pipe.decoder.null_context()

    def draw(start: int) -> Tensor:
        seeds = range(start, start + size)
        return pipe.decoder.sample(c[start : start + size], seeds=seeds, steps=20, null=null)

    for name, workers in (("one after another", 1), ("side by side", torch.get_num_threads())):

        def action(workers: int = workers) -> None:
            deque(side_by_side(draw, range(0, 4 * size, size), workers), maxlen=0)

        batch = f"4 x {size}, {workers} at a time"
        clock.rate(f"pictures, {name}", "images/s", batch, action, 4 * size)


def time_step(clock: Clock, name: str, objective: Objective, batch: Batch) -> None:
    """Forward and backward pass, clipping and AdamW."""
    set_train_mode(objective.module)
    parameters = trainable_parameters(objective.module)
    optimizer = Optimizer(
        parameters, OptimConfig(lr=1e-5, weight_decay=0.01, warmup_steps=0), AFTER_WARM_START
    )
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        torch.autograd.backward(objective.loss(batch, generator).total)
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step(0)
        optimizer.zero_grad()

    size = len(batch["ids"])
    trained = sum(p.numel() for p in parameters.values())
    clock.rate(f"step: {name}", "images/s", f"{size}, {trained / 1e6:.2f} M trained", step, size)


def time_trainings(clock: Clock, pipe: VLVPipeline, world: World) -> None:
    """One step of every training, on copies of the model's parts."""
    decoder = copy_decoder(pipe)
    sizes = {name: clock.size(recipe.batch_size) for name, recipe in RECIPES.items()}
    vae = copy.deepcopy(pipe.vae).requires_grad_(True)
    time_step(clock, "VAE", VaeObjective(vae), make_batch(world, sizes["vae"]))
    cached = cached_latents(decoder, world)
    batch = make_batch(world, sizes["unet"]) | first(cached, sizes["unet"])
    batch |= {"texts": text_ids(pipe.tokenizer, world, sizes["unet"], decoder.num_positions)}
    time_step(clock, "teacher U-Net, cached latents", TeacherObjective(copy_decoder(pipe)), batch)
    florence, size = make_florence(), sizes["florence"]
    ids = text_ids(florence.tokenizer, world, size)
    batch = make_batch(world, size) | dict.fromkeys(components.TASKS, ids)
    time_step(clock, "Florence-2", florence, batch)
    time_step(clock, "language model", *make_llm(world, sizes["llm"]))
    time_stages(clock, pipe, world, cached)


def time_stages(clock: Clock, pipe: VLVPipeline, world: World, cached: dict[str, Tensor]) -> None:
    """Both stages with the settings of their presets."""
    first_stage, second_stage = load_config("tiny-stage1"), load_config("tiny-stage2")
    size = clock.size(first_stage.loop.batch_size)
    live = make_batch(world, size)
    for name, batch in (("live", live), ("cached", live | first(cached, size))):
        encoder, decoder = copy.deepcopy(pipe.encoder), copy_decoder(pipe)
        assert first_stage.stage1 is not None
        objective = Stage1(encoder, decoder, first_stage.stage1)
        time_step(clock, f"stage 1, {name} latents", objective, batch)
    if pipe.caption_decoder is not None:
        assert second_stage.stage2 is not None
        size = clock.size(second_stage.loop.batch_size)
        batch = make_batch(world, size) | first(cached, size)
        parts = copy.deepcopy(pipe.encoder), copy_decoder(pipe), copy.deepcopy(pipe.caption_decoder)
        second = Stage2(*parts, second_stage.stage2)
        time_step(clock, "stage 2, encoder still frozen", second, batch | {"step": 0})
        time_step(clock, "stage 2, cached latents", second, batch)


# --- data and parts ----------------------------------------------------------------------------------


def make_batch(world: World, size: int) -> Batch:
    """A batch as the loader gives it."""
    scenes = world.scenes[:size]
    side = world.pixels.shape[-1]
    boxes = torch.zeros(size, len(COLUMNS), 4, dtype=torch.int16)
    for row, scene in enumerate(scenes):
        for number, solid in enumerate(scene.solids):
            boxes[row, number] = torch.tensor(image_box(scene, solid, side))
    return {
        "ids": [str(index) for index in range(size)],
        "pixels": world.pixels[:size],
        "captions": list(world.captions[:size]),
        "boxes": boxes,
        "step": AFTER_WARM_START,
    }


def text_ids(tokenizer: Any, world: World, size: int, length: int | None = None) -> Tensor:
    """Token ids of the true captions, (B, L)."""
    rows = tokenizer(
        list(world.captions[:size]),
        padding="max_length" if length else True,
        truncation=length is not None,
        max_length=length,
        return_tensors="pt",
    )
    return torch.as_tensor(rows.input_ids)


def cached_latents(decoder: DiffusionDecoder, world: World) -> dict[str, Tensor]:
    """What `vlv data cache-latents` would have stored."""
    posterior = decoder.posterior(world.floats())
    return {"latents_mean": posterior.mean, "latents_std": posterior.std}


def first(rows: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """The first rows of every tensor."""
    return {name: tensor[:size] for name, tensor in rows.items()}


def copy_decoder(pipe: VLVPipeline) -> DiffusionDecoder:
    """The frozen parts, to be trained or not, apart from those of the pipeline."""
    return copy.deepcopy(pipe.decoder)


def make_florence() -> FlorenceObjective:
    """Fresh weights: those in the model are part of the encoder."""
    tokenizer = components.make_florence_tokenizer()
    florence = components.make_florence(tokenizer, 0)
    mean, std = VLVEncoderConfig.image_mean, VLVEncoderConfig.image_std
    normalise = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    return FlorenceObjective(florence, tokenizer, normalise)


def make_llm(world: World, size: int) -> tuple[LlmObjective, Batch]:
    """Fresh weights, as above, and a batch."""
    tokenizer = components.make_llm_tokenizer()
    batch = make_batch(world, size) | {"texts": text_ids(tokenizer, world, size)}
    return LlmObjective(components.make_llm(tokenizer, 0)), batch


# --- the script --------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="vlv-tiny", help="vlv-tiny or a model folder")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--threads", type=int, help="of torch; all cores by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="least length of a repeat")
    parser.add_argument("--most", type=int, help="images together, to try the script")
    parser.add_argument("--only", choices=("renderer", "inference", "training"))
    return parser.parse_args()


@contextmanager
def threads(num: int | None) -> Iterator[None]:
    """Work with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(num or before)
    yield
    torch.set_num_threads(before)


def report(pipe: VLVPipeline, speeds: list[Speed]) -> dict[str, Any]:
    """Print the figures and return them as JSON values."""
    model = describe_model(pipe)
    shapes = {
        "pixels": [3, pipe.image_size, pipe.image_size],
        "z": [pipe.encoder.num_queries, pipe.encoder.config.text_width],
    }
    print(
        f"{model['name']}: "
        + ", ".join(f"{k} {v / 1e6:.2f} M" for k, v in model["parameters"].items())
    )
    print(f"shapes: {shapes}; {torch.get_num_threads()} threads")
    print(", ".join(f"{k} {v}" for k, v in versions().items() if k not in {"command", "started"}))
    for speed in speeds:
        spread = f"{min(speed.repeats):.3g} to {max(speed.repeats):.3g}"
        print(
            f"{speed.name:<36} {speed.value:>9.3g} {speed.unit:<11} batch {speed.batch:<22} ({spread})"
        )
    return {
        "model": model,
        "shapes": shapes,
        "versions": versions(),
        "speeds": [asdict(speed) for speed in speeds],
    }


def main() -> None:
    """Time, print, write."""
    arguments = parse_arguments()
    disable_progress_bar()
    pipe = VLVPipeline.from_pretrained(arguments.model)
    clock = Clock(arguments.repeats, arguments.seconds, arguments.most)
    world = make_world(4 * clock.size(16), pipe.image_size)
    with threads(arguments.threads):
        if arguments.only in (None, "renderer"):
            time_renderer(clock)
        if arguments.only in (None, "inference"):
            time_inference(clock, pipe, world)
        if arguments.only in (None, "training"):
            time_trainings(clock, pipe, world)
        figures = report(pipe, clock.speeds)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
