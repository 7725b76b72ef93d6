"""Models and endpoints by the names that a user gives them, each loaded once and only when it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlv.endpoint import Budget, Client, Endpoint, KeyedStore, Prices
from vlv.errors import ConfigError
from vlv.evaluation.experiments.painters import (
    DiffusersPainter,
    ModelPainter,
    Painter,
    split_painter,
)
from vlv.evaluation.experiments.sources import (
    Captioner,
    EndpointCaptions,
    FileCaptions,
    ModelCaptions,
    Source,
    TrueCaptions,
)
from vlv.models.pipeline import VLVPipeline
from vlv.models.placement import DTYPES

if TYPE_CHECKING:
    from vlv.evaluation.experiments.samples import Sample


def with_dtype(settings: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Settings of a run that also name the dtype of what draws; one that names none, as older ones do, draws in float32."""
    return settings if dtype == "float32" else settings | {"dtype": dtype}


def dtype_of(settings: dict[str, Any]) -> torch.dtype:
    """The dtype that settings name."""
    return DTYPES[settings.get("dtype", "float32")]


@dataclass
class Backends:
    """Whatever an experiment asks for help.

    Attributes:
        device: Where models work.
        batch_size: Pictures worked on together.
        endpoint: Further settings of every `Endpoint`: key_env, concurrency, requests_per_minute, timeout, ...
        budget: Of each endpoint.
        prices: Of its model.
        store: Folder that keeps the answers of endpoints, so that none is paid for twice; None keeps none.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 16
    endpoint: dict[str, Any] = field(default_factory=dict)
    budget: Budget | None = None
    prices: Prices | None = None
    store: Path | None = None
    _pipes: dict[tuple[str, torch.dtype], VLVPipeline] = field(default_factory=dict, repr=False)
    _stores: dict[str, KeyedStore] = field(default_factory=dict, repr=False)

    def pipeline(self, name: str, dtype: torch.dtype = torch.float32) -> VLVPipeline:
        """A model of ours, with weights of a dtype."""
        if (name, dtype) not in self._pipes:
            pipe = VLVPipeline.from_pretrained(name, dtype=dtype)
            pipe.to(self.device)
            self._pipes[name, dtype] = pipe
        return self._pipes[name, dtype]

    def client(self, spec: str) -> Client:
        """A client of the endpoint ``MODEL@URL``.

        Raises:
            ConfigError: That is no endpoint.
        """
        model, at, url = spec.rpartition("@")
        if not at or not model:
            raise ConfigError(
                f'"{spec}" is no endpoint; write MODEL@URL, such as qwen@http://127.0.0.1:8000/v1'
            )
        endpoint = Endpoint(url, model, **self.endpoint)
        if self.store is not None and spec not in self._stores:
            name = "".join(c if c.isalnum() else "-" for c in spec)
            self._stores[spec] = KeyedStore(self.store / f"{name}.answers")
        return Client(
            endpoint, store=self._stores.get(spec), budget=self.budget, prices=self.prices
        )

    def captioner(self, source: Source, everything: Sequence[Sample], seed: int) -> Captioner:
        """What writes the captions of a source.

        Args:
            source: Any but one of caption embeddings.
            everything: All samples of the run.
            seed: Of the shuffling of words.
        """
        match source.kind:
            case "file":
                return FileCaptions(Path(source.value), everything)
            case "model":
                return ModelCaptions(self.pipeline(source.value), self.batch_size)
            case "endpoint":
                return EndpointCaptions(self.client(source.value))
            case _:
                return TrueCaptions(everything, source.kind, seed)

    def painter(self, text: str, steps: int, dtype: torch.dtype = torch.float32) -> Painter:
        """What draws pictures of texts, with weights of a dtype."""
        kind, value = split_painter(text)
        if kind == "model":
            return self.embedder(value, steps, dtype)
        return DiffusersPainter(value, steps, self.device, dtype)

    def embedder(self, name: str, steps: int, dtype: torch.dtype = torch.float32) -> ModelPainter:
        """What rebuilds pictures from caption embeddings, with weights of a dtype."""
        return ModelPainter(self.pipeline(name, dtype), steps)

    def close(self) -> None:
        """Close the files of answers."""
        for store in self._stores.values():
            store.close()
        self._stores.clear()
