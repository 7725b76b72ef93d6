"""What the real models do on a GPU: images per second, peak memory and use of the hardware, with random weights.

    python benchmarks/full_size.py --preset paper
    python benchmarks/full_size.py --preset paper-0.5b --uses captioning:16+compile stage1:128+loop.compile=auto

Nothing is downloaded: the parts are built from their configurations alone, and speed does not depend on what they know.
Both stages are trained by the loop of `vlv train` (bfloat16 with float32 masters, no recomputation unless asked for) on
photographs of 512 pixels that its loader decodes meanwhile, with cached latents too for stage 1; the breakdown of a step
comes with the figures. Captions are greedy and of the full length, pictures are guided and drawn by DPM-Solver++.
Warm-up is left out; a step of training is the mean of --steps, everything else the median of --repeats. Peak memory is what
PyTorch's allocator held, beside what `vlv info` predicts. MFU is the least FLOPs that the result needs, over time and peak;
for captions and pictures the FLOPs are those that were run. "data" is the loader alone. The report goes into benchmarks/results/. On a processor it
runs too, for presets of miniature models, without memory and MFU.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from photographs import photograph
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlv.config import ModelPreset, RunConfig, load_config, load_models
from vlv.data.loader import Listed, Loader, LoaderSettings
from vlv.data.shards import TarShardWriter
from vlv.data.source import find_records
from vlv.jobs.plans import STAGES, plan_captioning, plan_reconstruction, plan_training
from vlv.models.architectures import outline
from vlv.models.compilation import lay_out
from vlv.models.folder import part_dtype
from vlv.models.placement import compile_parts
from vlv.training.assemble import Parts, prepare
from vlv.training.distributed import World, join_world
from vlv.training.journal import versions
from vlv.training.precision import fast_products
from vlv.training.prediction import peak_flops
from vlv.training.profile import profile_training
from vlv.training.recompute import choose_recomputation

BATCHES = {
    "stage1": [64],
    "stage1-latents": [64],
    "stage2": [16],
    "captioning": [1, 8, 64, 256],
    "reconstruction": [1, 16],
    "data": [64],
}
"""Images together, for each use."""
RESULTS = Path(__file__).parent / "results"
COMPILED = "compile"
"""The setting of captioning and reconstruction: as their commands' --compile."""
SIDE = 512
"""Of the photographs that training reads."""


@dataclass(frozen=True)
class Result:
    """One line of the report."""

    use: str
    batch_size: int
    images_per_second: float
    seconds: float
    """Of one step or batch."""
    flops_per_image: float | None
    """None for the data alone."""
    mfu: float | None
    """Share of the peak; None where none is known."""
    peak_bytes: int | None
    """Highest that the allocator held; None on a processor."""
    predicted_bytes: int | None
    parts: dict[str, float] | None = None
    """Seconds of a training step by part."""
    settings: tuple[str, ...] = ()
    """Of training, beside the paper's; of captions and pictures, whether parts are compiled."""


