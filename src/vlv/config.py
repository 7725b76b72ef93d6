"""The settings of a training run: typed, checked, frozen, and saved with every run.

Each knob belongs to the object that it steers. A preset (`presets/*.yaml`) is one complete configuration; on the
command line `--set optim.lr=1e-4` changes one value.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator


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
    f"loop.{key}"
    for key in (
        [
            "log_every",
            "eval_every",
            "sample_every",
            "save_every",
            "save_every_seconds",
            "keep_last",
            "tensorboard",
        ]
    )
)
"""Settings that may change when a run goes on: none of them touches what is learnt."""
