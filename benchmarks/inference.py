"""How much faster are captions and reconstructions than the straightforward way?

    python benchmarks/inference.py --json benchmarks/results/inference-cpu.json

It takes about three minutes on two quiet cores.

The straightforward way is that of the authors' scripts: captions with four beams, two images at a time; reconstructions
with 50 steps of the ancestral DDPM sampler. Ours are the commands' defaults: greedy captions, sixteen at a time, and 20
steps of DPM-Solver++. The results differ, as the methods do; what they are worth is for an evaluation to say.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from baseline import encode
from contest import Contest, compete, write

from models import SIZES, Models, Sizes, make_batch, make_models
from vlv.models.context import Context

Clock = Callable[[], float]


def captions(models: Models, sizes: Sizes, options: argparse.Namespace, clock: Clock) -> Contest:
    """Of as many images as there are in sixteen; random weights write to the last token."""
    pixels = _pixels(models, sizes, 16, options.seed)
    encoder, decoder, writer = models.encoder, models.decoder, models.caption_decoder

    @torch.no_grad()
    def baseline() -> None:
        for pair in pixels.split(2):
            c = decoder.context(encode(encoder, pair))
            writer.generate(
                c.sequence, max_new_tokens=options.tokens, num_beams=4, early_stopping=True
            )

    @torch.no_grad()
    def ours() -> None:
        writer.generate(decoder.context(encoder(pixels)).sequence, max_new_tokens=options.tokens)

    unit = f"{len(pixels)} captions of {options.tokens} tokens"
    return compete(
        "captions",
        unit,
        {"baseline: 4 beams, batch 2": baseline, "greedy, batch 16": ours},
        repeats=options.repeats,
        clock=clock,
    )


def reconstructions(
    models: Models, sizes: Sizes, options: argparse.Namespace, clock: Clock
) -> Contest:
    """Of two images with guidance 2, from pixels to pixels."""
    pixels = _pixels(models, sizes, 2, options.seed)
    encoder, decoder = models.encoder, models.decoder
    seeds = range(options.seed, options.seed + 2)
    null = Context(torch.zeros(1, encoder.num_queries, encoder.config.text_width))

    @torch.no_grad()
    def draw(c: Context, sampler: str, steps: int) -> None:
        decoder.sample(c, seeds=seeds, steps=steps, sampler=sampler, null=null)  # type: ignore[arg-type]

    @torch.no_grad()
    def baseline() -> None:
        draw(decoder.context(encode(encoder, pixels)), "ddpm", options.baseline_steps)

    @torch.no_grad()
    def ours() -> None:
        draw(decoder.context(encoder(pixels)), "dpm", options.steps)

    names = (
        f"baseline: DDPM, {options.baseline_steps} steps",
        f"DPM-Solver++, {options.steps} steps",
    )
    return compete(
        "reconstructions",
        "2 images",
        {names[0]: baseline, names[1]: ours},
        repeats=options.repeats,
        clock=clock,
    )


def _pixels(models: Models, sizes: Sizes, count: int, seed: int) -> torch.Tensor:
    one: torch.Tensor = make_batch(sizes, models.caption_decoder.tokenizer, seed=seed)["pixels"]
    return one.repeat(-(-count // len(one)), 1, 1, 1)[:count]


def main() -> None:
    """Time, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", choices=sorted(SIZES), default="mid")
    parser.add_argument("--only", choices=("captions", "reconstructions"))
    parser.add_argument("--tokens", type=int, default=32, help="of each caption")
    parser.add_argument("--steps", type=int, default=20, help="of DPM-Solver++")
    parser.add_argument("--baseline-steps", type=int, default=50, help="of DDPM")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of images and noise")
    parser.add_argument("--threads", type=int, help="of torch; all cores by default")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count processor time, on a machine that others use"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    clock = time.process_time if options.cpu_time else time.perf_counter
    models, contests = make_models(options.models), []
    for part in (models.encoder, models.decoder, models.caption_decoder):
        part.eval()
    for name, contest in (("captions", captions), ("reconstructions", reconstructions)):
        if options.only in (None, name):
            contests.append(contest(models, SIZES[options.models], options, clock))
            print(contests[-1], flush=True)
    if options.json is not None:
        write(options.json, options.models, contests)


if __name__ == "__main__":
    main()