@dataclass(frozen=True)
class Use:
    """What is measured."""

    name: str
    batch_size: int
    settings: tuple[str, ...] = ()


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
    """The models of a preset on the device at hand, and how they are timed.

    Args:
        options: See `--help`.
        photographs: Folder of what training reads.
        planners: Predict memory meanwhile, where the device need not wait for it.
    """

    def __init__(
        self, options: argparse.Namespace, photographs: Path, planners: ProcessPoolExecutor
    ) -> None:
        self.options, self.photographs, self.planners = options, photographs, planners
        self.device = join_world().device
        self.preset: ModelPreset = load_models(options.preset)
        self.size = self.preset.data.image_size
        self.peak = peak_flops(self.device, options.peak_tflops)

    def fresh(self, *, captions: bool = True) -> Parts:
        """Parts with random weights, the same each time."""
        gc.collect()
        torch.manual_seed(0)
        model = self.preset.model
        changes = {"input_size": self.options.input_size or model.input_size}
        changes |= {} if captions else {"llm": None}
        drawn = outline(model.model_copy(update=changes), self.size, str(self.device))
        encoder, decoder, caption_decoder = drawn
        if caption_decoder is None:
            return Parts(encoder, decoder)
        vocabulary = caption_decoder.llm.config.vocab_size
        tokens: Any = Tokens(self.options.tokens, vocabulary)
        caption_decoder.tokenizer = tokens
        return Parts(encoder, decoder, caption_decoder)

    def pixels(self, count: int) -> Tensor:
        """Random images (B, 3, H, W), uint8."""
        shape = (count, 3, self.size, self.size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)

    def plan(self, work: Callable[..., int], *details: Any) -> Future[int] | None:
        """A prediction under way, if wanted."""
        if self.options.no_predictions:
            return None
        return self.planners.submit(work, self.options.preset, *details)

    def product(self) -> float | None:
        """FLOP/s of a large product of bfloat16 matrices, which is what the device reaches; None on a processor."""
        if self.device.type != "cuda":
            return None
        left, right = torch.randn(2, 8192, 8192, device=self.device, dtype=torch.bfloat16)
        return 2 * 8192**3 / self.seconds(lambda: torch.mm(left, right), 20)

    # --- training

    def train(self, use: Use) -> Result:
        """Steps of a stage, by the loop and its loader."""
        stage, _, cached = use.name.partition("-")
        name = stage.replace("stage", "stage ")
        config = self.settings(name, use)
        plan = self.plan(_plan_training, name, config)
        parts = self.fresh(captions=stage == "stage2")
        if stage == "stage2":
            parts.decoder.unet = parts.decoder.vae = None
        objective = prepare(config, parts, self.device)
        alone = World(0, 1, self.device)
        choose_recomputation(objective, config.data.image_size, config.loop, config.optim, alone)
        self._forget_peak()
        with (
            fast_products(tf32=config.loop.tf32),
            self.loader(use.batch_size, extra=self.latents() if cached else None) as loader,
            tempfile.TemporaryDirectory() as folder,
        ):
            found = profile_training(
                objective, loader, config.loop, config.optim, Path(folder), self.options.steps
            )
        assert found.flops_per_image is not None, "random weights are counted as any others"
        line = self.result(use, found.step_seconds, found.flops_per_image, plan, found.seconds)
        return replace(line, mfu=found.mfu)  # of the peak in the run's own precision

    def read(self, use: Use) -> Result:
        """The loader alone; its threads are at work already when the clock starts."""
        count = 3 * self.options.num // use.batch_size
        with self.loader(use.batch_size, extra=None) as loader:
            next(loader)
            start = time.perf_counter()
            for _ in range(count):
                next(loader)
        return self.result(use, (time.perf_counter() - start) / count)

    def settings(self, name: str, use: Use) -> RunConfig:
        """Of a run: the paper's, all of it trains from the first step, and nothing is computed twice."""
        changes = [
            f"loop.batch_size={use.batch_size}",
            f"loop.global_batch_size={use.batch_size}",
            "loop.precision=bf16",
            "loop.recompute=never",
        ]
        if self.options.peak_tflops:
            changes.append(f"loop.peak_tflops={self.options.peak_tflops}")
        if name == "stage 2":
            changes += [
                f"stage2.max_caption_tokens={self.options.tokens}",
                "stage2.frozen_llm_steps=0",
                "stage2.frozen_encoder_steps=0",
            ]
        return load_config(STAGES[name], [*changes, *use.settings])

    def loader(self, batch_size: int, extra: dict[str, NDArray[Any]] | None) -> Loader:
        """Photographs, decoded again in every epoch."""
        settings = LoaderSettings(
            batch_size=batch_size, image_size=self.size, num_workers=self.options.workers
        )
        records = find_records([self.photographs])
        return Loader(Listed(records, extra or {}, keep_in_memory=False), settings)

    def latents(self) -> dict[str, NDArray[Any]]:
        """What a cache holds of the photographs, as random numbers."""
        side = self.size // 8
        draws = np.random.default_rng(0).standard_normal((self.options.num, 4, side, side))
        means = draws.astype(np.float16)
        return {"latents_mean": means, "latents_std": np.full_like(means, 0.1)}

    # --- inference

    @torch.no_grad()
    def caption(self, use: Use) -> Result:
        """Captions of the full length."""
        batch_size = use.batch_size
        tokens = self.options.tokens
        plan = self.plan(_plan_captions, batch_size, tokens)
        parts = self.fresh()
        parts.decoder.unet = parts.decoder.vae = None
        caption_decoder = parts.caption_decoder
        assert caption_decoder is not None, "asked for"
        for part in (parts.encoder, parts.decoder.text_encoder, caption_decoder):
            part.to(torch.bfloat16)
        pixels = self.pixels(batch_size)

        def work(count: int = batch_size, length: int = tokens) -> None:
            c = parts.decoder.context(parts.encoder(pixels[:count]))
            caption_decoder.generate(c.sequence, max_new_tokens=length)

        caption_decoder.records_steps = False  # replays are not counted
        # Each further token costs as much more than the one before.
        one, two, three = (self.flops(lambda n=n: work(1, n)) for n in (1, 2, 3))  # type: ignore[misc]
        step, growth, steps = two - one, three - 2 * two + one, tokens - 1
        flops = one + steps * step + growth * steps * (steps - 1) / 2
        caption_decoder.records_steps = True
        self.compile(use, parts.encoder)
        return self.time(use, work, flops, plan)

    @torch.no_grad()
    def reconstruct(self, use: Use) -> Result:
        """Pictures from z."""
        batch_size = use.batch_size
        plan = self.plan(_plan_pictures, batch_size)
        parts = self.fresh(captions=False)
        decoder: Any = parts.decoder
        for name in ("text_encoder", "unet", "vae"):
            getattr(decoder, name).to(part_dtype(name, torch.bfloat16))
        parts.encoder.to(torch.bfloat16)
        if self.device.type == "cuda":
            lay_out((decoder.unet, decoder.vae))
        pixels, side = self.pixels(batch_size), self.size

        def work(count: int = batch_size) -> None:
            c = decoder.context(parts.encoder(pixels[:count]))
            steps, seeds = self.options.sampler_steps, list(range(count))
            decoder.sample(c, seeds=seeds, steps=steps, null=c[:1], height=side, width=side)

        flops = self.flops(lambda: work(1))
        self.compile(use, parts.encoder, unet=decoder.unet, vae=decoder.vae)
        return self.time(use, work, flops, plan)

    def compile(self, use: Use, encoder: Any, unet: Any = None, vae: Any = None) -> None:
        """As --compile of the commands does, if asked for."""
        if COMPILED in use.settings:
            compile_parts(
                SimpleNamespace(encoder=encoder, unet=unet, transformer=None, vae=vae), self.device
            )

    def flops(self, work: Callable[[], None]) -> float:
        """FLOPs that are run."""
        # Older versions of PyTorch cannot count fused attention with grouped heads.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()
        return float(counter.get_total_flops())

    def time(
        self, use: Use, work: Callable[[], None], flops: float, plan: Future[int] | None
    ) -> Result:
        """Run `work` on a whole batch, for each image of which it does so many FLOPs, until the repeats are done."""
        work()  # the warm-up
        self._forget_peak()
        return self.result(use, self.seconds(work, self.options.repeats), flops, plan)

    def seconds(self, work: Callable[[], object], repeats: int) -> float:
        """Of a piece of work: the median of some repeats."""
        times = []
        for _ in range(repeats):
            self._wait()
            start = time.perf_counter()
            work()
            self._wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def result(
        self,
        use: Use,
        seconds: float,
        flops: float | None = None,
        plan: Future[int] | None = None,
        parts: dict[str, float] | None = None,
    ) -> Result:
        """The line of a use: seconds of a step or batch, and where the device computes, what that took of it."""
        rate = use.batch_size / seconds
        mfu = rate * flops / self.peak if flops and self.peak else None
        held = self._held() if flops else None
        memory = (held, plan.result() if plan else None)
        return Result(
            use.name, use.batch_size, rate, seconds, flops, mfu, *memory, parts, use.settings
        )

    # --- the device

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _held(self) -> int | None:
        on_gpu = self.device.type == "cuda"
        return torch.cuda.max_memory_allocated(self.device) if on_gpu else None


