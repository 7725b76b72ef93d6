"""What the real models do on a GPU: images per second, peak memory and use of the hardware, with random weights.

    python benchmarks/full_size.py --preset paper
    python benchmarks/full_size.py --preset paper-0.5b --uses stage1 captioning --batch-size 16

Nothing is downloaded: the parts are built from their configurations alone, and speed does not depend on what they know.
Measured are the steps of both stages (forward and backward pass, clipping, AdamW; bfloat16 with float32 masters),
captioning (greedy, to the full length) and reconstruction (DPM-Solver++, guided). Warm-up is left out; every figure is the
median of the repeats. Peak memory is what PyTorch's allocator held, beside what `vlv info` predicts. MFU is the least
FLOPs that the result needs, over time and peak; for captions and pictures the FLOPs are those that were run. The report
goes into benchmarks/results/. On a processor it runs too, for presets of miniature models, without memory and MFU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vlv.config import ModelPreset, RunConfig, load_config, load_models
from vlv.jobs.memory_plan import STAGES, plan_captioning, plan_reconstruction, plan_training
from vlv.models.architectures import Outline, outline
from vlv.models.folder import part_dtype
from vlv.training.assemble import Parts, make_objective, set_precision
from vlv.training.flops import flops_per_image, peak_flops
from vlv.training.journal import versions
from vlv.training.memory import Footprint
from vlv.training.objective import Objective
from vlv.training.optim import Optimizer, trainable_parameters
from vlv.training.weights import set_train_mode

BATCHES = {"stage1": [64], "stage2": [16], "captioning": [1, 8, 64, 256], "reconstruction": [1, 16]}
"""Images together, for each use."""
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Result:
    """One line of the report."""

    use: str
    batch_size: int
    images_per_second: float
    seconds: float
    """Of one step or batch, the median."""
    flops_per_image: float
    mfu: float | None
    """Share of the peak; None where none is known."""
    peak_bytes: int | None
    """Highest that the allocator held; None on a processor."""
    predicted_bytes: int


class Tokens:
    """Stands for a tokenizer that makes every caption equally long, and never ends one."""

    pad_token_id = 0

    def __init__(self, length: int, vocabulary: int) -> None:
        self._length, self.eos_token_id = length, vocabulary - 1

    def __call__(self, texts: list[str], **_: Any) -> Any:
        """As many tokens for each text, without the end token."""
        return SimpleNamespace(input_ids=[[1] * (self._length - 1) for _ in texts])

    def decode(self, ids: list[int], **_: Any) -> str:
        """Any text."""
        return str(len(ids))


class Bench:
    """The models of a preset on a device, and how they are timed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.preset: ModelPreset = load_models(options.preset)
        self.peak = peak_flops(self.device, options.peak_tflops)

    def fresh(self) -> Outline:
        """All parts with random weights, the same each time."""
        gc.collect()
        torch.manual_seed(0)
        drawn = outline(self.preset, str(self.device))
        vocabulary = drawn.caption_decoder.llm.config.vocab_size
        tokens: Any = Tokens(self.options.tokens, vocabulary)
        drawn.caption_decoder.tokenizer = tokens
        return drawn

    def pixels(self, count: int, size: int) -> Tensor:
        """Random images (B, 3, H, W), uint8."""
        return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=self.device)

    def time(
        self, use: str, batch_size: int, work: Callable[[], object], flops: float, plan: Footprint
    ) -> Result:
        """Run `work` on a whole batch until the repeats are done."""
        work()  # the warm-up
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        times = []
        for _ in range(self.options.repeats):
            start = time.perf_counter()
            work()
            self._wait()
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times)
        rate = batch_size / seconds
        held = None
        if self.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self.device)
        mfu = rate * flops / self.peak if self.peak else None
        return Result(use, batch_size, rate, seconds, flops, mfu, held, plan.peak)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # --- uses

    def train(self, stage: str, batch_size: int) -> Result:
        """One step of a stage."""
        changes = [f"loop.batch_size={batch_size}", "loop.accumulate=1", "loop.precision=bf16"]
        if stage == "stage2":
            changes.append(f"stage2.max_caption_tokens={self.options.tokens}")
        name = stage.replace("stage", "stage ")
        config = load_config(STAGES[name], changes)
        drawn = self.fresh()
        decoder = drawn.decoder
        parts = Parts(drawn.encoder, decoder, drawn.caption_decoder if stage == "stage2" else None)
        if stage == "stage2":
            decoder.unet = decoder.vae = None
        objective = make_objective(config, parts)
        set_precision(config, parts, objective)
        names = [str(row) for row in range(batch_size)]
        batch = {"ids": names, "captions": names, "step": config.loop.steps - 1}
        batch["pixels"] = self.pixels(batch_size, drawn.image_size)
        step = _step(objective, batch, config, self.device)
        flops = flops_per_image(objective, batch)
        plan = plan_training(self.preset, name, config).footprint
        return self.time(stage, batch_size, step, flops, plan)

    @torch.no_grad()
    def caption(self, batch_size: int) -> Result:
        """Captions of the full length."""
        drawn, tokens = self.fresh(), self.options.tokens
        for part in (drawn.encoder, drawn.decoder.text_encoder, drawn.caption_decoder):
            part.to(torch.bfloat16)
        pixels = self.pixels(batch_size, drawn.image_size)

        def work(count: int = batch_size) -> None:
            c = drawn.decoder.context(drawn.encoder(pixels[:count]))
            drawn.caption_decoder.generate(c, max_new_tokens=tokens)

        plan = plan_captioning(self.preset, batch_size, torch.bfloat16, tokens).footprint
        return self.time("captioning", batch_size, work, _flops(lambda: work(1)), plan)

    @torch.no_grad()
    def reconstruct(self, batch_size: int) -> Result:
        """Pictures from z."""
        drawn, size = self.fresh(), self.preset.data.image_size
        decoder: Any = drawn.decoder
        for name in ("text_encoder", "unet", "vae"):
            getattr(decoder, name).to(part_dtype(name, torch.bfloat16))
        drawn.encoder.to(torch.bfloat16)
        pixels = self.pixels(batch_size, size)

        def work(count: int = batch_size) -> None:
            c = decoder.context(drawn.encoder(pixels[:count]))
            steps, seeds = self.options.sampler_steps, list(range(count))
            decoder.sample(c, seeds=seeds, steps=steps, null=c[:1], height=size, width=size)

        plan = plan_reconstruction(self.preset, batch_size, torch.bfloat16).footprint
        return self.time("reconstruction", batch_size, work, _flops(lambda: work(1)), plan)


