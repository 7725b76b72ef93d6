"""The discrete bottleneck: every token of z becomes a row of the text tower's token table.

The paper (section 1) argues that a continuous caption embedding beats the discrete tokens of De-Diffusion, which makes
them by a Gumbel-softmax, and never measures it. This is the other side of that comparison; z is continuous without it.
Shapes: B batch, Q queries, D text width, V tokens of the table.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlv.models.draws import gumbel_like
from vlv.storage import Json

if TYPE_CHECKING:
    pass

BottleneckKind = Literal["nearest", "gumbel"]

DEFAULT_TEMPERATURE = (1.0, 0.1)
_SCORES_AT_ONCE = 1 << 25
"""Scores that are in memory together where no gradient needs them."""


@dataclass(frozen=True)
class Draw:
    """What a training step hands to an encoder whose bottleneck draws."""

    generator: torch.Generator
    """Of the rows of this pass, see `vlv.models.draws`."""
    step: int
    """Optimiser steps done before this one, on which the temperature depends."""


@dataclass(frozen=True)
class BottleneckSettings:
    """How z becomes discrete; an encoder's configuration holds it as a plain dictionary."""

    kind: BottleneckKind
    """The nearest row, or a Gumbel-softmax over all rows."""
    num_codes: int
    """V, rows of the token table."""
    temperature: tuple[float, float] = DEFAULT_TEMPERATURE
    """Of the Gumbel-softmax, at the first and at the last of `temperature_steps`."""
    temperature_steps: int = 1
    """Steps over which the temperature falls, by the same factor in each; it stays at its end afterwards."""


class DiscreteBottleneck(nn.Module):
    """From a continuous z to rows of a token table that does not train.

    A row is chosen by its direction: the score of token v is ``sqrt(D) z . t_v / |t_v|``, as if every row had the mean
    square 1. The lengths of the rows say little, and with them a short z, which every fresh projector makes, would
    always fall to the shortest row.

    "nearest" takes the row of the highest score, and its gradient goes straight through to z. "gumbel" mixes the rows
    in training, with the weights ``softmax((scores + Gumbel noise) / temperature)``; without a gradient it takes the
    row of the highest score too. So what is embedded, captioned and drawn from is always rows of the table.

    The table is a buffer: it is no parameter, checkpoints leave it out, and a saved encoder brings it along.

    Attributes:
        codebook: The table, (V, D).
        is_annealed: Whether the temperature is at its end whatever the step; so it is of an encoder that learns on.
    """

    codebook: Tensor

    def __init__(self, settings: BottleneckSettings, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.is_annealed = False
        self.register_buffer("codebook", torch.zeros(settings.num_codes, width))

    def forward(self, z: Tensor, draw: Draw | None = None) -> Tensor:
        """Make z discrete.

        Args:
            z: From the projector, (B, Q, D).
            draw: Of a training step. "gumbel" draws where it is given and z has a gradient.

        Returns:
            (B, Q, D), in the dtype of the table.
        """
        if self.settings.kind == "gumbel" and draw is not None and z.requires_grad:
            return self._mixed_rows(z, draw)
        rows = F.embedding(self.ids(z), self.codebook)  # (B, Q, D)
        return rows + (z - z.detach()) if z.requires_grad else rows

    @torch.no_grad()
    def ids(self, z: Tensor) -> Tensor:
        """The tokens with the highest scores, (B, Q) of z (B, Q, D); of rows of the table their own."""
        flat = z.reshape(-1, z.shape[-1])
        size = max(1, _SCORES_AT_ONCE // len(self.codebook))
        return torch.cat([self._scores(part).argmax(-1) for part in torch.split(flat, size)]).view(
            z.shape[:-1]
        )

    def temperature(self, step: int) -> float:
        """Of the Gumbel-softmax after this many optimiser steps."""
        start, end = self.settings.temperature
        done = 1.0 if self.is_annealed else min(1.0, step / self.settings.temperature_steps)
        return float(start * (end / start) ** done)

    def _mixed_rows(self, z: Tensor, draw: Draw) -> Tensor:
        """(B, Q, D); the weights are (B, Q, V)."""
        scores = self._scores(z)
        noisy = (scores + gumbel_like(scores, draw.generator)) / self.temperature(draw.step)
        with torch.autocast(z.device.type, enabled=False):
            return noisy.softmax(-1) @ self.codebook.float()

    def _scores(self, z: Tensor) -> Tensor:
        """(..., V) of z (..., D), in float32: half precision would decide between near tokens by rounding."""
        with torch.autocast(z.device.type, enabled=False):
            unit = F.normalize(self.codebook.float(), dim=-1)  # (V, D)
            scores: Tensor = z.float() @ unit.T
            return scores * math.sqrt(z.shape[-1])


def bottleneck_of(settings: Json | None, text_width: int) -> DiscreteBottleneck | None:
    """The bottleneck that an encoder's configuration describes, with an empty table; None leaves z continuous."""
    if settings is None:
        return None
    values = {**settings, "temperature": tuple(settings["temperature"])}
    return DiscreteBottleneck(BottleneckSettings(**values), text_width)


def as_dictionary(settings: BottleneckSettings) -> Json:
    """For an encoder's configuration."""
    return {**asdict(settings), "temperature": list(settings.temperature)}
