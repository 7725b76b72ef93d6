"""The settings of a training run: typed, checked, frozen, and saved with every run.

The sections are in `config_sections` and `config_stages`; what belongs together is checked here. A preset (`presets/*.yaml`) is one complete configuration; on the
command line `--set optim.lr=1e-4` changes one value.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, Discriminator, Field, Tag, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from vlv.config_files import MODELS, RUNS, model_preset_names, names_in, read_values
from vlv.config_sections import (
    ENCODERS,
    FREE_ON_RESUME,
    AnyModel,
    BackboneEncoder,
    DataConfig,
    FlorenceEncoder,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    PartSource,
    Settings,
    TrainedEncoder,
)
from vlv.config_stages import LoraConfig, Stage1Config, Stage2Config, Stage3Config
from vlv.errors import ConfigError
from vlv.storage import Json

__all__ = [
    "BackboneEncoder",
    "DataConfig",
    "FlorenceEncoder",
    "LoopConfig",
    "LoraConfig",
    "ModelConfig",
    "ModelPreset",
    "OptimConfig",
    "PartSource",
    "RunConfig",
    "Settings",
    "Stage1Config",
    "Stage1Run",
    "Stage2Config",
    "Stage2Run",
    "Stage3Config",
    "Stage3Run",
    "TrainedEncoder",
    "defaults",
    "free_on_resume",
    "load_config",
    "load_models",
    "load_settings",
    "model_preset_names",
    "parse_run",
    "preset_names",
]


class _Run(Settings):
    """What all stages have."""

    model: AnyModel
    """What it starts from."""
    data: DataConfig
    """What it sees."""
    optim: OptimConfig
    """How it learns."""
    loop: LoopConfig
    """How long, and when to look."""

    @property
    def lora(self) -> LoraConfig | None:
        """Of the adapters that train in place of language models; None where these train whole."""
        return None

    def spans(self) -> dict[str, int]:
        """Steps of a part of the run, by name."""
        return {"optim.warmup_steps": self.optim.warmup_steps}

    def contradictions(self) -> Iterator[str]:
        """A part of the run that is longer than the run."""
        for key, span in self.spans().items():
            if span and span >= self.loop.steps:
                yield f"{key} is {span}, but the run has only {self.loop.steps} steps; lower it"


class Stage1Run(_Run):
    """A training run of stage 1: images alone teach the encoder."""

    stage: Literal["stage1"]
    """Which of the three stages."""
    stage1: Stage1Config = Field(default_factory=lambda: Stage1Config.model_validate({}))
    """Settings of stage 1, and only of it."""

    stage2: ClassVar[None] = None
    stage3: ClassVar[None] = None

    def spans(self) -> dict[str, int]:
        """Warm-up and warm start."""
        warm = self.stage1.warm_start_steps + self.stage1.warm_start_fade_steps
        return super().spans() | {"stage1.warm_start_steps + warm_start_fade_steps": warm}

    def contradictions(self) -> Iterator[str]:
        """A caption decoder, features of a tower that trains, a warm start without Florence-2."""
        yield from super().contradictions()
        for name in ("llm", "caption_decoder"):
            if getattr(self.model, name) is not None:
                yield f"model.{name} has no effect in stage1; remove it"
        if self.stage1.trainable == "all" and self.data.features:
            yield "data.features are those of a frozen vision tower, but stage1.trainable is all; remove one of them"
        if self.stage1.warm_start_steps and self.model.florence is None:
            yield "stage1.warm_start_steps needs model.florence, whose captions it starts from; set it to 0"


class Stage2Run(_Run):
    """A training run of stage 2: captions teach the caption decoder to read z."""

    stage: Literal["stage2"]
    """Which of the three stages."""
    stage2: Stage2Config = Field(default_factory=lambda: Stage2Config.model_validate({}))
    """Settings of stage 2, and only of it."""

    stage1: ClassVar[None] = None
    stage3: ClassVar[None] = None

    @property
    def lora(self) -> LoraConfig | None:
        """Of the adapters of stage 2."""
        return self.stage2.lora

    def spans(self) -> dict[str, int]:
        """Warm-up, and while parts are frozen."""
        return super().spans() | {
            "stage2.frozen_encoder_steps": self.stage2.frozen_encoder_steps,
            "stage2.frozen_llm_steps": self.stage2.frozen_llm_steps,
        }

    def contradictions(self) -> Iterator[str]:
        """No caption decoder, or latents that nothing reads."""
        yield from super().contradictions()
        if self.model.llm is None and self.model.caption_decoder is None:
            yield "stage2 needs model.llm or model.caption_decoder; set one of them"
        if self.data.latents and not self.stage2.denoising_weight:
            yield "data.latents has no effect while stage2.denoising_weight is 0; remove it"


class Stage3Run(_Run):
    """A training run of stage 3, our addition: images alone make the captions of stage 2 truer."""

    stage: Literal["stage3"]
    """Which of the three stages."""
    stage3: Stage3Config = Field(default_factory=lambda: Stage3Config.model_validate({}))
    """Settings of stage 3, and only of it."""

    stage1: ClassVar[None] = None
    stage2: ClassVar[None] = None

    @property
    def lora(self) -> LoraConfig | None:
        """Of the adapters of stage 3."""
        return self.stage3.lora

    def contradictions(self) -> Iterator[str]:
        """Parts that were never trained, and caches that nothing reads."""
        yield from super().contradictions()
        if self.model.encoder is None:
            yield "stage3 needs model.encoder, the model of stage 2; set it"
        if self.model.caption_decoder is None:
            yield "stage3 needs model.caption_decoder, the model of stage 2; set it"
        if self.loop.parallel == "fsdp":
            yield "stage3 writes captions with whole weights; set loop.parallel to ddp"


RunConfig = Stage1Run | Stage2Run | Stage3Run
"""One training run."""


def _stage_of(value: Any) -> str | None:
    stage = value.get("stage") if isinstance(value, dict) else getattr(value, "stage", None)
    return f"in {stage}" if stage in ("stage1", "stage2", "stage3") else None


_AnyRun: TypeAdapter[RunConfig] = TypeAdapter(
    Annotated[
        Annotated[Stage1Run, Tag("in stage1")]
        | Annotated[Stage2Run, Tag("in stage2")]
        | Annotated[Stage3Run, Tag("in stage3")],
        Discriminator(
            _stage_of,
            custom_error_type="no_source",
            custom_error_message="stage is none of stage1, stage2 and stage3; set it to one of them",
        ),
    ]
)
_CHOICES: tuple[type[Settings], ...] = (Stage1Run, Stage2Run, Stage3Run, *ENCODERS.values())
"""What a setting may belong to that is none of its own section."""
_SECTIONS: dict[str, type[Settings]] = {
    "optim": OptimConfig,
    "loop": LoopConfig,
    "data": DataConfig,
    "stage1": Stage1Config,
    "stage2": Stage2Config,
    "stage3": Stage3Config,
}


class ImageConfig(Settings):
    """What models that belong together expect of an image."""

    image_size: Annotated[int, Field(gt=0, le=16_384)]
    """Side in pixels of the square that is cut from each image."""


class PresetModel(FlorenceEncoder):
    """Florence-2, diffusion decoder and language model."""

    llm: PartSource
    num_queries: Annotated[int, Field(gt=0, le=4096)]
    input_size: Annotated[int, Field(gt=0, le=16_384)]


class ModelPreset(Settings):
    """Models that belong together: what a fresh VLV is made of."""

    model: PresetModel
    """Florence-2, diffusion decoder and language model."""
    data: ImageConfig
    """The image."""


_Kind = TypeVar("_Kind", bound=Settings)


def preset_names() -> list[str]:
    """The names of runs that `load_config` knows."""
    return names_in(RUNS)


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
    values, name = read_values(source, overrides)
    try:
        return parse_run(values)
    except ValidationError as error:
        raise ConfigError(f"{name}: {_in_words(error, Stage1Run)}") from error


def parse_run(values: object) -> RunConfig:
    """The configuration of a run from nested values.

    Raises:
        ValidationError: Of pydantic.
    """
    return _AnyRun.validate_python(values)


def load_models(source: str | Path, overrides: Sequence[str] = ()) -> ModelPreset:
    """Read which models belong together; arguments and errors as those of `load_config`."""
    return load_settings(ModelPreset, source, overrides)


def free_on_resume() -> set[str]:
    """Dotted names of the settings that may change when a run goes on: none of them touches what is learnt."""
    return {
        f"{section}.{name}"
        for section, kind in _SECTIONS.items()
        for name, field in kind.model_fields.items()
        if FREE_ON_RESUME in field.metadata
    }


def defaults() -> Json:
    """Defaults of a run's settings by dotted name, as JSON values; those without one are left out."""
    return {
        f"{section}.{name}": to_jsonable_python(field.get_default(call_default_factory=True))
        for section, kind in _SECTIONS.items()
        for name, field in kind.model_fields.items()
        if not field.is_required()
    }


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
    tags = [str(part) for part in first["loc"] if " " in str(part)]  # of unions, no names
    *parents, last = [str(part) for part in first["loc"] if " " not in str(part)] or [""]
    key = ".".join([*parents, last])
    match first["type"]:
        case "extra_forbidden":
            if tags and any(last in choice.model_fields for choice in _CHOICES):
                return f"{key} has no effect {tags[-1]}; remove one of them"
            known = list(_section(parents, kind).model_fields)
            near = difflib.get_close_matches(last, known, n=1, cutoff=0.0)
            return f"unknown setting {key}; did you mean {'.'.join([*parents, *near])}?"
        case "missing":
            return f"{key} is missing; set it"
        case "no_source":
            return first["msg"]
        case "value_error":
            return f"{key}: {first['ctx']['error']}" if key else str(first["ctx"]["error"])
        case _:
            return f"{key} is {first['input']!r}, but {_lower_first(first['msg'])}"


def _section(path: Sequence[str], kind: type[BaseModel]) -> type[BaseModel]:
    """The settings class at a path of names; an empty one where there is none."""
    for name in path:
        field = kind.model_fields.get(name)
        kind = next(_classes_in(field.annotation), Settings) if field else Settings
    return kind


def _classes_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings classes in an annotation, such as a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _classes_in(part)


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
