from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    BartTokenizer,
    CLIPTextModel,
    CLIPTokenizer,
    Florence2ForConditionalGeneration,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from tests.toyworld.conftest import NUM_SCENES
from vlv.errors import ConfigError, DataError, ModelFolderError
from vlv.toyworld import components
from vlv.toyworld.inspector import Inspector
from vlv.toyworld.pretrain import PARTS, RECIPES, Part, Recipe, pretrain, recipe_of
from vlv.training.interrupt import Interrupted

REAL_LAYOUT: dict[Any, str] = {
    AutoencoderKL: "vae",
    CLIPTextModel: "text_encoder",
    UNet2DConditionModel: "unet",
    Florence2ForConditionalGeneration: "florence",
    Qwen2ForCausalLM: "llm",
}
TOKENIZERS: dict[Any, str] = {
    CLIPTokenizer: "tokenizer",
    BartTokenizer: "florence",
    Qwen2Tokenizer: "llm",
}


@pytest.fixture(autouse=True)
def short_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers of few texts: they are not what is tested here."""
    texts = list(components.corpus(50))
    monkeypatch.setattr(components, "corpus", lambda: iter(texts))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def short(part: Part, steps: int = 1) -> Recipe:
    return replace(RECIPES[part], steps=steps, batch_size=4)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_weights(shards: Path, tmp_path: Path) -> None:
    two = short("inspector", steps=2)
    with pytest.raises(Interrupted, match="at step 1 of 2"):
        pretrain("inspector", [shards], tmp_path / "a", tmp_path / "run", recipe=two, max_seconds=0)
    assert not (tmp_path / "a" / "inspector").exists()
    result = pretrain("inspector", [shards], tmp_path / "a", tmp_path / "run", recipe=two)
    assert (result.step, result.finished) == (2, True)
    whole = pretrain("inspector", [shards], tmp_path / "b", tmp_path / "other", recipe=two)
    assert whole.finished
    resumed, uninterrupted = (weights(tmp_path / name / "inspector") for name in "ab")
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(value, uninterrupted[name]) for name, value in resumed.items())
    assert not Inspector.from_pretrained(tmp_path / "a" / "inspector").training
    again = pretrain("inspector", [shards], tmp_path / "c", tmp_path / "run", recipe=two)
    assert again.finished, "a finished run has nothing to train, and saves its weights"
    assert torch.equal(weights(tmp_path / "c" / "inspector")["queries"], uninterrupted["queries"])


@pytest.mark.slow
def test_every_part_trains_in_order_and_is_saved_in_the_real_layout(
    shards: Path, models: Path, tmp_path: Path
) -> None:
    for part in PARTS:
        if part != "inspector":
            assert pretrain(part, [shards], models, tmp_path / part, recipe=short(part)).finished
    for kind, name in REAL_LAYOUT.items():
        assert not kind.from_pretrained(models / name).training
    for tokenizer, name in TOKENIZERS.items():
        assert tokenizer.from_pretrained(models / name)("a red cube").input_ids
    vae: Any = AutoencoderKL.from_pretrained(models / "vae")
    assert vae.config.scaling_factor not in (0.18215, None), "measured, not the class's default"
    scheduler: Any = DDIMScheduler.from_pretrained(models / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"


@pytest.mark.slow
def test_language_models_have_sizes(shards: Path, models: Path, tmp_path: Path) -> None:
    widths = {}
    for size, name in (("small", "llm-small"), ("large", "llm-large")):
        pretrain("llm", [shards], models, tmp_path / name, recipe=short("llm"), size=size)  # type: ignore[arg-type]
        widths[size] = Qwen2ForCausalLM.from_pretrained(models / name).config.hidden_size
        assert Qwen2Tokenizer.from_pretrained(models / name)("a red cube").input_ids
    assert widths == {"small": 96, "large": 288}
    with pytest.raises(ConfigError, match="there is no large vae; only the llm has sizes"):
        pretrain("vae", [shards], models, tmp_path / "vae-large", size="large")


def test_the_data_suffice_for_the_recipes() -> None:
    assert max(recipe.batch_size for recipe in RECIPES.values()) <= NUM_SCENES


def test_an_earlier_part_is_missed(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelFolderError, match=r"has no \w+; train the parts in the order inspector, vae, "
    ):
        pretrain("unet", [shards], tmp_path / "models", tmp_path / "run")


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown part 'clip'; choose one of inspector, vae"):
        recipe_of("clip")  # type: ignore[arg-type]


def test_data_without_scenes_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    with pytest.raises(ConfigError, match="holds no scenes; render it with `vlv toyworld render`"):
        pretrain("vae", [tmp_path], tmp_path / "models", tmp_path / "run")


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        pretrain("vae", [tmp_path / "nowhere"], tmp_path / "models", tmp_path / "run")
