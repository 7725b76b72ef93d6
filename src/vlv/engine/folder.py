"""The language model of a caption decoder as a plain folder of transformers, which engines read."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from vlv.errors import ConfigError, OutputError
from vlv.models.folder import quiet_loading
from vlv.models.hashing import weights_hash
from vlv.storage import sync_tree, temporary_beside

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from vlv.models.captioner import CaptionDecoder

_HASH_LENGTH = 16
_NOT_THE_MODEL = {"_name_or_path", "architectures", "dtype", "transformers_version"}
"""Parts of a configuration that saving may change."""


def engine_cache() -> Path:
    """Where language models for engines are kept, and the logs of engines."""
    return Path(constants.HF_HOME) / "vlv" / "engine"


def saved_language_model(
    decoder: CaptionDecoder, cache: Path | None = None, *, untied: bool = False
) -> Path:
    """The language model with its tokenizer in a folder of the cache, written there once.

    The folder's name holds a hash of weights and configuration, and an engine serves the model under this name, so that an
    engine with another model is noticed.

    Args:
        decoder: Whose language model.
        cache: Where the folder is; None is `engine_cache`.
        untied: See `write_untied`.

    Raises:
        ConfigError: The weights are stored in fewer bits.
        OutputError: The disk refuses.
    """
    if not all(type(p) is nn.Parameter and p.is_floating_point() for p in decoder.llm.parameters()):
        raise ConfigError(
            "an engine reads plain weights; leave --llm-bits out, for it has quantisation of its own"
        )
    folder = (cache or engine_cache()) / f"llm-{_hash(decoder)}{'-untied' if untied else ''}"
    if not folder.is_dir():
        _write(decoder, folder, untied)
    return folder


def write_untied(llm: PreTrainedModel, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write weights and configuration so that the head stands for itself, even where it shares the weights of the embedding.

    An engine that is given other weights while it runs (vLLM 0.32) goes on with the old head where the two are tied.

    Args:
        llm: The language model.
        folder: That exists.
        dtype: Of the weights in the file; None is that in memory.
    """
    config = llm.config.to_dict() | {
        "tie_word_embeddings": False,
        "architectures": [type(llm).__name__],
    }
    state = llm.state_dict()
    weights = {k: v.to(dtype or v.dtype).cpu().clone().contiguous() for k, v in state.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    (folder / "config.json").write_text(text, encoding="utf-8")


def _hash(decoder: CaptionDecoder) -> str:
    config = {k: v for k, v in decoder.llm.config.to_dict().items() if k not in _NOT_THE_MODEL}
    digest = hashlib.sha256(weights_hash(decoder.llm).encode())
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:_HASH_LENGTH]


def _write(decoder: CaptionDecoder, folder: Path, untied: bool) -> None:
    """Write a folder that others may write at the same time: the first one stays."""
    temporary = temporary_beside(folder)
    try:
        temporary.mkdir(parents=True)
        with quiet_loading():
            if untied:
                write_untied(decoder.llm, temporary)
            else:
                decoder.llm.save_pretrained(temporary)
            decoder.tokenizer.save_pretrained(temporary)
        # what a model recommends for sampling would change what was asked for
        (temporary / "generation_config.json").unlink(missing_ok=True)
        sync_tree(temporary)
        temporary.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise OutputError(f"{folder} cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
