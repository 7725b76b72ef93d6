"""VLVEncoder: image in, caption embedding z out.

Florence-2 reads the image; its language decoder is fed learnable queries; a projector takes them to
the text width. Shapes: B batch, N image tokens, P prompt tokens, Q queries, d Florence width, D
text width, H W pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.configuration_utils import SubConfigSpec

from vlv.errors import ConfigError
from vlv.models.bottleneck import (
    BottleneckSettings,
    DiscreteBottleneck,
    Draw,
    as_dictionary,
    bottleneck_of,
)
from vlv.models.compilation import own_precision
from vlv.models.lora import let_train
from vlv.models.pixels import as_float
from vlv.models.resizing import resize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vlv.models.vision_encoder import VisionEncoderConfig

EncoderParts = Literal["none", "language", "all"]

_PIXELS_AT_ONCE = 16 * 768 * 768


class ImageEncoder(PreTrainedModel):
    """Image to caption embedding, in two halves.

    ``forward`` is ``encode_features(image_features(pixels))``; the halves are public so that the
    features of a frozen vision tower can be cached. Where the encoder has a discrete bottleneck, z
    passes it at the end of the second half.
    """

    bottleneck: DiscreteBottleneck | None
    """What makes z discrete; None, as in the paper, leaves it continuous."""
    backbone: PreTrainedModel
    """What reads the image, and of Florence-2 its language model too."""

    base_model_prefix = ""
    main_input_name = "pixels"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def image_features(self, pixels: Tensor) -> Tensor:
        """The image tokens of the vision tower.

        Where no gradient passes through the tower it reads a few images at a time: what it makes of large images in between
        fills a GPU long before the language models do.

        Args:
            pixels: (B, 3, H, W), float in [0, 1] or uint8, any size.

        Returns:
            (B, N, d).
        """
        learns = any(p.requires_grad for part in self.vision() for p in part.parameters())
        if learns and torch.is_grad_enabled():
            return self.look(pixels)
        count = max(1, _PIXELS_AT_ONCE // self.config.image_size**2)
        pieces = [self.look(piece) for piece in torch.split(pixels, count)]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    @abstractmethod
    def look(self, pixels: Tensor) -> Tensor:
        """`image_features` of all images at once."""

    @abstractmethod
    def project_features(self, features: Tensor) -> Tensor:
        """From image tokens (B, N, d) to z (B, Q, D) before any bottleneck."""

    @abstractmethod
    def vision(self) -> tuple[nn.Module, ...]:
        """The modules that read the image, which are frozen unless everything trains; the first is called as such."""

    @abstractmethod
    def language(self) -> tuple[nn.Module, ...]:
        """The transformers between the image tokens and the projector, each called as such."""

    @property
    def num_queries(self) -> int:
        """Q, the length of the caption embedding."""
        return int(self.config.num_queries)

    def encode_features(self, features: Tensor, draw: Draw | None = None) -> Tensor:
        """From image tokens to the caption embedding.

        Args:
            features: (B, N, d), from `image_features`.
            draw: Of a training step, for a bottleneck that draws.

        Returns:
            z, (B, Q, D).
        """
        z = self.project_features(features)
        return z if self.bottleneck is None else self.bottleneck(z, draw)

    def forward(self, pixels: Tensor, draw: Draw | None = None) -> Tensor:
        """Encode images.

        Args:
            pixels: (B, 3, H, W), float in [0, 1] or uint8, any size.
            draw: Of a training step, for a bottleneck that draws.

        Returns:
            The caption embedding z, (B, Q, D).
        """
        return self.encode_features(self.image_features(pixels), draw)

    def discretize(self, codebook: Tensor, settings: BottleneckSettings) -> None:
        """Put a discrete bottleneck behind the projector of a fresh encoder.

        Args:
            codebook: The text tower's token table, (V, D); it is copied.
            settings: Kind and schedule.
        """
        bottleneck = DiscreteBottleneck(settings, codebook.shape[1])
        bottleneck.codebook = codebook.detach().clone()
        self.bottleneck = bottleneck
        self.config.bottleneck = as_dictionary(settings)

    def token_ids(self, z: Tensor) -> Tensor:
        """What a discrete z says, as ids of the text tower's tokens.

        Args:
            z: (..., Q, D).

        Returns:
            (..., Q); of a z that is no longer rows of the table, such as an average, the best-fitting tokens.

        Raises:
            ConfigError: The encoder's z is continuous.
        """
        if self.bottleneck is None:
            raise ConfigError(
                "the encoder's z is continuous and has no token ids; train one with model.bottleneck "
                "nearest or gumbel"
            )
        return self.bottleneck.ids(z.to(self.bottleneck.codebook.device))

    def token_texts(self, z: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """What discrete z (B, Q, D) say, as B texts by the text tower's tokenizer, special tokens left out."""
        ids = self.token_ids(z).tolist()
        return [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in ids]

    def trainable(self, parts: EncoderParts) -> list[nn.Parameter]:
        """Choose what trains, by setting ``requires_grad``.

        Args:
            parts: "language" is the paper's choice, all but what reads the image: of Florence-2 its
                language encoder and decoder, of another backbone the small transformer, and of both
                the queries and the projector. "all" trains everything, "none" nothing.
        """
        self.requires_grad_(parts != "none")
        let_train(self.backbone, parts != "none")  # its adapters alone, where it has any
        if parts == "language":
            for module in self.vision():
                module.requires_grad_(False)
        self.train(self.training)
        return [p for p in self.parameters() if p.requires_grad]

    def train(self, mode: bool = True) -> Self:
        """Switch modes; frozen vision modules stay in eval mode, for drop path would blur them."""
        super().train(mode)
        for module in self.vision():
            if not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self


