"""The settings of a training run: typed, checked, frozen, and saved with every run.

Each knob belongs to the object that it steers. A preset (`presets/*.yaml`) is one complete configuration; on the
command line `--set optim.lr=1e-4` changes one value.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import to_jsonable_python

from vlv.config_files import MODELS, RUNS, names_in, read_values
from vlv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Settings(BaseModel):
    """Base of all settings: frozen, and no key that is not declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class OptimConfig(Settings):
    """AdamW, and the learning rate as a function of the step alone."""

    lr: PositiveFloat
    """Learning rate at the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the first and second moment (paper, section 4.1)."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from near zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What happens after the warm-up; cosine and linear end at zero."""
    clip: PositiveFloat | None = 1.0
    """Largest norm of the whole gradient; null for no clipping."""
    lr_scale: dict[str, PositiveFloat] = {}
    """Factor on the learning rate by parameter name prefix, such as {queries: 10}; the longest prefix counts."""


class LoopConfig(Settings):
    """How long to train, in what portions, and when to look, log and save."""

    steps: PositiveInt
    """Optimiser steps of the whole run."""
    batch_size: PositiveInt
    """Images of one forward pass."""
    accumulate: PositiveInt = 1
    """Forward passes per optimiser step; a step sees batch_size x accumulate images."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward and backward pass; the weights and the optimiser are always float32."""
    seed: int = Field(0, ge=0)
    """Seed of every random draw of the loop."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of the moving average of the weights, such as 0.999; null keeps none."""
    max_bad_steps: PositiveInt = 10
    """Steps in a row with a loss or gradient that is not finite before the run stops; each is skipped."""
    log_every: PositiveInt = 20
    """Steps between two lines of metrics.jsonl."""
    eval_every: PositiveInt | None = 500
    """Steps between two evaluations; null evaluates at the end only."""
    sample_every: PositiveInt | None = 1000
    """Steps between two sample pictures; null draws them at the end only."""
    save_every: PositiveInt | None = 1000
    """Steps between two checkpoints; null leaves it to save_every_seconds."""
    save_every_seconds: PositiveFloat | None = 120.0
    """Seconds after which a checkpoint is written in any case; null leaves it to save_every."""
    keep_last: PositiveInt = 2
    """Checkpoints that are kept."""
    tensorboard: bool = True
    """Also write TensorBoard events, where tensorboard is installed."""

    @model_validator(mode="after")
    def _some_checkpoints(self) -> LoopConfig:
        if self.save_every is None and self.save_every_seconds is None:
            raise ValueError("save_every and save_every_seconds are both null; set one of them")
        return self


FREE_ON_RESUME = frozenset(
    {
        "loop.log_every",
        "loop.eval_every",
        "loop.sample_every",
        "loop.save_every",
        "loop.save_every_seconds",
        "loop.keep_last",
        "loop.tensorboard",
        "data.inputs",  # the loader compares the records themselves
        "data.held_out",
        "data.num_workers",
        "data.max_bad_share",
    }
)
"""Settings that may change when a run goes on: none of them touches what is learnt."""


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


class ModelConfig(Settings):
    """What a run starts from."""

    decoder: PartSource
    """The frozen diffusion decoder: a model folder in the diffusers layout."""
    florence: PartSource | None = None
    """The Florence-2 that becomes the encoder: stage 1, or stage 2 without a stage 1 (paper, Table 7)."""
    backbone: PartSource | None = None
    """Instead of florence: any vision backbone of transformers, such as SigLIP 2, DINOv2, DINOv3 or CLIP."""
    backbone_layers: PositiveInt | None = None
    """Of backbone: layers of the small transformer through which the queries read its tokens; null is 6."""
    num_queries: PositiveInt | None = None
    """Of florence or backbone: length Q of the caption embedding; null takes every position of the text tower."""
    input_size: PositiveInt | None = None
    """Side in pixels that florence or backbone sees; null is data.image_size, or what the backbone was trained on."""
    prompt: str | None = None
    """Of florence: what it is asked beside each image; null is the paper's prompt for a long caption."""
    encoder: PartSource | None = None
    """A model folder or a VLV encoder: that of stage 1 for stage 2, or one that learns on in the same stage."""
    llm: PartSource | None = None
    """Stage 2: the language model that becomes the caption decoder."""
    caption_decoder: PartSource | None = None
    """Stage 2: a model folder or a caption decoder that learns on, instead of llm with a fresh projector."""


class DataConfig(Settings):
    """The images, and for stage 2 their captions."""

    inputs: list[str] = Field(min_length=1)
    """Files, folders, globs, tar shards, JSONL or Parquet."""
    held_out: list[str] = []
    """Inputs of the same kinds, never trained on, for the figures during training."""
    image_size: PositiveInt
    """Side in pixels of the square that is cut from each image."""
    num_workers: int = Field(2, ge=0)
    """Threads that decode images; 0 decodes in the training process."""
    max_bad_share: float = Field(0.001, ge=0, le=1)
    """Share of unreadable images at which the run stops; each is skipped and named in quarantine.jsonl."""
    latents: str | None = None
    """Folder for cached VAE posteriors; null computes them in every step."""


