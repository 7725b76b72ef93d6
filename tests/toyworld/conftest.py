"""A small rendered data set, a batch of it, and tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import BartTokenizer, CLIPTokenizer, Qwen2Tokenizer

from vlv.data.loader import Loader, LoaderSettings
from vlv.data.source import find_records
from vlv.toyworld import components
from vlv.toyworld.dataset import Layout, render_shards
from vlv.toyworld.scene import Scene, sample_scene
from vlv.training.objective import Batch

NUM_SCENES = 128


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `NUM_SCENES` rendered training scenes."""
    folder = tmp_path_factory.mktemp("shards")
    render_shards(folder, Layout("train", NUM_SCENES, seed=0, per_shard=100), workers=1)
    return folder


@pytest.fixture(scope="session")
def batch(shards: Path) -> Batch:
    """Six rendered pictures."""
    settings = LoaderSettings(batch_size=6, image_size=components.IMAGE_SIZE)
    with Loader(find_records([shards]), settings) as loader:
        return next(loader)


@pytest.fixture(scope="session")
def scenes() -> list[Scene]:
    """Five hundred scenes of all kinds."""
    return [sample_scene(1, i, "composition" if i % 5 == 0 else "train") for i in range(500)]


@pytest.fixture(scope="session")
def tokenizers() -> tuple[CLIPTokenizer, BartTokenizer, Qwen2Tokenizer]:
    """Of a quarter of the corpus, whose texts are written once."""
    texts = list(components.corpus(1000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(components, "corpus", lambda: iter(texts))
        return (
            components.make_text_tokenizer(),
            components.make_florence_tokenizer(),
            components.make_llm_tokenizer(),
        )


@pytest.fixture(scope="session")
def text_tokenizer(tokenizers: tuple[CLIPTokenizer, ...]) -> CLIPTokenizer:
    return tokenizers[0]


@pytest.fixture(scope="session")
def florence_tokenizer(tokenizers: tuple[Any, BartTokenizer, Any]) -> BartTokenizer:
    return tokenizers[1]


@pytest.fixture(scope="session")
def llm_tokenizer(tokenizers: tuple[Any, Any, Qwen2Tokenizer]) -> Qwen2Tokenizer:
    return tokenizers[2]
