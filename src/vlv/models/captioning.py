"""Captioning through ``transformers.pipeline``, by its documented extension points alone.

transformers 5 has no task "image-to-text" any more: it turns the name into "image-text-to-text", whose models read a
chat. So the task here has a name of its own, "image-captioning". Importing this module makes it known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack, cast

import torch
from torch import nn
from transformers import AutoConfig, Pipeline, PreTrainedConfig, PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY

from vlv.errors import ConfigError
from vlv.models.components import CAPTIONING_TYPE
from vlv.models.decoding import Caption, GenerationOptions
from vlv.models.pipeline import VLVPipeline
from vlv.models.pixels import ImageLike, as_batch
from vlv.models.placement import pick_device, pick_dtype

TASK = "image-captioning"
_HANDED_OVER = {"config", "token", "trust_remote_code", "code_revision", "_from_pipeline"}
"""What transformers passes to every model it loads, and what a model folder has no use for."""


class CaptioningConfig(PreTrainedConfig):
    """What the ``config.json`` of a model folder says: that it is one."""

    model_type = CAPTIONING_TYPE


class CaptioningModel(PreTrainedModel):
    """The parts of a model folder that captioning needs, as one model of transformers."""

    config: CaptioningConfig
    config_class = CaptioningConfig
    main_input_name = "pixels"
    input_modalities = "image"

    def __init__(self, config: CaptioningConfig, pipe: VLVPipeline) -> None:
        super().__init__(config)
        self.pipe = pipe
        modules = {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}
        self.parts = nn.ModuleDict(modules)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name_or_folder: str | Path,
        *,
        dtype: str | torch.dtype | None = "auto",
        revision: str | None = None,
        local_files_only: bool = False,
        **others: object,
    ) -> CaptioningModel:
        """Load what captioning needs; arguments as those of ``VLVPipeline.from_pretrained``.

        Args:
            name_or_folder: A model folder, a shipped model, or ``owner/name`` on the hub.
            dtype: Of the weights; "auto" and None are what the device computes in.
            revision: Of a model on the hub.
            local_files_only: Take a model on the hub from the cache.
            **others: Nothing but what transformers hands over.

        Raises:
            ConfigError: An argument has no meaning here.
        """
        unknown = sorted(others.keys() - _HANDED_OVER)
        if unknown:
            raise ConfigError(f"{', '.join(unknown)} cannot be set here; leave it out")
        if not isinstance(dtype, torch.dtype):
            dtype = pick_dtype(dtype or "auto", pick_device("auto"))
        pipe = VLVPipeline.from_pretrained(
            name_or_folder,
            parts=["caption"],
            revision=revision,
            dtype=dtype,
            local_files_only=local_files_only,
        )
        return cls(CaptioningConfig(), pipe)

    def forward(
        self, pixels: torch.Tensor, **generation: Unpack[GenerationOptions]
    ) -> list[Caption]:
        """Captions of squares (B, 3, H, W) in [0, 1]; further arguments as in `CaptionDecoder.generate`."""
        return self.pipe.describe(list(pixels.cpu()), batch_size=len(pixels), **generation)


class CaptioningPipeline(Pipeline):
    """``pipeline("image-captioning", model=FOLDER)``: images in, captions out.

    It takes what `VLVPipeline.caption` takes, and lists of it; each image gives
    ``[{"generated_text": ...}]``, as the tasks of transformers do. Settings of `CaptionDecoder.generate`
    are given when it is built or called. Images are captioned one by one: transformers forms batches
    with a tokenizer or feature extractor only. `VLVPipeline.caption` does them together.
    """

    # There is nothing to load beside the model.
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = False

    def _sanitize_parameters(self, **settings: Any) -> tuple[dict[str, Any], ...]:
        return {}, settings, {}

    def preprocess(self, image: ImageLike) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """One image as a square (1, 3, H, W)."""
        pipe = cast("VLVPipeline", self.model.pipe)
        return {"pixels": as_batch([image], pipe.image_size, pipe.framing)}

    def _forward(self, inputs: dict[str, Any], **settings: Any) -> Any:  # type: ignore[override]
        return {"captions": self.model(inputs["pixels"], **settings)}

    def postprocess(self, outputs: dict[str, list[Caption]]) -> list[dict[str, str]]:  # type: ignore[override]
        """The caption in the form of transformers."""
        return [{"generated_text": caption.text} for caption in outputs["captions"]]


AutoConfig.register(CAPTIONING_TYPE, CaptioningConfig)
PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=CaptioningPipeline, pt_model=CaptioningModel, type="image"
)
