from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
)

from tests import tiny
from vlv.config import load_config
from vlv.errors import ConfigError, ModelFolderError
from vlv.models.bottleneck import BottleneckSettings
from vlv.models.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig
from vlv.models.pipeline import VLVPipeline
from vlv.models.vision_encoder import VisionEncoder, read_image_statistics
from vlv.training.assemble import load_stage1, train

VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 99,
}
BUILD: dict[str, Any] = {
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=VIT, text_config=TEXT)),
    "siglip": lambda: SiglipModel(SiglipConfig(vision_config=VIT, text_config=TEXT)),
    "siglip2": lambda: Siglip2VisionModel(Siglip2VisionConfig(**VIT, num_patches=16)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**VIT)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**VIT, num_register_tokens=2)),
    "convnext": lambda: ConvNextModel(
        ConvNextConfig(hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1], patch_size=2)
    ),
    "efficientnet_lite": lambda: EfficientNetLite(
        EfficientNetLiteConfig(
            stem_channels=8, stages=[[1, 3, 2, 1, 8], [2, 5, 2, 2, 32]], hidden_size=16
        )
    ),
}
NUM_PATCHES = {
    "clip": 17,
    "siglip": 16,
    "siglip2": 16,
    "dinov2": 17,
    "dinov3": 19,
    "convnext": 4,
    "efficientnet_lite": 16,
}
FAMILIES = list(BUILD)
PROCESSOR = {
    "size": {"height": 32, "width": 32},
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.3, 0.2, 0.1],
}


def backbone(family: str, seed: int = 0) -> PreTrainedModel:
    return tiny._seeded(BUILD[family], seed)


def make(family: str, **changes: Any) -> VisionEncoder:
    settings: dict[str, Any] = {
        "num_queries": tiny.NUM_QUERIES,
        "text_width": tiny.TEXT_WIDTH,
        "image_size": 32,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.3, 0.2, 0.1],
        "seed": 5,
        "num_layers": 2,
    }
    return VisionEncoder.from_backbone(backbone(family), **settings | changes).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_become_a_caption_embedding(family: str, pixels: torch.Tensor) -> None:
    encoder = make(family)
    z = encoder(pixels)
    assert z.shape == (len(pixels), tiny.NUM_QUERIES, tiny.TEXT_WIDTH)
    assert z.isfinite().all()
    assert encoder.image_features(pixels).shape[1] == NUM_PATCHES[family]
    assert torch.allclose(z[:1], encoder(pixels[:1]), atol=1e-5)
    assert torch.equal(z, make(family)(pixels))
    assert not torch.allclose(z, make(family, seed=6)(pixels))
    eight_bit = (pixels * 255).round().to(torch.uint8)
    assert torch.allclose(encoder(eight_bit), encoder(eight_bit.float() / 255), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_is_the_same(family: str, pixels: torch.Tensor, tmp_path: Path) -> None:
    pipe = tiny.make_pipeline()
    pipe.register_modules(encoder=make(family))
    pipe.save_pretrained(tmp_path / "model")
    loaded = VLVPipeline.from_pretrained(tmp_path / "model")
    assert isinstance(loaded.encoder, VisionEncoder)
    assert torch.allclose(loaded.encoder(pixels), pipe.encoder(pixels), atol=1e-6)
    assert loaded.reconstruct(pixels[0], steps=2).size == (32, 32)
    assert isinstance(loaded.caption(pixels[0], max_new_tokens=4), str)


def test_the_tokens_are_those_of_the_backbone_on_normalised_pixels(pixels: torch.Tensor) -> None:
    encoder, reference = make("clip"), backbone("clip")
    mean = torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    std = torch.tensor([0.3, 0.2, 0.1])[:, None, None]
    expected = reference.vision_model(pixel_values=(pixels - mean) / std).last_hidden_state
    assert torch.allclose(encoder.image_features(pixels), expected, atol=1e-6)


def test_patches_are_cut_as_the_image_processor_cuts_them(pixels: torch.Tensor) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    from vlv.models.vision_encoder import _as_patches

    patches, options = _as_patches(pixels, 8)
    for image, rows in zip(pixels, patches, strict=True):
        expected = convert_image_to_patches(image.numpy(), 8)
        assert torch.equal(rows, torch.from_numpy(expected))
    assert options["spatial_shapes"].tolist() == [[4, 4]] * len(pixels)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_reads_other_sizes_than_it_was_trained_on(family: str, pixels: torch.Tensor) -> None:
    encoder = make(family, image_size=64)
    assert encoder(pixels).isfinite().all()
    assert encoder.config.num_patches > NUM_PATCHES[family]


def test_a_query_sees_the_queries_before_it_only(pixels: torch.Tensor) -> None:
    encoder = make("dinov2")
    z = encoder(pixels)
    with torch.no_grad():
        encoder.queries[:, 5, :4] += 1
    changed = (encoder(pixels) - z).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False] * 5 + [True] * 3


