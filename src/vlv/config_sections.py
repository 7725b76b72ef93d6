"""The sections of a run's settings: each knob belongs to the object that it steers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vlv.errors import ConfigError

FREE_ON_RESUME = "may change on resume"
"""Mark of a setting that may change when a run goes on, as it touches nothing of what is learnt."""
MAY_BE_EMPTY = "may be an empty text"
"""Mark of a setting to which an empty text means something."""
LARGEST = 10**9
"""Of the numbers of all settings that name no limit of their own."""


class Settings(BaseModel):
    """Base of all settings: frozen, and no key that is not declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _is_sane(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse numbers that would hang a job or fill the memory, truth as a number, and empty texts."""
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, dict) and get_origin(field.annotation) is not dict:
            return value  # settings, which look after themselves
        is_limited = any(hasattr(mark, "le") for mark in field.metadata)
        for inner in _values_in(value):
            if isinstance(inner, bool):
                if not _allows_bool(field.annotation):
                    raise ValueError(f"{str(inner).lower()} is no value of this setting")
            elif isinstance(inner, int | float):
                if not math.isfinite(inner) or (abs(inner) > LARGEST and not is_limited):
                    raise ValueError(f"{inner} is not between -{LARGEST} and {LARGEST}")
            elif inner == "" and MAY_BE_EMPTY not in field.metadata:
                raise ValueError("the text is empty; leave it out, or set it to null")
        return value

    def contradictions(self) -> Iterator[str]:
        """What is wrong with settings that are right one by one."""
        yield from ()

    @model_validator(mode="after")
    def _contradicts_nothing(self) -> Self:
        for message in self.contradictions():
            raise ValueError(message)
        return self


def _values_in(value: Any) -> Iterator[Any]:
    """The numbers and texts in a value, as YAML gives it."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _values_in(inner)
    else:
        yield value


def _allows_bool(annotation: Any) -> bool:
    return annotation is bool or any(_allows_bool(inner) for inner in get_args(annotation))


_Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Settings):
    """AdamW, and the learning rate as a function of the step alone."""

    lr: PositiveFloat
    """Learning rate at the end of the warm-up."""
    betas: tuple[_Decay, _Decay] = (0.9, 0.99)
    """Decay of the first and second moment (paper, section 4.1)."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from near zero."""
    schedule: Literal["cosine", "linear", "constant", "cosine_wave"] = "cosine"
    """What happens after the warm-up; cosine_wave rises again after decay_steps, as in the authors' stage 1."""
    decay_steps: PositiveInt | None = None
    """Step at which the decay is done, and the learning rate stays as it is; null is the end of the run."""
    end_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the learning rate that the decay ends at."""
    clip: PositiveFloat | None = 1.0
    """Largest norm of the whole gradient; null for no clipping."""
    lr_scale: dict[str, PositiveFloat] = {}
    """Factor on the learning rate by parameter name prefix, such as {queries: 10}; the longest prefix counts."""

    def contradictions(self) -> Iterator[str]:
        """A decay without effect, without a period, or before the end of the warm-up."""
        if self.schedule == "constant" and (self.decay_steps is not None or self.end_share):
            yield "decay_steps and end_share have no effect with schedule constant; remove them"
        if self.schedule == "cosine_wave" and self.decay_steps is None:
            yield "schedule cosine_wave needs decay_steps, half of its period; set it"
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            yield f"decay_steps is {self.decay_steps}, but the warm-up takes {self.warmup_steps} steps; raise it"


_Side = Annotated[int, Field(gt=0, le=16_384)]
CompiledPart = Literal["vision_tower", "language", "text_encoder", "unet", "vae", "llm"]


class LoopConfig(Settings):
    """How long to train, in what portions, and when to look, log and save."""

    steps: PositiveInt
    """Optimiser steps of the whole run."""
    batch_size: int = Field(gt=0, le=65_536)
    """Images of one forward pass."""
    accumulate: Annotated[int, Field(gt=0, le=10**6)] = 1
    """Forward passes per optimiser step; a step sees batch_size x accumulate images of each process."""
    global_batch_size: PositiveInt | None = None
    """Images of one optimiser step, in place of accumulate, which then follows from batch_size and the processes."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward and backward pass; the weights and the optimiser are always float32."""
    vae_precision: Literal["fp32", "bf16"] = "fp32"
    """What the VAE is held in and computes in; bf16 is faster, and its latents carry the rounding of it."""
    recompute: Literal["auto", "never", "unet", "all"] = "auto"
    """Parts whose activations are computed again in the backward pass; auto takes the fewest that fit the GPU's memory."""
    channels_last: Literal["auto"] | bool = "auto"
    """Memory layout of U-Net and VAE; auto is on a GPU only, as a CPU gains nothing from it."""
    compile: Literal["none", "auto"] | list[CompiledPart] = "none"
    """Parts that torch.compile compiles first, which takes minutes; auto is all but the text tower, and on a GPU only."""
    tf32: bool = True
    """Let a GPU round the factors of float32 products to 10 bits, which the VAE and fp32 runs gain from."""
    parallel: Annotated[Literal["ddp", "fsdp"] | None, FREE_ON_RESUME] = None
    """Of several processes: ddp holds all in each, fsdp shards what trains; null is as accelerate says, or ddp."""
    train_mode: Literal["trained", "all"] = "trained"
    """Parts with dropout and drop-path: those that train, or all, the frozen vision tower too (the authors' code)."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seed of every random draw of the loop."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of the moving average of the weights, such as 0.999; null keeps none."""
    max_bad_steps: PositiveInt = 10
    """Steps in a row with a loss or gradient that is not finite before the run stops; each is skipped."""
    log_every: Annotated[PositiveInt, FREE_ON_RESUME] = 20
    """Steps between two lines of metrics.jsonl."""
    eval_every: Annotated[PositiveInt | None, FREE_ON_RESUME] = 500
    """Steps between two evaluations; null evaluates at the end only."""
    sample_every: Annotated[PositiveInt | None, FREE_ON_RESUME] = 1000
    """Steps between two sheets of samples; null draws them at the end only."""
    save_every: Annotated[PositiveInt | None, FREE_ON_RESUME] = 1000
    """Steps between two checkpoints; null leaves it to save_every_seconds."""
    save_every_seconds: Annotated[PositiveFloat | None, FREE_ON_RESUME] = 120.0
    """Seconds after which a checkpoint is written in any case; null leaves it to save_every."""
    keep_last: Annotated[PositiveInt, FREE_ON_RESUME] = 2
    """Checkpoints that are kept."""
    keep_best: Annotated[str | None, FREE_ON_RESUME] = None
    """Held-out figure, such as held_out_loss, whose best checkpoint is kept beside the last ones; null keeps none."""
    best_is: Annotated[Literal["lowest", "highest"], FREE_ON_RESUME] = "lowest"
    """Which value of keep_best is the best."""
    max_failed_saves: Annotated[PositiveInt, FREE_ON_RESUME] = 3
    """Checkpoints in a row that may fail, on a full disk say, before the run stops; the one before stays."""
    trackers: Annotated[list[Literal["tensorboard", "wandb", "trackio"]] | None, FREE_ON_RESUME] = (
        None
    )
    """Where figures and samples go too; null is TensorBoard where it is installed, [] is nowhere."""
    peak_tflops: Annotated[PositiveFloat | None, FREE_ON_RESUME] = None
    """TFLOP/s of the device at best in the run's precision, for the MFU; null looks the GPU's name up, and knows no CPU's."""
    usd_per_gpu_hour: Annotated[PositiveFloat | None, FREE_ON_RESUME] = None
    """Price of one GPU for an hour, for the cost in the log and the summary; null counts no cost."""

    def contradictions(self) -> Iterator[str]:
        """Settings without effect, and a run without checkpoints."""
        if self.best_is != "lowest" and self.keep_best is None:
            yield "best_is has no effect while keep_best is null; set keep_best"
        if self.global_batch_size is not None and self.accumulate != 1:
            yield "accumulate has no effect beside global_batch_size; remove one of them"
        if self.save_every is None and self.save_every_seconds is None:
            yield "save_every and save_every_seconds are both null; set one of them"

    def passes_per_step(self, num_processes: int = 1) -> int:
        """Forward passes of each process for one optimiser step.

        Raises:
            ConfigError: The global batch cannot be divided among the processes.
        """
        if self.global_batch_size is None:
            return self.accumulate
        passes, rest = divmod(self.global_batch_size, self.batch_size * num_processes)
        if rest or not passes:
            raise ConfigError(
                f"loop.global_batch_size is {self.global_batch_size}, which is no multiple of loop.batch_size "
                f"{self.batch_size} x {num_processes} processes; choose a batch_size that divides "
                f"{self.global_batch_size / num_processes:g}"
            )
        return passes

    def images_per_step(self, num_processes: int = 1) -> int:
        """Images that one optimiser step sees in all processes together."""
        return self.batch_size * num_processes * self.passes_per_step(num_processes)


