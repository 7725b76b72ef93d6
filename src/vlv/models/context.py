"""The context c: the denoiser's conditioning. Shapes: B images, L tokens, D text width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """What the text towers make of caption embeddings or texts, one row per image."""

    sequence: Tensor
    """The towers' states, (B, L, D); the caption decoder reads these alone."""
    pooled: Tensor | None = None
    """The pooled vector of SDXL and Stable Diffusion 3, (B, P)."""
    t5: Tensor | None = None
    """The T5 states of a text in Stable Diffusion 3, (B, T, D3); z never enters that tower."""

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, rows: slice) -> Context:
        return self._each(lambda x: x[rows])

    @classmethod
    def cat(cls, contexts: Sequence[Context]) -> Context:
        """Join contexts of one kind along the batch."""
        names = [
            field.name for field in fields(cls) if getattr(contexts[0], field.name) is not None
        ]
        return cls(**{name: torch.cat([getattr(c, name) for c in contexts]) for name in names})

    def repeat_interleave(self, count: int) -> Context:
        """Each row `count` times in succession, (B count, ...)."""
        return self._each(lambda x: x.repeat_interleave(count, 0))

    def expand(self, batch_size: int) -> Context:
        """A single row for a whole batch, without copying; a whole batch stays as it is."""
        return self._each(lambda x: x.expand(batch_size, *x.shape[1:]))

    def select(self, rows: Tensor) -> Context:
        """The given rows, in the given order, for their numbers (N,)."""
        return self._each(lambda x: x[rows])

    def tensors(self) -> list[Tensor]:
        """The tensors that it has."""
        return [x for x in (self.sequence, self.pooled, self.t5) if x is not None]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Context:
        pooled = None if self.pooled is None else change(self.pooled)
        t5 = None if self.t5 is None else change(self.t5)
        return Context(change(self.sequence), pooled, t5)