# What `<MORE_DETAILED_CAPTION>` becomes in Florence-2's processor; the authors' prompt.
DEFAULT_PROMPT = "Describe with a paragraph what is shown in the image."


class VLVEncoderConfig(PreTrainedConfig):
    """Configuration of `VLVEncoder`.

    Attributes:
        backbone_config: The Florence-2 configuration.
        num_queries: Q, the length of the caption embedding.
        text_width: D, the width of the text tower's token embeddings.
        prompt_ids: Florence-2 token ids that follow the image tokens, with start and end token.
        image_size: Side in pixels that Florence-2 sees; other sizes are resized to it.
        image_mean: Mean of each channel, subtracted from pixels in [0, 1].
        image_std: Standard deviation of each channel.
        bottleneck: `BottleneckSettings` of a discrete z; None leaves it continuous (the paper).
    """

    model_type = "vlv_encoder"
    sub_configs_defaults = {  # noqa: RUF012
        "backbone_config": SubConfigSpec(config_class=Florence2Config)
    }

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    num_queries: int = 77
    text_width: int = 1024
    prompt_ids: list[int] | tuple[int, ...] = ()
    image_size: int = 768
    image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)
    bottleneck: dict[str, Any] | None = None


class VLVEncoder(ImageEncoder):
    """Image to caption embedding (paper, section 3.1).

    Dropout and drop path are those of the Florence-2 configuration.
    """

    config: VLVEncoderConfig
    config_class = VLVEncoderConfig

    def __init__(self, config: VLVEncoderConfig) -> None:
        super().__init__(config)
        _check_config(config)
        backbone_config = cast("Florence2Config", config.backbone_config)
        width = _language_config(config).hidden_size
        self.backbone = Florence2ForConditionalGeneration(backbone_config)
        self.queries = nn.Parameter(torch.zeros(1, config.num_queries, width))
        self.projector = Projector(width, config.text_width)
        self.bottleneck = bottleneck_of(config.bottleneck, config.text_width)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_florence(
        cls,
        florence: Florence2ForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_queries: int,
        text_width: int,
        image_size: int,
        seed: int,
        prompt: str = DEFAULT_PROMPT,
    ) -> VLVEncoder:
        """Put fresh queries and a fresh projector on a pretrained Florence-2.

        Args:
            florence: The backbone; it is taken over, not copied.
            tokenizer: Its tokenizer, needed once for the prompt.
            num_queries: Q.
            text_width: D.
            image_size: Side in pixels that Florence-2 sees.
            seed: Of the queries (standard normal, as the authors') and the projector.
            prompt: The text that follows the image tokens.

        Returns:
            The encoder, on the backbone's device and in its dtype.
        """
        config = VLVEncoderConfig(
            backbone_config=florence.config,
            num_queries=num_queries,
            text_width=text_width,
            prompt_ids=list(tokenizer(prompt).input_ids),
            image_size=image_size,
        )
        with torch.device("meta"):
            encoder = cls(config)
        encoder.backbone = florence
        encoder._fill_head(seed)
        return encoder

    @property
    def longest_caption(self) -> int:
        """Tokens that `write` has positions for."""
        return _language_config(self.config).max_position_embeddings - 1

    @torch.no_grad()
    def write(self, pixels: Tensor, max_new_tokens: int) -> Tensor:
        """Captions of Florence-2 itself, greedy, from the image and the prompt; the queries have no part in them.

        Args:
            pixels: (B, 3, H, W), float in [0, 1] or uint8.
            max_new_tokens: T, the most tokens.

        Returns:
            Token ids of its tokenizer, (B, T) or fewer.
        """
        backbone: Any = self.backbone
        features = self.image_features(pixels)  # (B, N, d)
        prompt = torch.tensor(self.config.prompt_ids, device=features.device)
        prompt = backbone.get_input_embeddings()(prompt).expand(len(features), -1, -1)  # (B, P, d)
        memory = backbone.model.language_model.encoder(
            inputs_embeds=torch.cat([features, prompt], 1)
        )
        seen = torch.ones(memory[0].shape[:2], dtype=torch.long, device=features.device)
        ids: Tensor = backbone.generate(
            encoder_outputs=memory,  # generate() itself drops inputs_embeds for this class
            attention_mask=seen,
            max_new_tokens=max_new_tokens,
            num_beams=1,
            do_sample=False,
        )
        return ids

    def _fill_head(self, seed: int) -> None:
        """Draw queries and projector on the CPU and move them beside the backbone."""
        generator = torch.Generator().manual_seed(seed)
        queries = torch.randn(self.queries.shape, generator=generator)
        self.projector.draw(generator)
        reference = self.backbone.lm_head.weight
        self.queries = nn.Parameter(queries.to(reference))
        self.projector.to(reference)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, VLVEncoder):
            nn.init.normal_(module.queries)

    def look(self, pixels: Tensor) -> Tensor:
        """The image tokens of Florence-2's vision tower, projected to the language width, (B, N, d); token 0 is the spatial mean."""
        inputs = normalize(pixels, self.config)  # (B, 3, image_size, image_size)
        tower = self.vision()[0]
        with own_precision(tower):
            inputs = inputs.to(next(tower.parameters()).dtype)
            tokens: Tensor = self.backbone.model.get_image_features(inputs).pooler_output
            return tokens

    def project_features(self, features: Tensor) -> Tensor:
        """From image tokens to the caption embedding before any bottleneck.

        The encoder reads ``[image tokens, prompt]``; the decoder reads the queries in place of
        token embeddings, so query k sees the queries before it. The parts are called one by one
        because ``Florence2Model.forward`` refuses ``decoder_inputs_embeds``.

        Args:
            features: (B, N, d), from `image_features`.

        Returns:
            z, (B, Q, D).
        """
        language = self.backbone.model.language_model
        ids = torch.tensor(self.config.prompt_ids, dtype=torch.long, device=features.device)
        prompt = language.shared(ids).expand(len(features), -1, -1)  # (B, P, d)
        inputs = torch.cat([features.to(prompt.dtype), prompt], dim=1)  # (B, N + P, d)
        memory = language.encoder(inputs_embeds=inputs).last_hidden_state  # (B, N + P, d)
        queries = self.queries.expand(len(features), -1, -1).to(prompt.dtype)  # (B, Q, d)
        # The mask is given, for the decoder would ask the device whether one is needed, and wait.
        causal = queries.new_ones(queries.shape[1], queries.shape[1], dtype=torch.bool).tril()
        hidden = language.decoder(
            inputs_embeds=queries,
            attention_mask=causal[None, None],
            encoder_hidden_states=memory,
            use_cache=False,
        ).last_hidden_state  # (B, Q, d)
        z: Tensor = self.projector(hidden)  # (B, Q, D)
        return z

    def vision(self) -> tuple[nn.Module, ...]:
        """The vision tower and its projection."""
        return self.backbone.model.vision_tower, self.backbone.model.multi_modal_projector

    def language(self) -> tuple[nn.Module, ...]:
        """Florence-2's language encoder and decoder."""
        language = self.backbone.model.language_model
        return language.encoder, language.decoder


