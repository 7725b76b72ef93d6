"""Fixtures for all tests: no network, one thread, and the miniature components."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import re
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tqdm import tqdm

from tests import tiny

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vlv.models.captioner import CaptionDecoder
    from vlv.models.diffusion import DiffusionDecoder
    from vlv.models.encoder import VLVEncoder
    from vlv.models.pipeline import VLVPipeline

torch.set_num_threads(1)
re._MAXCACHE = 2**14  # type: ignore[attr-defined]  # transformers has patterns for each weight of each model

# tqdm's own lock is shared with forked processes: one that was killed while it held it would stop all others for ever
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0

_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def pytest_collection_finish() -> None:
    """Spare the garbage collector, which took a tenth of the time, what was imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)  # what stays behind is small


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuse every connection that would leave this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in _LOOPBACK:
            raise RuntimeError(f"a test tried to connect to {address!r}; tests run without network")
        connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded)
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def no_flushes() -> Iterator[None]:
    """Leave it to the system when a file reaches the disk: no test pulls the plug, and many wait for flushes alone."""
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", os.fstat)  # refuses what is no open file, as a flush does
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def global_seed() -> None:
    """Fix the global generators; the library itself must not use them."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the curves off the pages of training runs: they take a second each; tests of the pages draw them."""
    monkeypatch.setattr("vlv.training.summary.charts.has_charts", lambda: False)


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps and tokens for what training runs show of themselves: random models know no end."""
    monkeypatch.setattr("vlv.training.held_out.Samples.drawing", {"steps": 2})
    monkeypatch.setattr("vlv.training.held_out.Samples.generation", {"max_new_tokens": 8})


@pytest.fixture
def models_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands get copies of the models that others have read, see `tests.loaded`."""
    from tests import loaded

    loaded.read_once(monkeypatch)


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh CPU generator, seed 0."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def pixels(generator: torch.Generator) -> torch.Tensor:
    """Three random images: (3, 3, 32, 32) in [0, 1]."""
    return torch.rand(3, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=generator)


@pytest.fixture(scope="session")
def tiny_parts() -> tiny.TinyParts:
    """The raw components, shared: do not change them (`tiny.make_parts` gives fresh ones)."""
    return tiny.make_parts()


@pytest.fixture
def tiny_encoder() -> VLVEncoder:
    """A fresh VLVEncoder."""
    return tiny.make_encoder()


@pytest.fixture(params=["epsilon", "v_prediction"])
def prediction_type(request: pytest.FixtureRequest) -> str:
    """Both regression targets."""
    return str(request.param)


@pytest.fixture
def tiny_decoder() -> DiffusionDecoder:
    """A fresh DiffusionDecoder that predicts the noise."""
    return tiny.make_decoder()


@pytest.fixture
def tiny_caption_decoder() -> CaptionDecoder:
    """A fresh CaptionDecoder."""
    return tiny.make_caption_decoder()


@pytest.fixture(scope="session")
def tiny_pipeline() -> VLVPipeline:
    """A complete pipeline, shared by the session: do not train or change it."""
    return tiny.make_pipeline()


@pytest.fixture(scope="session")
def tiny_folder(tiny_pipeline: VLVPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that holds the complete pipeline (float32)."""
    folder = tmp_path_factory.mktemp("model") / "vlv-random"
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def instructed_pipeline() -> VLVPipeline:
    """A pipeline that knows `tests.instructed` by heart, whatever the image; do not train or change it."""
    from tests import instructed

    return instructed.make_pipeline()


@pytest.fixture(scope="session")
def instructed_folder(
    instructed_pipeline: VLVPipeline, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model folder that holds it."""
    folder = tmp_path_factory.mktemp("instructed") / "vlv-instructed"
    instructed_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_models(tiny_parts: tiny.TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A ModelPreset of miniature models in local folders, as a user would write it."""
    from vlv.config import ModelPreset

    folder = tmp_path_factory.mktemp("models")
    tiny_parts.florence.save_pretrained(folder / "florence")
    tiny_parts.llm.save_pretrained(folder / "llm")
    for name in ("text_encoder", "unet", "vae", "scheduler"):
        getattr(tiny_parts, name).save_pretrained(folder / "decoder" / name)
    return ModelPreset.model_validate(
        {
            "model": {part: str(folder / part) for part in ("florence", "decoder", "llm")}
            | {"num_queries": tiny.NUM_QUERIES, "input_size": tiny.IMAGE_SIZE},
            "data": {"image_size": tiny.IMAGE_SIZE},
        }
    )
