"""A search space in which images of a miniature model differ: its random weights make all of them nearly the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vlv.models.search_space import PlainSpace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vlv.models.pipeline import VLVPipeline


def telling_space(pipe: VLVPipeline, paths: Sequence[Path]) -> PlainSpace:
    """Leaves out what the positions of a context have in common in these images."""
    c = pipe.context(pipe.embed(list(paths))).sequence.float()  # (B, L, D)
    centre = c.mean((0, 1))
    positions = c.mean(0) - centre  # (L, D), of rank L - 1
    others = torch.linalg.svd(positions).Vh[len(positions) - 1 :].T  # (D, D - L + 1)
    return PlainSpace(centre, others)