def normalize(pixels: Tensor, config: VLVEncoderConfig | VisionEncoderConfig) -> Tensor:
    """What a vision tower sees, to the bit as the image processors of transformers, which resize 8-bit images with Pillow.

    Args:
        pixels: (B, 3, H, W), float in [0, 1] or uint8.
        config: With `image_size`, `image_mean` and `image_std`.

    Returns:
        (B, 3, image_size, image_size).
    """
    size = config.image_size
    if pixels.shape[-2:] != (size, size):
        levels = pixels
        if pixels.dtype != torch.uint8:
            levels = (as_float(pixels).float() * 255).round().to(torch.uint8)
        pixels = resize(levels, size, size)
    pixels = as_float(pixels).float()
    mean = pixels.new_tensor(config.image_mean)[:, None, None]
    std = pixels.new_tensor(config.image_std)[:, None, None]
    return (pixels - mean) / std


class Projector(nn.Sequential):
    """From one width to another: linear, GELU, linear."""

    def __init__(self, inputs: int, outputs: int) -> None:
        first, second = nn.Linear(inputs, outputs), nn.Linear(outputs, outputs)
        super().__init__(first, nn.GELU(), second)

    def draw(self, generator: torch.Generator) -> None:
        """Fill it on the CPU, even from the meta device."""
        self.to_empty(device="cpu")
        for layer in self:
            if isinstance(layer, nn.Linear):
                draw_linear(layer, generator)


def draw_linear(layer: nn.Linear, generator: torch.Generator) -> None:
    """Fill a linear layer with PyTorch's default distribution, uniform in +-1/sqrt(fan-in)."""
    bound = layer.in_features**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)


def _language_config(config: VLVEncoderConfig) -> BartConfig:
    return cast("BartConfig", cast("Florence2Config", config.backbone_config).text_config)


def _check_config(config: VLVEncoderConfig) -> None:
    text = _language_config(config)
    if not config.prompt_ids:
        raise ConfigError("the encoder configuration has no prompt_ids; give the ids of the prompt")
    if not 1 <= config.num_queries <= text.max_position_embeddings:
        raise ConfigError(
            f"num_queries is {config.num_queries}, but Florence-2's decoder reads between 1 and "
            f"{text.max_position_embeddings} tokens; choose a number in that range"
        )
