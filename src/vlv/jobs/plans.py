"""What a run or a preset needs, before it starts: parts, memory, hours, cost, downloads. No weights are read.

Shapes: B batch, Q queries, D text width, E language-model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlv.config import ModelPreset, PartSource, RunConfig, load_config
from vlv.data.loader import Listed
from vlv.errors import ModelFolderError
from vlv.models.architectures import find_architecture, outline
from vlv.models.arguments import present
from vlv.models.captioner import CaptionDecoder
from vlv.models.card import origin_of
from vlv.models.context import Context
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.encoder import VLVEncoder
from vlv.models.folder import part_dtype
from vlv.models.lora import low_rank_parameters
from vlv.models.vetting import num_parameters
from vlv.training.assemble import Parts, make_objective, set_precision
from vlv.training.feeding import find_data
from vlv.training.journal import read_metrics
from vlv.training.prediction import (
    Footprint,
    FullLength,
    fake_mode,
    flops_per_image,
    make_fake,
    pack_outline,
    peak_flops,
    predict_inference,
    predict_step,
    training_batch,
)
from vlv.training.stage3 import Stage

ASSUMED_MFU = 0.3
"""Share of the device's peak that an estimate of hours assumes where nothing was measured."""
STAGES = {f"stage {n}": f"paper-stage{n}" for n in (1, 2, 3)}
CAPTION_BATCH, CAPTION_TOKENS, IMAGE_BATCH = 8, 300, 4  # the defaults of the commands


@dataclass(frozen=True)
class PlannedPart:
    """One part of a run or a preset."""

    name: str
    source: str
    num_parameters: int
    num_trained: int = 0
    num_adapters: int = 0
    """Of those that train, the weights of adapters, which are none of the part's own."""
    download: int = 0
    """Bytes of its weights on the hub; 0 for a folder on this machine."""
    licence: str = ""


@dataclass(frozen=True)
class Use:
    """What one use of the models needs."""

    name: str
    batch_size: int
    precision: str
    footprint: Footprint


# --- a preset ---------------------------------------------------------------------------------------


def describe_preset(preset: ModelPreset) -> list[PlannedPart]:
    """The parts of a preset, with what is to be downloaded of each."""
    encoder, decoder, reader = _fresh(preset)
    modules = {"florence": encoder.backbone, "decoder": decoder, "llm": reader.llm}
    parts = []
    for name, module in modules.items():
        source: PartSource = getattr(preset.model, name)
        known, count = find_architecture(source, name), num_parameters(module)
        download = count * known.stored.itemsize if known.stored is not None else 0
        where = f"{source.path}@{source.revision}" if source.revision else source.path
        licence = known.licence or origin_of(source.path, name, revision=source.revision).licence
        licence = licence or "licence unknown"
        parts.append(PlannedPart(name, where, count, download=download, licence=licence))
    fresh = num_parameters(encoder) - num_parameters(encoder.backbone)
    fresh += num_parameters(reader.mlp)
    return [*parts, PlannedPart("queries, projectors", "fresh", fresh)]


def plan_uses(preset: ModelPreset, *, batch_size: int | None = None) -> Iterator[Use]:
    """Predicted memory of captioning, reconstruction and the stages, one after the other: each takes seconds.

    Args:
        preset: The models.
        batch_size: Images together; None takes the defaults of the commands and of the paper's runs.
    """
    yield plan_captioning(preset, batch_size or CAPTION_BATCH, torch.bfloat16)
    yield plan_reconstruction(preset, batch_size or IMAGE_BATCH, torch.bfloat16)
    for name, run in STAGES.items():
        changes = [f"loop.batch_size={batch_size}", "loop.global_batch_size=null"]
        changes = [] if batch_size is None else [*changes, "loop.accumulate=2"]
        yield plan_training(preset, name, load_config(run, changes))


def plan_captioning(
    preset: ModelPreset, batch_size: int, dtype: torch.dtype, tokens: int = CAPTION_TOKENS
) -> Use:
    """Memory of `vlv caption`: encoder, text tower and caption decoder."""
    encoder, decoder, reader = _fresh(preset)

    def work(pixels: Tensor) -> None:
        write_caption(reader, decoder.context(encoder(pixels)).sequence, tokens)

    parts = nn.ModuleList([encoder, decoder.text_encoder, reader])
    with fake_mode():
        make_fake(parts, lambda _: dtype)
        pixels = _pixels(batch_size, preset.data.image_size).float()
        footprint = predict_inference(parts, pixels, work)
    return Use("captioning", batch_size, _short(dtype), footprint)


