"""What a training run would do, before it does: parts, batches, epochs, memory, hours and cost. No weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlv.data.loader import Listed
from vlv.errors import ModelFolderError
from vlv.jobs.memory_plan import outlined_objective, plan_step
from vlv.models.architectures import (
    num_parameters,
    outline_caption_decoder,
    outline_decoder,
    outline_encoder,
)
from vlv.models.captioner import CaptionDecoder, CaptionDecoderConfig
from vlv.models.encoder import VLVEncoder, VLVEncoderConfig
from vlv.models.folder import shipped_models
from vlv.training.assemble import Parts
from vlv.training.feeding import find_data
from vlv.training.flops import flops_per_image, peak_flops
from vlv.training.journal import read_metrics
from vlv.training.memory import training_batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlv.config import PartSource, RunConfig
    from vlv.training.memory import Footprint

ASSUMED_MFU = 0.3
"""Share of the device's peak that an estimate of hours assumes where nothing was measured."""


@dataclass(frozen=True)
class PlannedPart:
    """One part of a run."""

    name: str
    source: str
    num_parameters: int
    num_trained: int


@dataclass(frozen=True)
class RunPlan:
    """A run before it begins, or goes on."""

    config: RunConfig
    num_processes: int
    num_records: int | None
    """Records that the inputs hold; None where they are streamed and not counted."""
    steps_done: int
    """Steps that the run folder has already."""
    parts: tuple[PlannedPart, ...] = ()
    """Empty where their sizes cannot be known."""
    unknown: str = ""
    """Why not."""
    footprint: Footprint | None = None
    """Of one process."""
    images_per_second: float | None = None
    """Of all processes together."""
    basis: str = ""
    """Where that number comes from."""

    @property
    def images(self) -> int:
        """Images of the whole run."""
        return self.config.loop.steps * self.config.loop.images_per_step(self.num_processes)

    @property
    def epochs(self) -> float | None:
        """Passes over the data; None where their number of records is not known."""
        return self.images / self.num_records if self.num_records else None

    @property
    def hours(self) -> float | None:
        """Of the whole run, by the clock."""
        return self.images / self.images_per_second / 3600 if self.images_per_second else None

    @property
    def cost_usd(self) -> float | None:
        """Of all devices for the whole run."""
        price = self.config.loop.usd_per_gpu_hour
        if price is None or self.hours is None:
            return None
        return self.hours * self.num_processes * price


def plan_run(config: RunConfig, run_dir: Path, *, num_processes: int = 1) -> RunPlan:
    """Work out what `train` would do.

    Args:
        config: The run.
        run_dir: Its folder; what it has measured already counts more than an estimate.
        num_processes: GPUs that will train together.

    Raises:
        ConfigError: The global batch cannot be divided among the processes.
        DataError: The inputs are missing.
    """
    config.loop.passes_per_step(num_processes)
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"]
    steps_done = lines[-1]["step"] if lines else 0
    measured = lines[-1]["images_per_second"] if lines else None
    basis = "as its last log line says" if lines else ""
    found = find_data(config.data)
    num_records = len(found.records) if isinstance(found, Listed) else None
    known = config, num_processes, num_records, steps_done
    try:
        parts = outline_parts(config)
        described = describe_parts(config, parts)
        estimate = None if measured else estimate_rate(config, parts)
        if estimate:
            measured, basis = num_processes * estimate, f"at {ASSUMED_MFU:.0%} of the GPU's peak"
        size = config.data.image_size
        use = plan_step(outline_parts(config), config.stage, config, size, num_ranks=num_processes)
    except ModelFolderError as error:
        return RunPlan(*known, unknown=str(error), images_per_second=measured, basis=basis)
    return RunPlan(*known, described, "", use.footprint, measured, basis)


def outline_parts(config: RunConfig) -> Parts:
    """The parts of a run on the meta device.

    Raises:
        ModelFolderError: Their sizes are not known without loading them.
    """
    model = config.model
    decoder = outline_decoder(_local(model.decoder))
    if model.encoder is not None:
        config_of = VLVEncoderConfig.from_pretrained(_folder(model.encoder, "encoder"))
        with torch.device("meta"):
            encoder = VLVEncoder(config_of)
    elif model.florence is not None:
        side = model.input_size or config.data.image_size
        encoder = outline_encoder(_local(model.florence), decoder, model.num_queries, side)
    else:
        raise ModelFolderError("the sizes of a vision backbone are known only when it is loaded")
    caption_decoder = None
    if model.caption_decoder is not None:
        settings = CaptionDecoderConfig.from_pretrained(
            _folder(model.caption_decoder, "caption_decoder")
        )
        with torch.device("meta"):
            caption_decoder = CaptionDecoder(settings)
    elif model.llm is not None:
        caption_decoder = outline_caption_decoder(_local(model.llm), decoder)
    return Parts(encoder, decoder, caption_decoder)


