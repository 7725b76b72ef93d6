"""The settings of a training run: typed, checked, frozen, and saved with every run.

The sections are in `config_sections`; what belongs together is checked here. A preset (`presets/*.yaml`) is one complete configuration; on the
command line `--set optim.lr=1e-4` changes one value.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, PositiveInt, ValidationError, model_validator
from pydantic_core import to_jsonable_python

from vlv.config_files import MODELS, RUNS, names_in, read_values
from vlv.config_sections import (
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    PartSource,
    Settings,
    Stage1Config,
    Stage2Config,
)
from vlv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = [
    "FORMER_SETTINGS",
    "FREE_ON_RESUME",
    "DataConfig",
    "LoopConfig",
    "ModelConfig",
    "ModelPreset",
    "OptimConfig",
    "PartSource",
    "RunConfig",
    "Settings",
    "Stage1Config",
    "Stage2Config",
    "default_of",
    "load_config",
    "load_models",
    "load_settings",
    "model_preset_names",
    "preset_names",
]

FREE_ON_RESUME = frozenset(
    {
        "loop.log_every",
        "loop.eval_every",
        "loop.sample_every",
        "loop.save_every",
        "loop.save_every_seconds",
        "loop.parallel",
        "loop.keep_last",
        "loop.peak_tflops",
        "loop.keep_best",
        "loop.best_is",
        "loop.max_failed_saves",
        "loop.trackers",
        "loop.usd_per_gpu_hour",
        "data.inputs",  # the loader compares the records themselves
        "data.held_out",
        "data.num_workers",
        "data.prefetch",
        "data.read_timeout_seconds",
        "data.max_bad_share",
    }
)
"""Settings that may change when a run goes on: none of them touches what is learnt."""

FORMER_SETTINGS = frozenset({"loop.tensorboard"})
"""Settings of earlier versions that touched nothing of what is learnt; files that have them are still read."""


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
    def _cached_features_are_frozen(self) -> RunConfig:
        if self.stage1 and self.stage1.trainable == "all" and self.data.features:
            raise ValueError(
                "data.features are those of a frozen vision tower, but stage1.trainable is all; remove one of them"
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

    @model_validator(mode="after")
    def _temperature_has_effect(self) -> RunConfig:
        for key in ("model.gumbel_temperature", "model.gumbel_steps"):
            if _get(self, key) is not None and self.model.bottleneck != "gumbel":
                raise ValueError(
                    f"{key} has no effect unless model.bottleneck is gumbel; remove it or set that"
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
            spans["stage2.frozen_llm_steps"] = self.stage2.frozen_llm_steps
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


_Kind = TypeVar("_Kind", bound=Settings)

_FRESH_ENCODER = (
    "model.florence",
    "model.backbone",
    "model.backbone_layers",
    "model.num_queries",
    "model.input_size",
    "model.prompt",
    "model.bottleneck",
    "model.gumbel_temperature",
    "model.gumbel_steps",
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
    return load_settings(RunConfig, source, overrides)


def load_models(source: str | Path, overrides: Sequence[str] = ()) -> ModelPreset:
    """Read which models belong together; arguments and errors as those of `load_config`."""
    return load_settings(ModelPreset, source, overrides)


def default_of(key: str) -> Any:
    """The default of a run's setting by its dotted key, as a JSON value; None where there is none."""
    *parents, last = key.split(".")
    field = _section(parents).model_fields.get(last)
    if field is None or field.is_required():
        return None
    return to_jsonable_python(field.get_default(call_default_factory=True))


def load_settings(
    kind: type[_Kind],
    source: str | Path,
    overrides: Sequence[str] = (),
    folders: Sequence[str] = (RUNS, MODELS),
) -> _Kind:
    """Read settings of any kind from a file or preset; arguments and errors as those of `load_config`.

    Args:
        kind: Of the settings.
        source: Path of a YAML file, or the name of a preset.
        overrides: Changes such as `optim.lr=1e-4`.
        folders: Of the package, where presets are looked for.
    """
    values, name = read_values(source, overrides, folders)
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