def write_caption(reader: CaptionDecoder, c: Tensor, tokens: int) -> None:
    """The two highest moments of captioning: reading the prefix, and writing the last of ``tokens`` tokens."""
    e = reader.prefix(c)  # (B, Q, E)
    length = e.shape[1] + tokens - 1
    cache = reader.llm(inputs_embeds=e, use_cache=True, logits_to_keep=1).past_key_values
    for layer in cache.layers:  # what the tokens but the last leave behind
        shape = (*layer.keys.shape[:2], length, layer.keys.shape[3])
        layer.keys, layer.values = layer.keys.new_empty(shape), layer.values.new_empty(shape)
    last = e[:, :1]  # stands for the embedding of the token before
    reader.llm(inputs_embeds=last, past_key_values=cache, use_cache=True)


def plan_reconstruction(preset: ModelPreset, batch_size: int, dtype: torch.dtype) -> Use:
    """Memory of `vlv reconstruct`: encoder and diffusion decoder."""
    encoder, decoder, _ = _fresh(preset)

    def work(pixels: Tensor) -> None:
        reconstruct(decoder, decoder.context(encoder(pixels)), pixels.shape[-1])

    parts = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    with fake_mode():
        make_fake(parts, lambda name: part_dtype("vae" if ".vae." in name else "", dtype))
        pixels = _pixels(batch_size, preset.data.image_size).float()
        footprint = predict_inference(parts, pixels, work)
    return Use("reconstruction", batch_size, _short(dtype), footprint)


def reconstruct(decoder: DiffusionDecoder, c: Context, side: int) -> None:
    """The two highest moments of reconstruction: a pass of the U-Net, and the VAE's decoder."""
    unet = present(decoder.unet, "unet")
    size = side // decoder.downscale_factor
    latents = torch.zeros(len(c), int(unet.config["in_channels"]), size, size)
    decoder.denoising_loss(latents, c, torch.Generator())
    decoder.decode(latents)


def plan_training(preset: ModelPreset, name: str, config: RunConfig) -> Use:
    """Memory of a run's step with the parts of a preset."""
    encoder, decoder, reader = _fresh(preset)
    parts = Parts(encoder, decoder, None if config.stage == "stage1" else reader)
    footprint = plan_step(parts, config, preset.data.image_size)
    return Use(name, config.loop.batch_size, config.loop.precision, footprint)


def plan_step(parts: Parts, config: RunConfig, image_size: int, *, num_ranks: int = 1) -> Footprint:
    """Memory of a run's step in one of its processes; every caption is as long as it may be.

    Args:
        parts: On the meta device; they are changed.
        config: The run.
        image_size: Side of the images in pixels.
        num_ranks: Processes that train together.
    """
    loop = config.loop
    objective = outlined_objective(config, parts)
    with fake_mode():
        make_fake(objective.module)
        set_precision(config, parts, objective)
        batch = training_batch(_pixels(loop.batch_size, image_size))
        return predict_step(objective, batch, loop, config.optim, num_ranks=num_ranks)


def outlined_objective(config: RunConfig, parts: Parts) -> Stage:
    """A run's objective with as much of the parts as it needs."""
    if config.stage2 is not None and not config.stage2.denoising_weight:
        parts.decoder.unet = parts.decoder.vae = None
    reader: Any = parts.caption_decoder
    if reader is not None:
        reader.tokenizer = FullLength(
            getattr(config.stage2 or config.stage3, "max_caption_tokens", None)
        )
        if config.lora is not None and config.lora.bits:
            bf16 = config.loop.precision == "bf16"
            pack_outline(reader.llm, torch.bfloat16 if bf16 else torch.float32)
    return make_objective(config, parts)


def _fresh(preset: ModelPreset) -> tuple[VLVEncoder, DiffusionDecoder, CaptionDecoder]:
    encoder, decoder, reader = outline(preset.model, preset.data.image_size)
    assert reader is not None, "checked by ModelPreset"
    return encoder, decoder, reader


def _pixels(batch_size: int, size: int) -> Tensor:
    return torch.zeros(batch_size, 3, size, size, dtype=torch.uint8)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")


