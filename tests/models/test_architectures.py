"""The real sizes, on the meta device: the parameters of the published models, to 0.1 %."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from vlv.config import ModelPreset, PartSource, load_models, model_preset_names
from vlv.errors import ModelFolderError
from vlv.models.architectures import Outline, find_architecture, outline
from vlv.models.encoder import VLVEncoder
from vlv.models.vetting import num_parameters


@cache
def drawn(name: str) -> Outline:
    preset = load_models(name)
    return outline(preset.model, preset.data.image_size)


def millions(module: torch.nn.Module) -> float:
    return num_parameters(module) / 1e6


@pytest.mark.parametrize("name", model_preset_names())
def test_nothing_has_numbers(name: str) -> None:
    parts = drawn(name)
    for module in (parts.encoder, parts.decoder, parts.caption_decoder):
        assert {p.device.type for p in module.parameters()} == {"meta"}


def test_the_encoder_of_the_paper() -> None:
    encoder = drawn("paper").encoder
    language = encoder.backbone.model.language_model
    shared, positions = millions(language.shared), 4098 * 1024 / 1e6
    assert millions(encoder.backbone.model.vision_tower) == pytest.approx(360.63, rel=1e-3)
    assert shared == pytest.approx(52.52, rel=1e-3)
    body = millions(language.encoder) - shared - positions
    assert body == pytest.approx(151.16, rel=1e-3)
    body = millions(language.decoder) - shared - positions
    assert body == pytest.approx(201.56, rel=1e-3)
    assert encoder.queries.numel() / 1e6 + millions(encoder.projector) == pytest.approx(
        2.178, rel=1e-3
    )


def test_the_shapes_of_the_published_florence() -> None:
    """Sizes by which the weights of Florence-2-large are known."""
    model = drawn("paper").encoder.backbone.model
    shapes = {tuple(p.shape) for p in model.vision_tower.parameters()}
    assert {(256, 3, 7, 7), (6144, 2048), (8192, 2048)} <= shapes
    assert model.language_model.encoder.embed_positions.weight.shape == (4098, 1024)
    assert model.multi_modal_projector.image_projection.weight.shape == (1024, 2048)


def test_the_diffusion_decoder_of_the_paper() -> None:
    decoder = drawn("paper").decoder
    assert millions(decoder.text_encoder) == pytest.approx(340.39, rel=1e-3)
    assert millions(decoder.unet) == pytest.approx(865.91, rel=1e-3)
    assert millions(decoder.vae.encoder) == pytest.approx(34.16, rel=1e-3)
    assert millions(decoder.vae.decoder) == pytest.approx(49.49, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "llm", "mlp"),
    [("paper-0.5b", 494.03, 1.72), ("paper-1.5b", 1543.71, 3.94), ("paper", 3085.94, 6.30)],
)
def test_the_caption_decoders_of_the_paper(name: str, llm: float, mlp: float) -> None:
    caption_decoder = drawn(name).caption_decoder
    assert caption_decoder is not None
    assert millions(caption_decoder.llm) == pytest.approx(llm, rel=1e-3)
    assert millions(caption_decoder.mlp) == pytest.approx(mlp, rel=2e-3)


def test_what_the_paper_trains_in_stage_1() -> None:
    encoder: VLVEncoder = drawn("paper").encoder
    trained = sum(p.numel() for p in encoder.trainable("language")) / 1e6
    positions = 2 * 4098 * 1024 / 1e6
    assert trained - positions == pytest.approx(151.16 + 201.56 + 52.52 + 2.178, rel=1e-3)


def test_florence_base_is_smaller() -> None:
    base = drawn("paper-florence-base").encoder
    assert millions(base.backbone) == pytest.approx(235, rel=0.03)
    assert base.config.text_width == 1024


def test_what_is_not_known_before_the_download() -> None:
    with pytest.raises(ModelFolderError, match=r"hf download some/model config.json"):
        find_architecture(PartSource(path="some/model"), "llm")


def test_a_variant_halves_the_download() -> None:
    source = load_models("paper").model.decoder
    assert find_architecture(source, "decoder").stored == torch.float32
    half = source.model_copy(update={"variant": "fp16"})
    assert find_architecture(half, "decoder").stored == torch.float16


def test_models_in_local_folders(tiny_models: ModelPreset) -> None:
    parts = outline(tiny_models.model, tiny_models.data.image_size)
    assert parts.caption_decoder.llm.config.hidden_size == 48
    assert parts.decoder.unet is not None
    assert parts.encoder.config.num_queries == tiny_models.model.num_queries
