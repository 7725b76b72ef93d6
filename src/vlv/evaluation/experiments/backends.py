"""Models and endpoints by the names that a user gives them, each loaded once and only when it is needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, Florence2ForConditionalGeneration

from vlv.config import PartSource
from vlv.endpoint import Budget, Client, Endpoint, KeyedStore, Prices, split_spec
from vlv.engine import EngineSettings, engine_writes
from vlv.errors import ModelFolderError
from vlv.evaluation.experiments.generators import (
    DiffusersGenerator,
    Generator,
    ModelGenerator,
    split_generator,
)
from vlv.evaluation.experiments.sources import (
    Captioner,
    Source,
    endpoint_captions,
    file_captions,
    florence_captions,
    model_captions,
    true_captions,
)
from vlv.models.adapter import split_name
from vlv.models.arguments import present
from vlv.models.encoder import VLVEncoder
from vlv.models.folder import find_folder
from vlv.models.pipeline import VLVPipeline
from vlv.models.placement import DTYPES
from vlv.models.vision_encoder import read_image_statistics
from vlv.toyworld.inspector import Inspector, InspectorConfig
from vlv.training.parts import load_pretrained, part_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vlv.evaluation.experiments.run import Settings
    from vlv.evaluation.experiments.samples import Sample


def with_dtype(settings: Settings, dtype: str) -> Settings:
    """Settings of a run that also name the dtype of what generates; one that names none generates in float32."""
    return settings if dtype == "float32" else settings | {"dtype": dtype}


def dtype_of(settings: Settings) -> torch.dtype:
    """The dtype that settings name."""
    return DTYPES[settings.get("dtype", "float32")]


@dataclass
class Backends:
    """Whatever an experiment asks for help.

    Attributes:
        device: Where models work.
        batch_size: Images worked on together.
        endpoint: From an address and the model asked there to an `Endpoint`, with its further settings.
        budget: Of each endpoint.
        prices: Of its model.
        store: Folder that keeps the answers of endpoints, so that none is paid for twice; None keeps none.
        max_new_tokens: Longest caption of a model; None leaves it to the model.
        engine: What writes the captions of models; None lets them write themselves.
        pipes: Models by name and dtype that are loaded already; others are loaded when they are needed.
        inspectors: Inspectors by name, likewise.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 16
    endpoint: Callable[[str, str], Endpoint] = Endpoint
    budget: Budget | None = None
    prices: Prices | None = None
    store: Path | None = None
    max_new_tokens: int | None = None
    engine: EngineSettings | None = None
    pipes: dict[tuple[str, torch.dtype], VLVPipeline] = field(default_factory=dict, repr=False)
    inspectors: dict[str, Inspector] = field(default_factory=dict, repr=False)
    _stores: dict[str, KeyedStore] = field(default_factory=dict, repr=False)
    _engines: ExitStack = field(default_factory=ExitStack, repr=False)

    def pipeline(self, name: str, dtype: torch.dtype = torch.float32) -> VLVPipeline:
        """A VLV model, or MODEL+ADAPTER, with weights of a dtype."""
        if (name, dtype) not in self.pipes:
            model, adapter = split_name(name)
            pipe = VLVPipeline.from_pretrained(model, adapter=adapter, dtype=dtype)
            pipe.to(self.device)
            self.pipes[name, dtype] = pipe
        return self.pipes[name, dtype]

    def client(self, spec: str) -> Client:
        """A client of the endpoint ``MODEL@URL``.

        Raises:
            ConfigError: That is no endpoint.
        """
        model, url = split_spec(spec)
        endpoint = self.endpoint(url, model)
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
                return file_captions(Path(source.value), everything)
            case "model":
                pipe = self.pipeline(source.value)
                decoder = present(pipe.caption_decoder, "caption_decoder")
                if self.engine is not None and decoder.writer is None:
                    self._engines.enter_context(engine_writes(decoder, self.engine))
                return model_captions(pipe, self.batch_size, self.max_new_tokens)
            case "florence":
                return florence_captions(*self._florence(source.value), self.batch_size)
            case "endpoint":
                return endpoint_captions(self.client(source.value))
            case _:
                return true_captions(everything, source.kind, seed)

    def _florence(self, name: str) -> tuple[VLVEncoder, PreTrainedTokenizerBase]:
        """A Florence-2 as an encoder with the prompt of its detailed captions, and its tokenizer."""
        source = PartSource(path=name)
        folder = part_folder(source, None)
        size, mean, std = read_image_statistics(folder)
        tokenizer = load_pretrained(AutoTokenizer, source, "tokenizer of florence")
        encoder = VLVEncoder.from_florence(
            load_pretrained(Florence2ForConditionalGeneration, source, "florence").to(self.device),
            tokenizer,
            num_queries=1,
            text_width=1,
            image_size=size,
            seed=0,
        )
        encoder.config.image_mean, encoder.config.image_std = mean, std
        return encoder, tokenizer

    def generator(self, text: str, steps: int, dtype: torch.dtype = torch.float32) -> Generator:
        """What generates images from texts, with weights of a dtype."""
        kind, value = split_generator(text)
        if kind == "model":
            return self.reconstructor(value, steps, dtype)
        return DiffusersGenerator(value, steps, self.device, dtype)

    def reconstructor(
        self, name: str, steps: int, dtype: torch.dtype = torch.float32
    ) -> ModelGenerator:
        """What reconstructs images from caption embeddings, with weights of a dtype."""
        return ModelGenerator(self.pipeline(name, dtype), steps)

    def inspector(self, folder: str) -> Inspector:
        """The inspector in a folder, or in the folder ``inspector`` of a model."""
        if folder not in self.inspectors:
            self.inspectors[folder] = load_inspector(Path(folder), self.device)
        return self.inspectors[folder]

    @property
    def workers(self) -> int:
        """Batches that are generated side by side."""
        return torch.get_num_threads() if self.device.type == "cpu" else 1

    def close(self) -> None:
        """Close the files of answers, and end the engines."""
        self._engines.close()
        for store in self._stores.values():
            store.close()
        self._stores.clear()


def load_inspector(folder: Path, device: torch.device | str = "cpu") -> Inspector:
    """The inspector in a folder, or in the folder ``inspector`` of a model.

    Raises:
        ModelFolderError: There is none.
    """
    home = folder if folder.is_dir() else find_folder(str(folder))
    if (home / "inspector").is_dir():
        home /= "inspector"
    config = home / "config.json"
    kind = json.loads(config.read_text("utf-8")).get("model_type") if config.is_file() else None
    if kind != InspectorConfig.model_type:
        raise ModelFolderError(f"there is no inspector in {home}; name the folder of one")
    found: Any = Inspector.from_pretrained(
        home, local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    inspector: Inspector = found.eval().to(device)
    return inspector
