"""What is kept and what is dropped: the settings of `vlv data filter`, with presets/filter/*.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from vlv.config import Settings, load_settings
from vlv.config_files import names_in

FOLDER = "presets/filter"


class ScoreRule(Settings):
    """A number of each image, and where it must lie."""

    column: str | None = None
    """Column of the table, or key of the image's JSON; null takes the name that LAION uses."""
    model: str | None = None
    """Instead of a column: an image-classification model of transformers, a folder or an id on the hub."""
    revision: str | None = None
    """Of the model: commit, branch or tag on the hub."""
    label: str | None = None
    """Of the model: the label whose probability counts."""
    below: float | None = None
    """Images whose number is below this are kept."""
    at_least: float | None = None
    """Images whose number is this or more are kept."""
    unknown: Literal["drop", "keep"] = "drop"
    """What becomes of an image without the number; a column that no record has stops the command, unless keep."""

    @model_validator(mode="after")
    def _is_complete(self) -> ScoreRule:
        if (self.below is None) == (self.at_least is None):
            raise ValueError("a rule needs below or at_least, and not both; set one of them")
        if self.model is not None and (self.column is not None or self.label is None):
            raise ValueError("model needs label, and has no effect beside column; set these two")
        if self.model is None and (self.label or self.revision):
            raise ValueError("label and revision have no effect without model; remove them")
        return self

    def keeps(self, value: float | None) -> bool:
        """Whether an image with this number is kept."""
        if value is None or value != value:  # not a number
            return self.unknown == "keep"
        return value < self.below if self.below is not None else value >= (self.at_least or 0)


class CaptionRule(Settings):
    """How well the caption explains its image to a frozen diffusion decoder, see `vlv verify`."""

    model: str
    """A vlv model with denoiser and VAE: vlv-tiny, a folder or an id on the hub."""
    at_least: float
    """Images whose caption has this recovered share or more are kept: 0 explains no more than no text, 1 as much as z."""
    revision: str | None = None
    """Of the model: commit, branch or tag on the hub."""
    device: str = "cpu"
    """Where it works; every process of the job has a copy."""
    timesteps: PositiveInt = 3
    """Noise levels; each costs a pass of the denoiser for each caption."""
    seed: int = Field(default=0, ge=0)
    """Of the noise."""
    unknown: Literal["drop", "keep"] = "drop"
    """What becomes of an image without a caption."""


class EmbeddingRule(Settings):
    """Duplicates by meaning: of images whose embeddings are alike, one is kept."""

    cosine: float = Field(gt=0, le=1)
    """Images that are at least so similar are duplicates."""
    file: str | None = None
    """FILE.safetensors that `vlv embed` wrote of the same inputs."""
    backbone: str | None = None
    """Or a vision backbone of transformers, such as DINOv2 or SigLIP 2: a folder or an id on the hub."""
    revision: str | None = None
    """Of the backbone: commit, branch or tag on the hub."""

    @model_validator(mode="after")
    def _one_source(self) -> EmbeddingRule:
        if (self.file is None) == (self.backbone is None):
            raise ValueError("embedding duplicates need file or backbone; set one of them")
        return self


class FilterConfig(Settings):
    """Every rule of the filter; null, false or an empty list switches a rule off."""

    short_side_above: int | None = Field(default=None, ge=0)
    """The shorter side in pixels must be more than this (paper, section 4.1: 512)."""
    aspect_min: PositiveFloat | None = None
    """Least width / height (paper: 0.5)."""
    aspect_max: PositiveFloat | None = None
    """Largest width / height (paper: 2)."""
    watermark: ScoreRule | None = None
    """Probability of a watermark (paper: below 0.5); LAION's column is pwatermark."""
    nsfw: ScoreRule | None = None
    """Probability of unsafe content; LAION's column is punsafe."""
    aesthetic: ScoreRule | None = None
    """Aesthetic score; LAION's column is AESTHETIC_SCORE."""
    languages: tuple[str, ...] = ()
    """Languages of the text that are kept, such as [en]."""
    language_column: str = "LANGUAGE"
    """Column of the language."""
    width_column: str = "WIDTH"
    """Where a table alone is filtered: column of the width in pixels."""
    height_column: str = "HEIGHT"
    """Where a table alone is filtered: column of the height."""
    min_bytes_per_pixel: PositiveFloat | None = None
    """Least size of the file over its pixels: below about 0.03 a JPEG has been compressed to blocks."""
    decode: bool = False
    """Decode every image: one that is cut off or damaged is dropped."""
    min_contrast: PositiveFloat | None = None
    """Least standard deviation of the grey values (0 to 255): a flat image shows nothing. Decodes."""
    exact_duplicates: bool = False
    """Of files with the same bytes, keep the first."""
    near_duplicates: int | None = Field(default=None, ge=0, le=16)
    """Bits of 64 in which the perceptual hashes of duplicates differ at most; the largest image stays. Decodes."""
    embedding_duplicates: EmbeddingRule | None = None
    """Duplicates by the cosine of embeddings; the largest image stays. Compares all with all."""
    caption_score: CaptionRule | None = None
    """Least score of the caption, so that wrong captions do not teach. Decodes, and asks a model."""
    max_bytes: PositiveInt = 20_000_000
    """Files above this size are refused unread."""

    @model_validator(mode="after")
    def _belongs_together(self) -> FilterConfig:
        low, high = self.aspect_min, self.aspect_max
        if low is not None and high is not None and low > high:
            raise ValueError(f"aspect_min {low} is above aspect_max {high}; swap them")
        return self

    @property
    def scores(self) -> dict[str, ScoreRule]:
        """The rules about a number, by name."""
        rules = {"watermark": self.watermark, "nsfw": self.nsfw, "aesthetic": self.aesthetic}
        return {name: rule for name, rule in rules.items() if rule is not None}

    @property
    def needs_pixels(self) -> bool:
        """Whether any rule looks at decoded images."""
        by_pixels = (self.min_contrast, self.near_duplicates)
        models = any(rule.model for rule in self.scores.values())
        backbone = self.embedding_duplicates is not None and self.embedding_duplicates.backbone
        models = models or self.caption_score is not None
        return self.decode or by_pixels != (None, None) or models or bool(backbone)


SCORE_COLUMNS = {"watermark": "pwatermark", "nsfw": "punsafe", "aesthetic": "AESTHETIC_SCORE"}
"""The columns of LAION's tables; capital and small letters are alike."""


def column_of(name: str, rule: ScoreRule) -> str | None:
    """The column that a rule reads; None where a model gives the number."""
    return None if rule.model is not None else rule.column or SCORE_COLUMNS[name]


def preset_names() -> list[str]:
    """The presets of the filter."""
    return names_in(FOLDER)


def load_filter(source: str | Path, overrides: Sequence[str] = ()) -> FilterConfig:
    """Read the settings of the filter from a preset or a YAML file; see `vlv.config.load_settings`."""
    return load_settings(FilterConfig, source, overrides, (FOLDER,))