# --- predictions, in other processes


def _plan_training(preset: str, stage: str, config: RunConfig) -> int:
    return plan_training(load_models(preset), stage, config).footprint.peak


def _plan_captions(preset: str, batch_size: int, tokens: int) -> int:
    return plan_captioning(load_models(preset), batch_size, torch.bfloat16, tokens).footprint.peak


def _plan_pictures(preset: str, batch_size: int) -> int:
    return plan_reconstruction(load_models(preset), batch_size, torch.bfloat16).footprint.peak


# --- the script


def write_photographs(folder: Path, num: int) -> None:
    """A tar of JPEG files with captions."""
    draws = np.random.default_rng(0)
    with TarShardWriter(folder, per_shard=num) as writer:
        for number in range(num):
            _, file = photograph(draws, SIDE)
            writer.write(f"{number:06d}", {"jpg": file, "txt": b"a caption"})


def main() -> None:
    """Measure what was asked for, print it, and write the report."""
    options = _options()
    spawning = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(2, mp_context=spawning) as planners,
    ):
        write_photographs(Path(folder), options.num)
        measure(Bench(options, Path(folder), planners), options)


def measure(bench: Bench, options: argparse.Namespace) -> None:
    """One line after the other; what does not fit into memory is told, and loses nothing."""
    uses: dict[str, Callable[[Use], Result]] = {
        "stage1": bench.train,
        "stage1-latents": bench.train,
        "stage2": bench.train,
        "captioning": bench.caption,
        "reconstruction": bench.reconstruct,
        "data": bench.read,
    }
    on_gpu = bench.device.type == "cuda"
    name = torch.cuda.get_device_name(bench.device) if on_gpu else "cpu"
    print(f"{options.preset} on {name}, bfloat16, {options.tokens} tokens per caption")
    print(f"{'use':<16}{'batch':>6}{'images/s':>10}{'s':>9}{'GB':>8}{'predicted':>11}{'MFU':>8}")
    results = []
    peaks = {"peak_flops": bench.peak, "product_flops": bench.product()}
    for use in options.uses:
        try:
            result = uses[use.name](use)
        except torch.OutOfMemoryError:
            print(
                f"{use.name:<16}{use.batch_size:>6}  does not fit into this device's memory",
                flush=True,
            )
            continue
        results.append(asdict(result))
        print(_line(result), flush=True)
        _write(options, name, peaks, results)


