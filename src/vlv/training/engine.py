"""An engine that writes the captions of stage 3, always with the weights of now."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from vlv.engine import EngineSettings, engine_writes
from vlv.errors import ConfigError

if TYPE_CHECKING:
    from vlv.config import RunConfig
    from vlv.models.captioner import CaptionDecoder
    from vlv.training.distributed import World


def check_engine(config: RunConfig, engine: EngineSettings | None, world: World) -> None:
    """Refuse an engine that a run has no use for, and a run that lacks one.

    Raises:
        ConfigError: One of these.
    """
    stage3 = config.stage3
    if stage3 is None or stage3.engine is None:
        if engine is not None:
            raise ConfigError(
                "an engine writes where stage3.engine is set; leave it out, or set stage3.engine=vllm"
            )
        return
    if engine is None:
        raise ConfigError(
            f"stage3.engine is {stage3.engine}; say where it is: --engine vllm --engine-python PATH"
        )
    if world.is_shared:
        raise ConfigError(
            f"stage3.engine is {stage3.engine}, which writes for one process; train in one, or set it to null"
        )
    if engine.url is not None and stage3.trainable != "mlp":
        raise ConfigError(
            f"stage3.trainable is {stage3.trainable}, and the engine needs each new weight; start it here "
            "(--engine-python), or set stage3.trainable=mlp"
        )


def captions_by(
    config: RunConfig, decoder: CaptionDecoder | None, engine: EngineSettings | None
) -> AbstractContextManager[None]:
    """Let the engine of a run write candidates and held-out captions, as long as the block lasts."""
    if engine is None or decoder is None or config.stage3 is None:
        return nullcontext()
    dtype = torch.bfloat16 if config.loop.precision == "bf16" else None
    follow = config.stage3.trainable != "mlp"
    return engine_writes(decoder, engine, dtype=dtype, follow=follow)
