"""VisionEncoder: image in, caption embedding z out, from any vision backbone of transformers.

A backbone such as SigLIP 2, DINOv2, DINOv3 or CLIP reads the image; learnable queries read its
patch tokens through a small transformer; a projector takes them to the text width. Shapes: B batch,
N patch tokens, Q queries, d backbone width, D text width, H W pixels.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.image_processing_base import ImageProcessingMixin

import vlv.models.efficientnet_lite  # noqa: F401 - AutoModel learns of it
from vlv.errors import ConfigError, ModelFolderError
from vlv.models.bottleneck import bottleneck_of
from vlv.models.compilation import own_precision
from vlv.models.encoder import ImageEncoder, Projector, draw_linear, normalize

_HEAD_WIDTH = 64
_CANNOT_READ = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class VisionEncoderConfig(PreTrainedConfig):
    """Configuration of `VisionEncoder`.

    Attributes:
        backbone_config: Configuration of the vision backbone.
        num_queries: Q, the length of the caption embedding.
        text_width: D, the width of the text tower's token embeddings.
        num_layers: Layers of the small transformer.
        num_patches: N, how many tokens the backbone gives for one image of `image_size`.
        width: d, their width, and that of the small transformer.
        image_size: Side in pixels that the backbone sees; other sizes are resized to it.
        image_mean: Mean of each channel, subtracted from pixels in [0, 1].
        image_std: Standard deviation of each channel.
        bottleneck: `BottleneckSettings` of a discrete z; None leaves it continuous.
    """

    model_type = "vlv_vision_encoder"
    sub_configs_defaults = {  # noqa: RUF012
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="dinov2")
    }

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    num_queries: int = 77
    text_width: int = 1024
    num_layers: int = 6
    num_patches: int = 257
    width: int = 768
    image_size: int = 224
    image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    bottleneck: dict[str, Any] | None = None


class VisionEncoder(ImageEncoder):
    """Image to caption embedding by any vision backbone.

    The patch tokens get learnt positions: a backbone with rotary positions need not carry them in its tokens. The queries see
    the queries before them only, as in Florence-2's decoder, so that the leading part of z means
    the same whatever follows it.
    """

    config: VisionEncoderConfig
    config_class = VisionEncoderConfig

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__(config)
        if config.num_queries < 1:
            raise ConfigError(f"num_queries is {config.num_queries}; choose 1 or more")
        width = config.width
        self.backbone: Any = AutoModel.from_config(config.backbone_config, trust_remote_code=False)
        self.positions = nn.Parameter(torch.zeros(1, config.num_patches, width))
        self.queries = nn.Parameter(torch.zeros(1, config.num_queries, width))
        layer = nn.TransformerDecoderLayer(
            width,
            _num_heads(width),
            4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.reader = nn.ModuleDict(
            {
                "norm_memory": nn.LayerNorm(width),
                "layers": nn.TransformerDecoder(layer, config.num_layers, nn.LayerNorm(width)),
            }
        )
        self.projector = Projector(width, config.text_width)
        self.bottleneck = bottleneck_of(config.bottleneck, config.text_width)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel,
        *,
        num_queries: int,
        text_width: int,
        image_size: int,
        image_mean: list[float],
        image_std: list[float],
        seed: int,
        num_layers: int = 6,
    ) -> VisionEncoder:
        """Put fresh queries, a fresh small transformer and a fresh projector on a backbone.

        Args:
            backbone: A pretrained vision model, or a model of images and texts, whose vision tower
                is taken; it is taken over, not copied.
            num_queries: Q.
            text_width: D.
            image_size: Side in pixels that the backbone sees.
            image_mean: Of its image processor.
            image_std: Of its image processor.
            seed: Of everything fresh; the queries are standard normal, as in `VLVEncoder`.
            num_layers: Layers of the small transformer.

        Returns:
            The encoder, on the backbone's device and in its dtype.

        Raises:
            ConfigError: The backbone gives no patch tokens, or cannot read images of this size.
        """
        tower = vision_tower(backbone)
        num_patches, width = _measure(tower, image_size)
        config = VisionEncoderConfig(
            backbone_config=tower.config,
            num_queries=num_queries,
            text_width=text_width,
            num_layers=num_layers,
            num_patches=num_patches,
            width=width,
            image_size=image_size,
            image_mean=list(image_mean),
            image_std=list(image_std),
        )
        with torch.device("meta"):
            encoder = cls(config)
        encoder.backbone = tower
        encoder._fill_head(seed)
        return encoder

    def _fill_head(self, seed: int) -> None:
        """Draw everything but the backbone on the CPU and move it beside the backbone."""
        generator = torch.Generator().manual_seed(seed)
        reference = next(self.backbone.parameters())
        queries = torch.randn(self.queries.shape, generator=generator)
        positions = 0.02 * torch.randn(self.positions.shape, generator=generator)
        self.queries = nn.Parameter(queries.to(reference))
        self.positions = nn.Parameter(positions.to(reference))
        for module in (self.reader, self.projector):
            module.to_empty(device="cpu")
            _draw(module, generator)
            module.to(reference)

    def look(self, pixels: Tensor) -> Tensor:
        """The backbone's tokens, (B, N, d), of pixels (B, 3, H, W) in [0, 1] or uint8."""
        inputs = normalize(pixels, self.config)
        with own_precision(self.backbone):
            return patch_tokens(self.backbone, inputs.to(next(self.backbone.parameters()).dtype))

    def project_features(self, features: Tensor) -> Tensor:
        """From patch tokens (B, N, d) to the caption embedding before any bottleneck, (B, Q, D)."""
        memory = self.reader["norm_memory"](features) + self.positions  # (B, N, d)
        queries = self.queries.expand(len(features), -1, -1)  # (B, Q, d)
        later = torch.ones(2 * [self.num_queries], dtype=torch.bool, device=queries.device).triu(1)
        hidden = self.reader["layers"](queries, memory, tgt_mask=later)  # (B, Q, d)
        z: Tensor = self.projector(hidden)  # (B, Q, D)
        return z

    def vision(self) -> tuple[nn.Module, ...]:
        """The backbone."""
        return (self.backbone,)

    def language(self) -> tuple[nn.Module, ...]:
        """The small transformer in whose place Florence-2 has its language model."""
        return (self.reader["layers"],)