def _line(result: Result) -> str:
    held, predicted = (
        "-" if count is None else f"{count / 1e9:.2f}"
        for count in (result.peak_bytes, result.predicted_bytes)
    )
    mfu = "-" if result.mfu is None else f"{100 * result.mfu:.1f} %"
    line = (
        f"{result.use:<16}{result.batch_size:>6}{result.images_per_second:>10.2f}{result.seconds:>9.3f}"
        f"{held:>8}{predicted:>11}{mfu:>8}"
    )
    if result.parts is None:
        return line
    shares = sorted(result.parts.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{part} {seconds / result.seconds:.1%}" for part, seconds in shares)
    return "\n    ".join([line, *result.settings, parts])


def _write(
    options: argparse.Namespace,
    name: str,
    peaks: dict[str, float | None],
    results: list[dict[str, Any]],
) -> None:
    """The report so far."""
    file = options.json
    if file is None:
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"full_size-{Path(options.preset).stem}-{name.replace(' ', '_')}.json"
    settings = {key: value for key, value in vars(options).items() if key not in {"json", "uses"}}
    head = {"device": name, **peaks, "settings": settings, "versions": versions()}
    report = json.dumps({**head, "results": results}, indent=1)
    file.write_text(f"{report}\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--preset", default="paper", help="models, or a YAML file that names them")
    parser.add_argument(
        "--uses",
        nargs="+",
        default=list(BATCHES),
        help="each with a batch size, as stage1:128, or with several; and settings of training, as stage1:128+loop.compile=auto, or compiled, as captioning:16+compile",
    )
    parser.add_argument("--input-size", type=int, help="that Florence-2 sees, in pixels")
    parser.add_argument("--tokens", type=int, default=227, help="of a caption; the paper's mean")
    parser.add_argument("--sampler-steps", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="of training, after three to warm up")
    parser.add_argument("--repeats", type=int, default=3, help="of captioning and reconstruction")
    parser.add_argument("--num", type=int, default=512, help="photographs")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="that decode")
    parser.add_argument("--no-predictions", action="store_true", help="of memory, which take time")
    parser.add_argument("--peak-tflops", type=float, help="of the device in bfloat16; MFU needs it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.uses = [use for text in options.uses for use in _uses(text, parser)]
    return options


def _uses(text: str, parser: argparse.ArgumentParser) -> list[Use]:
    """A use with each of its batch sizes."""
    what, *settings = text.split("+")
    name, _, size = what.partition(":")
    if name not in BATCHES or not (size.isdigit() or not size):
        parser.error(f"{text} is none of {', '.join(BATCHES)}, alone or with :IMAGES")
    sizes = [int(size)] if size else BATCHES[name]
    return [Use(name, count, tuple(settings)) for count in sizes]


if __name__ == "__main__":
    main()
