"""Vision-Language-Vision auto-encoder: image to caption embedding, to image, and to caption.

The public names, and nothing else. They are loaded when first used, so that ``import vlv`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlv.errors import VLVError as VLVError
    from vlv.models.captioner import Caption as Caption
    from vlv.models.captioner import CaptionDecoder as CaptionDecoder
    from vlv.models.diffusion import DiffusionDecoder as DiffusionDecoder
    from vlv.models.encoder import VLVEncoder as VLVEncoder
    from vlv.models.mixing import mix_embeddings as mix_embeddings
    from vlv.models.pipeline import VLVPipeline as VLVPipeline

__version__ = "0.1.0"

_HOMES = {
    "Caption": "vlv.models.captioner",
    "CaptionDecoder": "vlv.models.captioner",
    "DiffusionDecoder": "vlv.models.diffusion",
    "VLVEncoder": "vlv.models.encoder",
    "VLVError": "vlv.errors",
    "VLVPipeline": "vlv.models.pipeline",
    "mix_embeddings": "vlv.models.mixing",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vlv' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