class PartSource(Settings):
    """Where a component comes from; a plain string is its path."""

    path: str
    """Folder, or id on the hub."""
    subfolder: str | None = None
    """Folder within it."""
    revision: str | None = None
    """Commit, branch or tag on the hub."""
    variant: str | None = None
    """File variant of the weights, such as fp16 for model.fp16.safetensors; null takes the plain files."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class ModelSources(Settings):
    """The frozen diffusion decoder, and for stage 2 where the caption decoder comes from."""

    decoder: PartSource
    """The frozen diffusion decoder: a model folder in the diffusers layout."""
    llm: PartSource | None = None
    """Stage 2: the language model that becomes the caption decoder: a folder, or a GGUF file, which is converted once."""
    caption_decoder: PartSource | None = None
    """Stage 2: a model folder or a caption decoder that learns on, instead of llm with a fresh projector."""

    @model_validator(mode="before")
    @classmethod
    def _null_takes_away(cls, values: Any) -> Any:
        """Forget what a file takes away from its base."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}

    def contradictions(self) -> Iterator[str]:
        """Two origins of the caption decoder."""
        if self.llm is not None and self.caption_decoder is not None:
            yield "llm has no effect beside model.caption_decoder; remove one of them"


class FreshEncoder(ModelSources):
    """What is fresh in an encoder that was never trained, whatever its backbone."""

    num_queries: Annotated[int, Field(gt=0, le=4096)] | None = None
    """Of a fresh encoder: length Q of the caption embedding; null takes every position of the text tower."""
    input_size: _Side | None = None
    """Of a fresh encoder: side in pixels that it sees; null is data.image_size, or what the backbone was trained on."""
    bottleneck: Literal["continuous", "nearest", "gumbel"] | None = None
    """Of a fresh encoder: z as it is (null, the paper), or each token the nearest of the text tower's, or Gumbel-softmax."""
    gumbel_temperature: tuple[PositiveFloat, PositiveFloat] | None = None
    """Of bottleneck gumbel: temperature at the first and the last step of gumbel_steps; null is 1 and 0.1."""
    gumbel_steps: PositiveInt | None = None
    """Of bottleneck gumbel: steps over which the temperature falls; null is the whole run."""

    encoder: ClassVar[None] = None

    def contradictions(self) -> Iterator[str]:
        """A temperature without Gumbel-softmax."""
        yield from super().contradictions()
        for key in ("gumbel_temperature", "gumbel_steps"):
            if getattr(self, key) is not None and self.bottleneck != "gumbel":
                yield f"{key} has no effect unless model.bottleneck is gumbel; remove it or set that"