class Stage1Config(Settings):
    """Stage 1: images alone."""

    trainable: Literal["language", "all"] = "language"
    """Florence-2's language model, queries and projector (the paper), or the vision tower too."""
    draws_per_image: PositiveInt = 1
    """Draws of timestep and noise per encoded image; the paper's 1 spends a whole encoder pass on each."""
    timesteps: Literal["uniform", "text"] = "uniform"
    """Uniform (the paper), or more of the high noise, where the image has to come from the text."""
    warm_start_steps: int = Field(0, ge=0)
    """Our addition: steps that only move z to the text embeddings of the encoder's own caption; 0 is the paper."""
    warm_start_fade_steps: int = Field(0, ge=0)
    """Steps over which the denoising loss then takes over."""

    @model_validator(mode="after")
    def _fade_has_effect(self) -> Stage1Config:
        if self.warm_start_fade_steps and not self.warm_start_steps:
            raise ValueError(
                "warm_start_fade_steps has no effect while warm_start_steps is 0; set both or neither"
            )
        return self


class Stage2Config(Settings):
    """Stage 2: captions."""

    trainable: Literal["mlp", "mlp+llm", "mlp+llm+encoder"] = "mlp+llm+encoder"
    """What trains (paper, Table 4); the encoder without its vision tower."""
    frozen_encoder_steps: int = Field(0, ge=0)
    """Steps before the encoder joins in (the paper unfreezes progressively); they also do without denoising loss."""
    max_caption_tokens: PositiveInt | None = 300
    """Longest caption with its end token; a longer one is cut. Null cuts nothing."""
    denoising_weight: float = Field(0.0, ge=0)
    """Our addition: weight of stage 1's loss, which keeps z readable for the diffusion decoder; 0 is the paper."""
    draws_per_image: PositiveInt = 1
    """As in stage 1."""
    timesteps: Literal["uniform", "text"] = "uniform"
    """As in stage 1."""

    @model_validator(mode="after")
    def _encoder_joins_in(self) -> Stage2Config:
        if self.frozen_encoder_steps and self.trainable != "mlp+llm+encoder":
            raise ValueError(
                f"frozen_encoder_steps has no effect with trainable {self.trainable}; remove it or train the encoder"
            )
        return self

    @model_validator(mode="after")
    def _denoising_has_effect(self) -> Stage2Config:
        if self.denoising_weight and self.trainable != "mlp+llm+encoder":
            raise ValueError(
                f"denoising_weight is {self.denoising_weight}, but with trainable {self.trainable} the encoder is "
                "frozen and the loss moves nothing; set it to 0 or train the encoder"
            )
        if not self.denoising_weight and (self.draws_per_image, self.timesteps) != (1, "uniform"):
            raise ValueError(
                "draws_per_image and timesteps have no effect while denoising_weight is 0; remove them or set it"
            )
        return self


class RunConfig(Settings):
    """One training run."""

    stage: Literal["stage1", "stage2"]
    """Which of the two."""
    model: ModelConfig
    """What it starts from."""
    data: DataConfig
    """What it sees."""
    optim: OptimConfig
    """How it learns."""
    loop: LoopConfig
    """How long, and when to look."""
    stage1: Stage1Config | None = None
    """Settings of stage 1, and only of it."""
    stage2: Stage2Config | None = None
    """Settings of stage 2, and only of it."""

    @model_validator(mode="after")
    def _belongs_together(self) -> RunConfig:
        first = self.stage == "stage1"
        unused = ("stage2", "model.llm", "model.caption_decoder") if first else ("stage1",)
        if _get(self, self.stage) is None:
            raise ValueError(f"{self.stage} needs {self.stage}; set it")
        for key in unused:
            if _get(self, key) is not None:
                raise ValueError(f"{key} has no effect in {self.stage}; remove it")
        if self.model.backbone is None:
            self._needs_one("model.florence", "model.encoder")
        if not first:
            self._needs_one("model.llm", "model.caption_decoder")
        if self.model.llm is not None and self.model.caption_decoder is not None:
            raise ValueError(
                "model.llm has no effect beside model.caption_decoder; remove one of them"
            )
        if self.stage2 and self.data.latents and not self.stage2.denoising_weight:
            raise ValueError(
                "data.latents has no effect while stage2.denoising_weight is 0; remove it"
            )
        return self

    @model_validator(mode="after")
    def _encoder_is_fresh_or_trained(self) -> RunConfig:
        if self.model.encoder is None:
            return self
        for key in _FRESH_ENCODER:
            if _get(self, key) is not None:
                raise ValueError(f"{key} has no effect beside model.encoder; remove one of them")
        if self.stage1 is not None and self.stage1.warm_start_steps:
            raise ValueError(
                "stage1.warm_start_steps needs model.florence, whose captions it starts from; "
                "set it to 0 for an encoder that learns on"
            )
        return self

    @model_validator(mode="after")
    def _backbone_replaces_florence(self) -> RunConfig:
        if self.model.backbone is None:
            if self.model.backbone_layers is not None:
                raise ValueError(
                    "model.backbone_layers has no effect without model.backbone; remove it"
                )
            return self
        for key in ("model.florence", "model.prompt"):
            if _get(self, key) is not None:
                raise ValueError(f"{key} has no effect beside model.backbone; remove one of them")
        if self.stage1 is not None and self.stage1.warm_start_steps:
            raise ValueError(
                "stage1.warm_start_steps needs model.florence, whose captions it starts from; "
                "a backbone writes none, so set it to 0"
            )
        return self

    def _needs_one(self, key: str, other: str) -> None:
        if _get(self, key) is None and _get(self, other) is None:
            raise ValueError(f"{self.stage} needs {key} or {other}; set one of them")

    @model_validator(mode="after")
    def _fits_into_steps(self) -> RunConfig:
        spans = {"optim.warmup_steps": self.optim.warmup_steps}
        if self.stage1 is not None:
            warm = self.stage1.warm_start_steps + self.stage1.warm_start_fade_steps
            spans["stage1.warm_start_steps + warm_start_fade_steps"] = warm
        if self.stage2 is not None:
            spans["stage2.frozen_encoder_steps"] = self.stage2.frozen_encoder_steps
        for key, span in spans.items():
            if span and span >= self.loop.steps:
                raise ValueError(
                    f"{key} is {span}, but the run has only {self.loop.steps} steps; lower it"
                )
        return self


