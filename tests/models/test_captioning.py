"""Captioning through the pipelines of transformers and diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image
from transformers import pipeline

from vlv.data.images import to_pil
from vlv.errors import ConfigError
from vlv.models.captioning import TASK, CaptioningModel, CaptioningPipeline
from vlv.models.folder import shipped_models
from vlv.models.pipeline import VLVPipeline
from vlv.toyworld.render import render
from vlv.toyworld.scene import sample_scene

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
@pytest.mark.skipif("vlv-tiny" not in shipped_models(), reason="the model is not shipped")
def test_the_shipped_model_captions_through_transformers() -> None:
    images = [Image.fromarray(render(sample_scene(1, n, "test")).image) for n in range(3)]
    folder = shipped_models()["vlv-tiny"]
    captioner = pipeline(TASK, model=str(folder), device="cpu")
    assert isinstance(captioner, CaptioningPipeline)
    expected = VLVPipeline.from_pretrained(folder, parts=["caption"]).caption(images)
    assert captioner(images[0]) == [{"generated_text": expected[0]}]
    assert captioner(images) == [[{"generated_text": text}] for text in expected]
    assert len(set(expected)) == 3


def test_paths_batches_and_settings(
    tiny_folder: Path, tmp_path: Path, pixels: torch.Tensor
) -> None:
    images = [to_pil(image) for image in pixels]
    images[0].save(tmp_path / "a.png")
    captioner = pipeline(
        TASK, model=str(tiny_folder), device="cpu", dtype=torch.float32, max_new_tokens=5
    )
    pipe = VLVPipeline.from_pretrained(tiny_folder, parts=["caption"])
    texts = pipe.caption(images, max_new_tokens=5)
    assert captioner(str(tmp_path / "a.png")) == [{"generated_text": texts[0]}]
    assert [rows[0]["generated_text"] for rows in captioner(images)] == texts
    with pytest.raises(ValueError, match="cannot do batching"):  # transformers wants a tokenizer
        captioner(images, batch_size=2)
    short = captioner(images[1], max_new_tokens=2)[0]["generated_text"]
    assert short == pipe.caption(images[1], max_new_tokens=2)


def test_a_model_that_is_loaded_already(tiny_folder: Path, pixels: torch.Tensor) -> None:
    model = CaptioningModel.from_pretrained(tiny_folder, dtype=torch.float32)
    captioner = CaptioningPipeline(model, task=TASK, device="cpu", max_new_tokens=3)
    assert captioner(to_pil(pixels[0]))[0]["generated_text"]


def test_what_has_no_meaning_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="load_in_8bit cannot be set here"):
        CaptioningModel.from_pretrained(tiny_folder, load_in_8bit=True)
