"""Our own loop or an engine: how fast does each write captions, by how many are wanted at a time?

    python benchmarks/engine.py --python vllm/bin/python --json benchmarks/results/engine-cpu.json

Both get the same caption embeddings of rendered scenes on the same cores, in turn, and project them; embedding is not timed. Ours writes
batches, the engine gets as many requests at once. Before that, many scenes are captioned by both, and the captions with equal tokens counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from contest import Contest, Row, compete, note, write

from vlv.engine import EngineSettings, engine_writes
from vlv.models.arguments import present
from vlv.models.pipeline import VLVPipeline
from vlv.toyworld.render import render
from vlv.toyworld.scene import sample_scene

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlv.models.decoding import Caption

AT_A_TIME = (1, 4, 16, 64)


class Contestants:
    """The same captions by two writers.

    Args:
        pipe: The model, to which the engine is attached.
        z: Of the scenes.
        tokens: Longest caption; None is what the model has.
    """

    def __init__(self, pipe: VLVPipeline, z: torch.Tensor, tokens: int | None) -> None:
        self._pipe, self._z, self._tokens = pipe, z, tokens
        self._decoder = present(pipe.caption_decoder, "caption_decoder")
        self._engine = present(self._decoder.writer, "engine")

    def write(self, num: int, batch_size: int, *, by_engine: bool) -> list[Caption]:
        """Captions of the first scenes."""
        self._decoder.writer = self._engine if by_engine else None
        z = self._z[:num]
        try:
            return self._pipe.describe(z=z, batch_size=batch_size, max_new_tokens=self._tokens)
        finally:
            self._decoder.writer = self._engine

    def calls(self, num: int, batch_size: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Both as functions without arguments."""
        return (
            lambda: self.write(num, batch_size, by_engine=False),
            lambda: self.write(num, batch_size, by_engine=True),
        )


def race(both: Contestants, at_a_time: int, num: int, repeats: int) -> Contest:
    """Captions per second with so many at a time."""
    ours, engine = both.calls(num, at_a_time)
    contest = compete(
        f"{at_a_time} at a time",
        f"{num} captions",
        {f"own loop, batch {at_a_time}": ours, f"engine, {at_a_time} requests": engine},
        repeats=repeats,
    )
    return note(contest, lambda row: {"captions/s": num / statistics.median(row.seconds)})


def count_equal(both: Contestants, num: int) -> int:
    """Captions with the same tokens; they are not timed."""
    most = max(AT_A_TIME)
    own, found = (both.write(num, most, by_engine=by_engine) for by_engine in (False, True))
    equal = sum(a.ids == b.ids and a == b for a, b in zip(own, found, strict=True))
    print(f"{equal} of {num} captions have equal tokens", flush=True)
    return equal


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--python", help="interpreter of an environment with vLLM")
    where.add_argument("--url", help="address of an engine that has the language model")
    parser.add_argument("--model", default="vlv-tiny")
    parser.add_argument("--equal", type=int, default=500, help="scenes whose captions are compared")
    parser.add_argument("--num", type=int, default=64, help="captions of a round, at most")
    parser.add_argument("--tokens", type=int, help="longest caption")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of our own loop; all cores by default")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    pipe = VLVPipeline.from_pretrained(options.model, parts=["caption"])
    count = max(options.equal, options.num)
    scenes = (sample_scene(1, index, "test") for index in range(count))
    z = pipe.embed([render(scene, pipe.image_size).image for scene in scenes], batch_size=32)
    settings = EngineSettings(python=options.python, url=options.url)
    with engine_writes(present(pipe.caption_decoder, "caption_decoder"), settings):
        both = Contestants(pipe, z, options.tokens)
        equal = count_equal(both, options.equal)
        contests = [
            race(both, size, min(options.num, 8 * size), options.repeats) for size in AT_A_TIME
        ]
    contests[-1] = note(contests[-1], lambda row: equal_tokens(row, equal, options.equal))
    print(*contests, sep="\n")
    if options.json is not None:
        write(options.json, options.model, contests)


def equal_tokens(row: Row, equal: int, num: int) -> dict[str, float]:
    """What stands beside the engine: how many captions had the tokens of our own loop."""
    return {f"equal of {num}": equal if row.name.startswith("engine") else num}


if __name__ == "__main__":
    main()
