"""Recomputation: activations are dropped in the forward pass and computed again in the backward pass.

It costs about a third of the parts' work and saves most of their memory, so it is done only where memory asks for it.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch

from vlv.config import LoopConfig, OptimConfig
from vlv.training.distributed import World
from vlv.training.prediction import FullLength, fake_copy, num_bytes, predict_step, training_batch
from vlv.training.stage3 import Stage

logger = logging.getLogger(__name__)

Choice = Literal["never", "unet", "all"]

_ROOM = 0.92
"""Share of the free memory that the prediction may take: it sees no workspaces and no fragments."""


def choose_recomputation(
    objective: Stage, image_size: int, loop: LoopConfig, optim: OptimConfig, world: World
) -> Choice:
    """Follow `loop.recompute`; for "auto", find the cheapest choice that fits into the device, and say why.

    Args:
        objective: On its device, with its weights; it gets the choice.
        image_size: Side of the images in pixels.
        loop: The setting, batch size and precision.
        optim: The optimiser.
        world: The processes; all of them call this, and all choose the same.

    Raises:
        OtherProcessError: The prediction failed in the first process, or another one ended.
    """
    choice: Choice
    if loop.recompute != "auto":
        choice = loop.recompute
    elif world.device.type != "cuda":
        choice = "never"
    else:
        free, _ = torch.cuda.mem_get_info(world.device)
        # the weights are there already, and in the prediction
        least = min(row[0] for row in world.exchange([free + num_bytes(objective.module)]))
        choice = world.on_main(
            lambda: cheapest_that_fits(
                objective, image_size, loop, optim, int(least), num_ranks=world.num_ranks
            )
        )
    recompute(objective, choice)
    return choice


def recompute(objective: Stage, choice: Choice) -> None:
    """Switch recomputation on or off.

    Frozen parts stay in eval mode. The language models of transformers recompute in train mode only, so a frozen one
    keeps its activations.

    Args:
        objective: Its parts.
        choice: "unet" is the denoiser alone, "all" also the encoder's and the caption decoder's language models.
    """
    denoiser: Any = objective.decoder.denoiser
    if denoiser is not None:
        if choice == "never":
            denoiser.disable_gradient_checkpointing()
        else:
            denoiser.enable_gradient_checkpointing()
    for part in (objective.encoder.backbone, getattr(objective, "caption_decoder", None)):
        language: Any = getattr(part, "llm", part)
        if language is None or not language.supports_gradient_checkpointing:
            continue
        if choice == "all":
            language.activation_checkpointing_enable({"use_reentrant": False})
        else:
            language.activation_checkpointing_disable()


def cheapest_that_fits(
    objective: Stage,
    image_size: int,
    loop: LoopConfig,
    optim: OptimConfig,
    room: int,
    *,
    num_ranks: int = 1,
) -> Choice:
    """The choice with the least recomputation whose predicted peak leaves some of `room` (bytes), or else "all"."""
    choices: tuple[Choice, ...] = ("never", "unet", "all")
    for choice in choices:
        peak = predicted_peak(objective, image_size, loop, optim, choice, num_ranks=num_ranks)
        fits = peak <= _ROOM * room
        logger.info(
            "recomputation %s: a step is predicted to need %.1f GB of %.1f GB%s",
            choice,
            peak / 1e9,
            room / 1e9,
            "" if fits else ", which is too much",
        )
        if fits:
            return choice
    logger.warning("even with recomputation of all parts a step may not fit; batches may be cut")
    return "all"


def predicted_peak(
    objective: Stage,
    image_size: int,
    loop: LoopConfig,
    optim: OptimConfig,
    choice: Choice,
    *,
    num_ranks: int = 1,
) -> int:
    """Bytes of a step in one of several processes with a choice, from shapes alone; the objective stays as it is."""
    copied, mode = fake_copy(objective)
    with mode:
        recompute(copied, choice)
        caption_decoder: Any = getattr(copied, "caption_decoder", None)
        if caption_decoder is not None:
            longest = getattr(copied.config, "max_caption_tokens", None)
            caption_decoder.tokenizer = FullLength(longest)
        shape = (loop.batch_size, 3, image_size, image_size)
        batch = training_batch(torch.zeros(shape, dtype=torch.uint8))
        return predict_step(copied, batch, loop, optim, num_ranks=num_ranks).peak