class ImageConfig(Settings):
    """What models that belong together expect of an image."""

    image_size: PositiveInt
    """Side in pixels of the square that is cut from each image."""


class ModelPreset(Settings):
    """Models that belong together: what a fresh VLV is made of."""

    model: ModelConfig
    """Florence-2, diffusion decoder and language model."""
    data: ImageConfig
    """The image."""

    @model_validator(mode="after")
    def _is_complete(self) -> ModelPreset:
        for key in ("florence", "llm", "num_queries", "input_size"):
            if getattr(self.model, key) is None:
                raise ValueError(f"model.{key} is missing; set it")
        return self


_Kind = TypeVar("_Kind", RunConfig, ModelPreset)

_FRESH_ENCODER = (
    "model.florence",
    "model.backbone",
    "model.backbone_layers",
    "model.num_queries",
    "model.input_size",
    "model.prompt",
)


def preset_names() -> list[str]:
    """The names of runs that `load_config` knows."""
    return names_in(RUNS)


def model_preset_names() -> list[str]:
    """The names of models that `load_models` knows."""
    return names_in(MODELS)


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the configuration of a run.

    Args:
        source: Path of a YAML file, or the name of a preset.
        overrides: Changes such as `optim.lr=1e-4`; the value is YAML, `null` included.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: Unknown file or preset, no YAML, an unknown key (the nearest is named), a value of the wrong type,
            or settings that contradict each other.
    """
    if str(source) in model_preset_names():
        runs = ", ".join(preset_names())
        raise ConfigError(
            f"{source} names models and no run; take one of {runs}, with --set base={source}"
        )
    return _checked(RunConfig, source, overrides)


def load_models(source: str | Path, overrides: Sequence[str] = ()) -> ModelPreset:
    """Read which models belong together; arguments and errors as those of `load_config`."""
    return _checked(ModelPreset, source, overrides)


def default_of(key: str) -> Any:
    """The default of a run's setting by its dotted key, as a JSON value; None where there is none."""
    *parents, last = key.split(".")
    field = _section(parents).model_fields.get(last)
    if field is None or field.is_required():
        return None
    return to_jsonable_python(field.get_default(call_default_factory=True))


def _checked(kind: type[_Kind], source: str | Path, overrides: Sequence[str]) -> _Kind:
    values, name = read_values(source, overrides)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{name}: {_in_words(error, kind)}") from error


def _in_words(error: ValidationError, kind: type[BaseModel]) -> str:
    """One thing that is wrong, in one sentence; a misspelt key before the missing one that it causes."""
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    *parents, last = location = [str(part) for part in first["loc"]] or [""]
    key = ".".join(location)
    match first["type"]:
        case "extra_forbidden":
            known = list(_section(parents, kind).model_fields)
            near = difflib.get_close_matches(last, known, n=1, cutoff=0.0)
            return f"unknown setting {key}; did you mean {'.'.join([*parents, *near])}?"
        case "missing":
            return f"{key} is missing; set it"
        case "value_error":
            return f"{key}: {first['ctx']['error']}" if key else str(first["ctx"]["error"])
        case _:
            return f"{key} is {first['input']!r}, but {_lower_first(first['msg'])}"


def _section(path: Sequence[str], kind: type[BaseModel] | None = None) -> type[BaseModel]:
    """The settings class at a path of names; an empty one where there is none."""
    model = kind or RunConfig
    for name in path:
        field = model.model_fields.get(name)
        annotation = field.annotation if field else None
        choices = (annotation, *get_args(annotation))
        found = (c for c in choices if isinstance(c, type) and issubclass(c, BaseModel))
        model = next(found, Settings)
    return model


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _get(settings: BaseModel, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = settings
    for name in key.split("."):
        value = getattr(value, name)
    return value
