"""The real engine, where `make engine` has installed one or `VLV_ENGINE_PYTHON` names an interpreter that has vLLM."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vlv.engine import EngineSettings, engine_writes
from vlv.models.pipeline import VLVPipeline
from vlv.toyworld.render import render
from vlv.toyworld.scene import sample_scene

INSTALLED = Path(sys.prefix) / "engine"  # by make engine
PYTHON = os.environ.get("VLV_ENGINE_PYTHON") or (
    str(INSTALLED / "bin/python") if (INSTALLED / ".done").exists() else None
)
NUM = int(os.environ.get("VLV_ENGINE_SCENES", "500"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="no vLLM: run make engine, or set VLV_ENGINE_PYTHON"),
]


@pytest.fixture(scope="module")
def pipe() -> VLVPipeline:
    return VLVPipeline.from_pretrained("vlv-tiny", parts=["caption"])


@pytest.fixture(scope="module")
def z(pipe: VLVPipeline) -> torch.Tensor:
    """Of scenes that it was not trained on."""
    scenes = [sample_scene(1, index, "test") for index in range(NUM)]
    return pipe.embed([render(scene, pipe.image_size).image for scene in scenes])


@pytest.fixture(scope="module")
def own(pipe: VLVPipeline, z: torch.Tensor) -> dict[str, list[tuple[int, ...]]]:
    """What our own loop writes."""
    return {
        "greedy": [x.ids for x in pipe.describe(z=z, batch_size=64)],
        "dot": [x.ids for x in pipe.describe(z=z[:8], end_token=".")],
        "short": [x.ids for x in pipe.describe(z=z[:8], max_new_tokens=5)],
    }


@pytest.fixture(scope="module")
def engine(pipe: VLVPipeline, own: object) -> Iterator[None]:
    assert pipe.caption_decoder is not None
    with engine_writes(pipe.caption_decoder, EngineSettings(python=PYTHON), follow=True):
        yield


def test_it_writes_the_tokens_of_our_own_loop(
    pipe: VLVPipeline, z: torch.Tensor, own: dict[str, list[tuple[int, ...]]], engine: None
) -> None:
    assert [x.ids for x in pipe.describe(z=z, batch_size=64)] == own["greedy"]
    assert [x.ids for x in pipe.describe(z=z[:8], end_token=".")] == own["dot"]
    assert [x.ids for x in pipe.describe(z=z[:8], max_new_tokens=5)] == own["short"]


def test_its_samples_belong_to_seed_and_prefix(
    pipe: VLVPipeline, z: torch.Tensor, engine: None
) -> None:
    seeds = list(range(8))
    first = pipe.describe(z=z[:8], do_sample=True, temperature=0.9, top_p=0.9, seed=seeds)
    again = pipe.describe(z=z[4:8], do_sample=True, temperature=0.9, top_p=0.9, seed=seeds[4:])
    assert again == first[4:]
    assert pipe.describe(z=z[:8], do_sample=True, temperature=0.9, top_p=0.9, seed=9) != first


def test_it_takes_weights_that_have_changed(
    pipe: VLVPipeline, z: torch.Tensor, engine: None
) -> None:
    decoder = pipe.caption_decoder
    assert decoder is not None
    first = [x.ids for x in pipe.describe(z=z[:8])]
    with torch.no_grad():
        for parameter in decoder.llm.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter += 0.05 * parameter.std() * noise
    found = [x.ids for x in pipe.describe(z=z[:8], max_new_tokens=60)]
    writer, decoder.writer = decoder.writer, None
    expected = [x.ids for x in pipe.describe(z=z[:8], max_new_tokens=60)]
    decoder.writer = writer
    assert found == expected != [ids[:60] for ids in first]