class FlorenceEncoder(FreshEncoder):
    """The encoder is made of Florence-2: stage 1, or stage 2 without a stage 1 (paper, Table 7)."""

    florence: PartSource
    """The Florence-2 that becomes the encoder."""
    prompt: Annotated[str | None, MAY_BE_EMPTY] = None
    """Of florence: what it is asked beside each image; null is the paper's prompt for a long caption."""

    backbone: ClassVar[None] = None
    backbone_layers: ClassVar[None] = None


class BackboneEncoder(FreshEncoder):
    """The encoder is made of any vision backbone."""

    backbone: PartSource
    """Instead of florence: any vision backbone of transformers, such as SigLIP 2, DINOv2, DINOv3 or CLIP."""
    backbone_layers: Annotated[int, Field(gt=0, le=1000)] | None = None
    """Of backbone: layers of the small transformer through which the queries read its tokens; null is 6."""

    florence: ClassVar[None] = None
    prompt: ClassVar[None] = None


class TrainedEncoder(ModelSources):
    """The encoder was trained before, and learns on."""

    encoder: PartSource
    """A model folder or a VLV encoder: that of stage 1 for stage 2, or one that learns on in the same stage."""

    florence: ClassVar[None] = None
    backbone: ClassVar[None] = None
    backbone_layers: ClassVar[None] = None
    num_queries: ClassVar[None] = None
    input_size: ClassVar[None] = None
    prompt: ClassVar[None] = None
    bottleneck: ClassVar[None] = None