def describe_parts(config: RunConfig, parts: Parts) -> tuple[PlannedPart, ...]:
    """Sizes of the parts, and how much of each will train."""
    outlined_objective(config, parts)
    model = config.model
    sources = {
        "encoder": model.encoder or model.florence or model.backbone,
        "decoder": model.decoder,
        "caption_decoder": model.caption_decoder or model.llm,
    }
    found = []
    for name, source in sources.items():
        module = getattr(parts, name)
        if module is None or source is None:
            continue
        trained = sum(p.numel() for p in set(module.parameters()) if p.requires_grad)
        found.append(PlannedPart(name, source.path, num_parameters(module), trained))
    return tuple(found)


def estimate_rate(config: RunConfig, parts: Parts) -> float | None:
    """Images per second of one device at `ASSUMED_MFU`; None where no peak is known."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_flops(device, config.loop.peak_tflops)
    if peak is None:
        return None
    size = config.data.image_size
    batch = training_batch(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    objective = outlined_objective(config, parts)
    return ASSUMED_MFU * peak / flops_per_image(objective, batch | {"step": config.loop.steps - 1})


def _local(source: PartSource) -> PartSource:
    """The source, with the folder of a shipped model in place of its name."""
    folder = shipped_models().get(source.path)
    return source if folder is None else source.model_copy(update={"path": str(folder)})


def _folder(source: PartSource, name: str) -> Path:
    """The folder of one component in a model folder, or the component's own."""
    folder = Path(_local(source).path).expanduser() / (source.subfolder or ".")
    folder = folder / name if (folder / name).is_dir() else folder
    if not (folder / "config.json").is_file():
        raise ModelFolderError(
            f"the sizes of {source.path} are not known: there is no folder with a config.json of that name yet"
        )
    return folder


def plan_lines(plan: RunPlan, run_dir: Path) -> Iterator[str]:
    """A plan in words, line by line."""
    config, loop = plan.config, plan.config.loop
    yield f"{config.stage} in {run_dir}" + (
        f", going on after step {plan.steps_done:,}" if plan.steps_done else ""
    )
    for part in plan.parts:
        trained = f"{part.num_trained / 1e6:9.2f} M trained" if part.num_trained else "   frozen"
        yield f"  {part.name:<16} {part.num_parameters / 1e6:9.2f} M {trained:<20}  {part.source}"
    if plan.unknown:
        yield f"  parts: {plan.unknown}"
    passes = loop.passes_per_step(plan.num_processes)
    yield (
        f"  {loop.steps:,} steps of {loop.images_per_step(plan.num_processes):,} images: "
        f"{loop.batch_size} in a pass x {passes} passes x {plan.num_processes} processes; {loop.precision}"
    )
    of_what = (
        f"{plan.epochs:.3g} epochs of {plan.num_records:,} records" if plan.epochs else "streamed"
    )
    yield f"  {plan.images:,} images, {of_what}"
    if plan.footprint is not None:
        yield (
            f"  memory of each process: {plan.footprint.peak / 1e9:.2f} GB, predicted from shapes "
            f"(weights {plan.footprint.weights / 1e9:.2f}, gradients {plan.footprint.gradients / 1e9:.2f}, "
            f"optimizer {plan.footprint.optimizer / 1e9:.2f}, activations {plan.footprint.activations / 1e9:.2f})"
        )
    yield _time_line(plan)


def _time_line(plan: RunPlan) -> str:
    if plan.hours is None or plan.images_per_second is None:
        return (
            "  hours: not known before the run has begun; with loop.peak_tflops they are estimated"
        )
    line = f"  about {plan.hours:,.1f} hours at {plan.images_per_second:,.1f} images/s {plan.basis}"
    if plan.num_processes > 1:
        line += f"; {plan.hours * plan.num_processes:,.1f} GPU hours"
    if plan.cost_usd is not None:
        line += f"; about {plan.cost_usd:,.2f} USD"
    return line