# --- a run ------------------------------------------------------------------------------------------


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
    """Memory of one process."""
    images_per_second: float | None = None
    """All processes together."""
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
        """Wall time of the whole run."""
        return self.images / self.images_per_second / 3600 if self.images_per_second else None

    @property
    def cost_usd(self) -> float | None:
        """Price of all devices for the whole run."""
        price = self.config.loop.usd_per_gpu_hour
        if price is None or self.hours is None:
            return None
        return self.hours * self.num_processes * price

    def lines(self, run_dir: Path) -> Iterator[str]:
        """The plan in words."""
        config, loop = self.config, self.config.loop
        done = f", going on after step {self.steps_done:,}" if self.steps_done else ""
        yield f"{config.stage} in {run_dir}{done}"
        for part in self.parts:
            trained = (
                f"{part.num_trained / 1e6:9.2f} M trained" if part.num_trained else "   frozen"
            )
            yield f"  {part.name:<16} {part.num_parameters / 1e6:9.2f} M {trained:<20}  {part.source}"
        yield from self._adapter_lines()
        if self.unknown:
            yield f"  parts: {self.unknown}"
        passes = loop.passes_per_step(self.num_processes)
        yield (
            f"  {loop.steps:,} steps of {loop.images_per_step(self.num_processes):,} images: {loop.batch_size} "
            f"in a pass x {passes} passes x {self.num_processes} processes; {loop.precision}"
        )
        known = f"{self.epochs:.3g} epochs of {self.num_records:,} records" if self.epochs else ""
        yield f"  {self.images:,} images, {known or 'streamed'}"
        if (found := self.footprint) is not None:
            yield (
                f"  memory of each process: {found.peak / 1e9:.2f} GB, predicted from shapes "
                f"(weights {found.weights / 1e9:.2f}, gradients {found.gradients / 1e9:.2f}, "
                f"optimizer {found.optimizer / 1e9:.2f}, activations {found.activations / 1e9:.2f})"
            )
        yield self._time_line()

    def _adapter_lines(self) -> Iterator[str]:
        changed = [part for part in self.parts if part.num_adapters]
        if changed:
            adapters, whole = (
                sum(part.num_adapters for part in changed),
                sum(part.num_parameters for part in changed),
            )
            size = 4 * sum(part.num_trained for part in self.parts)  # saved in float32
            yield (
                f"  adapters: {adapters / 1e6:.2f} M weights, {adapters / whole:.2%} of the parts that they change; "
                f"RUN_DIR/adapter takes {size / 1e6:.1f} MB"
            )

    def _time_line(self) -> str:
        if self.hours is None or self.images_per_second is None:
            return "  hours: not known before the run has begun; with loop.peak_tflops they are estimated"
        line = f"  about {self.hours:,.1f} hours at {self.images_per_second:,.1f} images/s {self.basis}"
        if self.num_processes > 1:
            line += f"; {self.hours * self.num_processes:,.1f} GPU hours"
        if self.cost_usd is not None:
            line += f"; about {self.cost_usd:,.2f} USD"
        return line


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
    speed = lines[-1]["images_per_second"] if lines else None
    basis = "as its last log line says" if lines else ""
    found = find_data(config.data)
    num_records = len(found.records) if isinstance(found, Listed) else None
    known = config, num_processes, num_records, steps_done
    side = config.data.image_size
    try:
        parts = Parts(*outline(config.model, side))
        described = describe_parts(config, parts)
        estimate = None if speed else estimate_rate(config, parts)
        if estimate:
            speed, basis = num_processes * estimate, f"at {ASSUMED_MFU:.0%} of the GPU's peak"
        parts = Parts(*outline(config.model, side))
        footprint = plan_step(parts, config, side, num_ranks=num_processes)
    except ModelFolderError as error:
        return RunPlan(*known, unknown=str(error), images_per_second=speed, basis=basis)
    return RunPlan(*known, described, "", footprint, speed, basis)


def describe_parts(config: RunConfig, parts: Parts) -> tuple[PlannedPart, ...]:
    """Sizes of the parts, and how much of each will train."""
    model = config.model
    sources = {
        "encoder": model.encoder or model.florence or model.backbone,
        "decoder": model.decoder,
        "caption_decoder": model.caption_decoder or model.llm,
    }
    reader = parts.caption_decoder
    unpacked = 0 if reader is None else num_parameters(reader)  # to be in 4 bits, perhaps
    outlined_objective(config, parts)
    found = []
    for name, source in sources.items():
        module = getattr(parts, name)
        if module is not None and source is not None:
            trained = sum(p.numel() for p in set(module.parameters()) if p.requires_grad)
            adapters = sum(p.numel() for p in low_rank_parameters(module).values())
            own = unpacked if module is reader else num_parameters(module) - adapters
            found.append(PlannedPart(name, source.path, own, trained, adapters))
    return tuple(found)


def estimate_rate(config: RunConfig, parts: Parts) -> float | None:
    """Images per second of one device at `ASSUMED_MFU` of its peak in the run's precision; None where no peak is known."""
    device, loop = torch.device("cuda" if torch.cuda.is_available() else "cpu"), config.loop
    peak = peak_flops(device, loop.peak_tflops, precision=loop.precision, tf32=loop.tf32)
    if peak is None:
        return None
    batch = training_batch(_pixels(1, config.data.image_size)) | {"step": loop.steps - 1}
    return ASSUMED_MFU * peak / flops_per_image(outlined_objective(config, parts), batch)