def test_it_takes_a_discrete_bottleneck(pixels: torch.Tensor, tmp_path: Path) -> None:
    encoder, table = make("dinov2"), torch.randn(9, make("dinov2").config.text_width)
    encoder.discretize(table, BottleneckSettings("nearest", num_codes=9))
    z = encoder(pixels)
    assert torch.equal(z, table[encoder.token_ids(z)])
    encoder.save_pretrained(tmp_path)
    assert torch.equal(VisionEncoder.from_pretrained(tmp_path).eval()(pixels), z)


def test_what_trains_is_a_choice(pixels: torch.Tensor) -> None:
    encoder = make("dinov2").train()
    everything = {name for name, _ in encoder.named_parameters()}
    for parts in ("language", "all", "none"):
        encoder.trainable(parts)
        names = {name for name, p in encoder.named_parameters() if p.requires_grad}
        expected = {
            "language": {name for name in everything if not name.startswith("backbone.")},
            "all": everything,
            "none": set(),
        }
        assert names == expected[parts]
    encoder.trainable("language")
    assert not encoder.backbone.training
    encoder(pixels).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
    assert all(p.grad is None for p in encoder.backbone.parameters())
    encoder.trainable("all")
    assert encoder.backbone.training


class PooledConfig(PreTrainedConfig):
    model_type = "pooled_only"


class Pooled(PreTrainedModel):
    config_class = PooledConfig

    def __init__(self, config: PooledConfig) -> None:
        super().__init__(config)
        self.layer = torch.nn.Linear(3, 8)

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return type("Out", (), {"pooler_output": self.layer(pixel_values.mean((2, 3)))})()


def test_a_pooled_backbone_and_an_unreadable_size_are_refused() -> None:
    settings: dict[str, Any] = {"num_queries": 8, "text_width": 32, "image_size": 32, "seed": 0}
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with pytest.raises(ConfigError, match=r"Pooled gives one pooled vector .* DINOv2 or SigLIP"):
        VisionEncoder.from_backbone(Pooled(PooledConfig()), **settings)
    with pytest.raises(ConfigError, match=r"cannot read images of 4 pixels.*model\.input_size"):
        make("dinov2", image_size=4)
    with pytest.raises(ConfigError, match="num_queries is 0"):
        make("dinov2", num_queries=0)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"size": {"height": 384, "width": 384}}, 384),
        (
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224}, "do_center_crop": True},
            224,
        ),
        ({"size": 336, "do_normalize": False}, 336),
        ({"max_num_patches": 256, "patch_size": 16}, 256),
    ],
)
def test_the_image_processor_says_size_and_statistics(
    settings: dict[str, Any], size: int, tmp_path: Path
) -> None:
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], **settings}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    plain = settings.get("do_normalize") is False
    mean, std = ([0.0] * 3, [1.0] * 3) if plain else ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert read_image_statistics(tmp_path) == (size, mean, std)


def test_a_folder_without_image_processor_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="has no readable"):
        read_image_statistics(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ModelFolderError, match="states no size"):
        read_image_statistics(tmp_path)


# --- training -------------------------------------------------------------------------------------


@pytest.fixture
def run_settings(tmp_path: Path) -> list[str]:
    backbone("dinov2").save_pretrained(tmp_path / "backbone")
    (tmp_path / "backbone" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    tiny.make_pipeline().save_pretrained(tmp_path / "decoder")
    images = tmp_path / "images"
    images.mkdir()
    from vlv.data.images import to_pil

    for seed in range(4):
        pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed))
        to_pil(pixels).save(images / f"{seed}.png")
        (images / f"{seed}.txt").write_text(tiny.CAPTIONS[seed])
    config = {
        "stage": "stage1",
        "model": {
            "decoder": str(tmp_path / "decoder"),
            "backbone": str(tmp_path / "backbone"),
            "backbone_layers": 1,
            "num_queries": tiny.NUM_QUERIES,
        },
        "data": {"inputs": [str(images)], "image_size": 32, "num_workers": 0},
        "optim": {"lr": 0.001},
        "loop": {"steps": 2, "batch_size": 2, "trackers": []},
        "stage1": {},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    return [str(tmp_path / "run.yaml"), str(tmp_path)]


@pytest.mark.slow
def test_stage_1_trains_on_a_backbone(run_settings: list[str]) -> None:
    file, folder = run_settings
    train(load_config(file), Path(folder, "run"))
    pipe = VLVPipeline.from_pretrained(Path(folder, "run", "model"))
    assert isinstance(pipe.encoder, VisionEncoder)
    assert pipe.encoder.config.image_mean == PROCESSOR["image_mean"]
    again = load_config(
        file,
        [
            f"model.encoder={folder}/run/model",
            "model.backbone=null",
            "model.backbone_layers=null",
            "model.num_queries=null",
        ],
    )
    assert torch.equal(load_stage1(again).encoder.queries, pipe.encoder.queries)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.florence=x", "model.florence has no effect beside model.backbone"),
        ("model.encoder=x", "model.backbone has no effect beside model.encoder"),
        ("model.prompt=What?", "model.prompt has no effect beside model.backbone"),
        ("stage1.warm_start_steps=1", "needs model.florence, whose captions"),
        ("model.backbone=null", "model.encoder are all missing; set one of them"),
    ],
)
def test_settings_that_contradict_a_backbone(
    override: str, message: str, run_settings: list[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(run_settings[0], [override])
