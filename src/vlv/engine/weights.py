"""Weights that train while an engine writes with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from vlv.engine.folder import write_untied

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class FollowedWeights:
    """Knows whether an engine has the weights of a language model as they are now.

    Args:
        llm: The language model; the engine starts with its weights of now.
        dtype: In which the engine computes, and gets them.
    """

    def __init__(self, llm: PreTrainedModel, dtype: torch.dtype) -> None:
        self._llm, self._dtype = llm, dtype
        self._first = self._sent = self._version()

    @property
    def are_known(self) -> bool:
        """Whether the engine has them."""
        return self._sent == self._version()

    def engine_began(self) -> None:
        """It has the first weights again."""
        self._sent = self._first

    @contextmanager
    def saved(self) -> Iterator[Path]:
        """A folder with the weights, as long as the block lasts; when it ends well, the engine has them."""
        version = self._version()
        with TemporaryDirectory(prefix="vlv-engine-") as folder:
            write_untied(self._llm, Path(folder), self._dtype)
            yield Path(folder)
        self._sent = version

    def _version(self) -> int:
        """Grows with every change in place, as optimizers and loading make them."""
        return sum(parameter._version for parameter in self._llm.parameters())
