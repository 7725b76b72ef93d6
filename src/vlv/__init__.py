"""Vision-Language-Vision auto-encoder: image to caption embedding, to image, and to caption.

The public names, and nothing else. Each is loaded on first use, so that ``import vlv`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlv.data.images import load_image
    from vlv.data.source import find_records
    from vlv.errors import (
        BudgetError,
        CacheError,
        CheckpointError,
        ConfigError,
        DataError,
        DeviceLostError,
        EndpointError,
        ImageError,
        MissingPartError,
        ModelFolderError,
        OtherProcessError,
        OutputError,
        RequestError,
        VLVError,
    )
    from vlv.models.asking import Answer
    from vlv.models.captioner import CaptionDecoder
    from vlv.models.captioning import CaptioningPipeline
    from vlv.models.decoding import Caption
    from vlv.models.diffusion import DiffusionDecoder
    from vlv.models.encoder import VLVEncoder
    from vlv.models.mixing import mix_embeddings
    from vlv.models.pipeline import VLVPipeline
    from vlv.models.scoring import Scores
    from vlv.models.verification import Verification
    from vlv.models.vision_encoder import VisionEncoder

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "BudgetError",
    "CacheError",
    "Caption",
    "CaptionDecoder",
    "CaptioningPipeline",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeviceLostError",
    "DiffusionDecoder",
    "EndpointError",
    "ImageError",
    "MissingPartError",
    "ModelFolderError",
    "OtherProcessError",
    "OutputError",
    "RequestError",
    "Scores",
    "VLVEncoder",
    "VLVError",
    "VLVPipeline",
    "Verification",
    "VisionEncoder",
    "__version__",
    "find_records",
    "load_image",
    "mix_embeddings",
]

_HOMES = {
    "Answer": "vlv.models.asking",
    "Caption": "vlv.models.decoding",
    "CaptionDecoder": "vlv.models.captioner",
    "CaptioningPipeline": "vlv.models.captioning",
    "DiffusionDecoder": "vlv.models.diffusion",
    "Scores": "vlv.models.scoring",
    "VLVEncoder": "vlv.models.encoder",
    "Verification": "vlv.models.verification",
    "VisionEncoder": "vlv.models.vision_encoder",
    "VLVPipeline": "vlv.models.pipeline",
    "find_records": "vlv.data.source",
    "load_image": "vlv.data.images",
    "mix_embeddings": "vlv.models.mixing",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module.

    diffusers asks the library of each component for the base classes that it can load; ours derive from transformers'.
    """
    if name == "PreTrainedModel":
        return import_module("transformers").PreTrainedModel
    if name not in __all__:
        raise AttributeError(f"module 'vlv' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "vlv.errors")), name)


def __dir__() -> list[str]:
    return __all__