def _step(
    objective: Objective, batch: dict[str, Any], config: RunConfig, device: torch.device
) -> Callable[[], None]:
    """Forward and backward pass, clipping and AdamW, as the training loop does them."""
    set_train_mode(objective.module)
    parameters = trainable_parameters(objective.module)
    optimizer = Optimizer(parameters, config.optim, config.loop.steps)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = objective.loss(batch, generator).total
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters.values(), config.optim.clip or float("inf"))
        optimizer.step(0)
        optimizer.zero_grad()

    return step


def _flops(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def main() -> None:
    """Measure what was asked for, print it, and write the report."""
    options = _options()
    bench = Bench(options)
    uses: dict[str, Callable[[int], Result]] = {
        "stage1": lambda size: bench.train("stage1", size),
        "stage2": lambda size: bench.train("stage2", size),
        "captioning": bench.caption,
        "reconstruction": bench.reconstruct,
    }
    name = (
        torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else options.device
    )
    print(f"{options.preset} on {name}, bfloat16, {options.tokens} tokens per caption")
    print(f"{'use':<16}{'batch':>6}{'images/s':>10}{'s':>9}{'GB':>8}{'predicted':>11}{'MFU':>8}")
    results = []
    for use in options.uses:
        for size in [options.batch_size] if options.batch_size else BATCHES[use]:
            try:
                result = uses[use](size)
            except torch.OutOfMemoryError:
                print(f"{use:<16}{size:>6}  does not fit into this device's memory", flush=True)
                continue
            results.append(asdict(result))
            print(_line(result), flush=True)
            _write(options, name, results)


def _line(result: Result) -> str:
    held = "-" if result.peak_bytes is None else f"{result.peak_bytes / 1e9:.2f}"
    mfu = "-" if result.mfu is None else f"{100 * result.mfu:.1f} %"
    return (
        f"{result.use:<16}{result.batch_size:>6}{result.images_per_second:>10.2f}{result.seconds:>9.3f}"
        f"{held:>8}{result.predicted_bytes / 1e9:>11.2f}{mfu:>8}"
    )


def _write(options: argparse.Namespace, name: str, results: list[dict[str, Any]]) -> None:
    """The report so far, so that a use that does not fit into memory loses nothing."""
    file = options.json
    if file is None:
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"full_size-{Path(options.preset).stem}-{name.replace(' ', '_')}.json"
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    report = {"device": name, "settings": settings, "versions": versions(), "results": results}
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--preset", default="paper", help="models, or a YAML file that names them")
    parser.add_argument("--uses", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--batch-size", type=int, help="for every use; by default several")
    parser.add_argument("--tokens", type=int, default=227, help="of a caption; the paper's mean")
    parser.add_argument("--sampler-steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default=device)
    parser.add_argument("--peak-tflops", type=float, help="of the device in bfloat16; MFU needs it")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