ENCODERS: dict[str, type[ModelSources]] = {
    "encoder": TrainedEncoder,
    "backbone": BackboneEncoder,
    "florence": FlorenceEncoder,
}
"""The kinds of encoder by the setting that names their source; the first one that is set counts."""


def _encoder_of(value: Any) -> str | None:
    """The tag of an encoder's source: the end of the sentence about a setting that it does not have."""
    for name, kind in ENCODERS.items():
        if isinstance(value, kind) or (isinstance(value, dict) and value.get(name) is not None):
            return f"beside model.{name}"
    return None


ModelConfig = FlorenceEncoder | BackboneEncoder | TrainedEncoder
"""What a run starts from."""

AnyModel = Annotated[
    Annotated[FlorenceEncoder, Tag("beside model.florence")]
    | Annotated[BackboneEncoder, Tag("beside model.backbone")]
    | Annotated[TrainedEncoder, Tag("beside model.encoder")],
    Discriminator(
        _encoder_of,
        custom_error_type="no_source",
        custom_error_message="model.florence, model.backbone and model.encoder are all missing; set one of them",
    ),
]


class DataConfig(Settings):
    """The images, and for stage 2 their captions."""

    inputs: Annotated[list[str], FREE_ON_RESUME] = Field(min_length=1)
    """Files, folders, globs, tar shards, JSONL, Parquet, URLs, commands, @lists, Hugging Face datasets (docs/data.md)."""
    held_out: Annotated[list[str], FREE_ON_RESUME] = []
    """Inputs of the same kinds, never trained on, for the figures during training."""
    image_size: _Side
    """Side in pixels of the square that is cut from each image."""
    framing: Literal["cut", "resize"] | None = None
    """Cut the square out, then resize it; or resize first, as the VLV authors do. Null is as model.encoder, else cut."""
    streaming: bool | Literal["auto"] = "auto"
    """Read shards one after the other without listing them; auto does where an input is remote or very large."""
    shuffle_buffer: Annotated[int, Field(gt=0, le=10**7)] | None = None
    """Of a stream: records that are read and shuffled together, by each partition; null is 1000."""
    partitions: Annotated[int, Field(gt=0, le=10**6)] | None = None
    """Of a stream: parts that are read independently, a multiple of every number of processes to resume with; null is one for each."""
    image_column: str | None = None
    """What the image is called in tables; null tries the usual names."""
    caption_column: str | None = None
    """What the caption is called in tables, or its suffix or metadata field in tars; null tries the usual names."""
    image_root: str | None = None
    """Folder below which the images of a table may lie, beside the table's own; null is none."""
    hash_column: str | None = None
    """Field with the SHA-256 of the image file, which is then checked at every read; null checks nothing."""
    num_workers: Annotated[int, FREE_ON_RESUME] = Field(2, ge=0, le=1024)
    """Threads that decode images; 0 decodes in the training thread when a batch is asked for."""
    prefetch: Annotated[int, FREE_ON_RESUME, Field(gt=0, le=1024)] = 3
    """Batches that the threads may be ahead; nothing is ahead without threads."""
    read_timeout_seconds: Annotated[PositiveFloat | None, FREE_ON_RESUME] = 300.0
    """A record that takes longer to read is a bad one; null waits for ever."""
    max_bad_share: Annotated[float, FREE_ON_RESUME] = Field(0.001, ge=0, le=1)
    """Share of unreadable images at which the run stops; each is skipped and named in quarantine.jsonl."""
    latents: str | None = None
    """Folder of cached VAE posteriors (vlv data cache-latents), or beside (the shards); null computes them in every step."""
    features: str | None = None
    """Folder of cached tokens of the frozen vision tower (vlv data cache-features), or beside; null computes them in every step."""

    def contradictions(self) -> Iterator[str]:
        """Settings of a stream for data that are listed."""
        for name in ("shuffle_buffer", "partitions"):
            if getattr(self, name) is not None and self.streaming is False:
                yield f"data.{name} has no effect while data.streaming is false; remove it"