def vision_tower(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that reads images: its vision tower, or the model itself."""
    tower = getattr(model, "vision_model", model)
    return tower if isinstance(tower, PreTrainedModel) else model


def patch_tokens(backbone: PreTrainedModel, inputs: Tensor) -> Tensor:
    """All tokens of the backbone's last layer, class and register tokens among them.

    Args:
        backbone: A vision model of transformers.
        inputs: Normalised pixels, (B, 3, H, W).

    Returns:
        (B, N, d); the cells of a feature map (B, d, h, w) become tokens.

    Raises:
        ConfigError: The backbone gives one vector per image.
    """
    accepted = inspect.signature(type(backbone).forward).parameters
    options: dict[str, Any] = {}
    if "spatial_shapes" in accepted:
        inputs, options = _as_patches(inputs, int(backbone.config.patch_size))
    elif "interpolate_pos_encoding" in accepted:
        options["interpolate_pos_encoding"] = inputs.shape[-1] != backbone.config.image_size
    tokens = getattr(backbone(pixel_values=inputs, **options), "last_hidden_state", None)
    if tokens is not None and tokens.ndim == 4:
        tokens = tokens.flatten(2).transpose(1, 2)
    if tokens is None or tokens.ndim != 3 or tokens.shape[1] < 2:
        raise ConfigError(
            f"the backbone {type(backbone).__name__} gives one pooled vector per image, but the "
            "queries read patch tokens; name a backbone whose output has them, such as DINOv2 or "
            "SigLIP"
        )
    return torch.as_tensor(tokens)


def _as_patches(inputs: Tensor, patch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Pixels (B, 3, H, W) as rows of patches (B, N, p p 3), for backbones of any aspect ratio."""
    batch, channels, height, width = inputs.shape
    rows, columns = height // patch, width // patch
    grid = inputs[..., : rows * patch, : columns * patch]
    grid = grid.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    shapes = torch.tensor([[rows, columns]]).expand(batch, 2)
    mask = torch.ones(batch, rows * columns, dtype=torch.long, device=inputs.device)
    patches = grid.reshape(batch, rows * columns, patch * patch * channels)
    return patches, {"spatial_shapes": shapes, "pixel_attention_mask": mask}


@torch.no_grad()
def _measure(backbone: PreTrainedModel, image_size: int) -> tuple[int, int]:
    """(N, d) of an image of this size, found by a trial."""
    reference = next(backbone.parameters())
    pixels = reference.new_zeros(1, 3, image_size, image_size)
    try:
        _, num_patches, width = patch_tokens(backbone, pixels).shape
    except ConfigError:
        raise
    except _CANNOT_READ as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"the backbone {type(backbone).__name__} cannot read images of {image_size} pixels "
            f"({reason}); set model.input_size to the side that it was trained on"
        ) from error
    return num_patches, width


def _num_heads(width: int) -> int:
    """Attention heads of about 64 channels that divide the width."""
    wanted = max(1, width // _HEAD_WIDTH)
    return next(heads for heads in range(wanted, 0, -1) if width % heads == 0)


def _draw(module: nn.Module, generator: torch.Generator) -> None:
    """Fill linear layers, attention and norms, the usual way, from one generator."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        elif isinstance(part, nn.MultiheadAttention):
            bound = (3 / part.embed_dim) ** 0.5 / 2**0.5  # Xavier, as PyTorch does
            with torch.no_grad():
                part.in_proj_weight.uniform_(-bound, bound, generator=generator)
                part.in_proj_bias.zero_()
        elif isinstance(part, nn.Linear):
            draw_linear(part, generator)


def read_image_statistics(folder: Path) -> tuple[int, list[float], list[float]]:
    """What the image processor of a backbone says of size, mean and standard deviation.

    Args:
        folder: Of the backbone, with its ``preprocessor_config.json``.

    Returns:
        Side of the square in pixels, mean and standard deviation of pixels in [0, 1].

    Raises:
        ModelFolderError: The folder has no image processor, or it does not say.
    """
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelFolderError(
            f"{folder} has no readable preprocessor_config.json; copy the backbone with it"
        ) from error
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    if size is None and settings.get("max_num_patches"):  # images of any aspect ratio
        size = int(settings["max_num_patches"] ** 0.5) * int(settings.get("patch_size", 16))
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if not settings.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    if not isinstance(size, int) or mean is None or std is None:
        raise ModelFolderError(
            f"the preprocessor_config.json in {folder} states no size, image_mean and image_std; "
            "add them"
        )
    return size, list(mean), list(std)
