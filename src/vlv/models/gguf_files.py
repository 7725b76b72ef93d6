"""Language models in GGUF files, as llama.cpp has them: converted once into a plain folder of the cache.

The weights of such a file are quantised. They are unpacked into half precision, and what is trained or run is a language model
like any other.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from vlv.errors import ConfigError, ModelFolderError
from vlv.models.folder import quiet_loading
from vlv.models.vetting import naming
from vlv.storage import replacing_folder

if TYPE_CHECKING:
    from vlv.config import PartSource

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_HASH_LENGTH = 16


def gguf_cache() -> Path:
    """Where converted files are kept."""
    return Path(constants.HF_HOME) / "vlv" / "gguf"


def unpacked(source: PartSource) -> PartSource:
    """The source itself, or in place of a GGUF file the folder that it was converted into.

    Raises:
        ModelFolderError: The file is missing, none, or of a model that transformers does not read.
        ConfigError: What reads such files is not installed.
        OutputError: The disk refuses.
    """
    if not source.path.endswith(SUFFIX) or Path(source.path).expanduser().is_dir():
        return source
    folder = converted(Path(source.path).expanduser())
    return source.model_copy(update={"path": str(folder), "subfolder": None, "variant": None})


def converted(file: Path, cache: Path | None = None) -> Path:
    """The folder of weights (float16), configuration and tokenizer that a GGUF file was converted into.

    Its name is a hash of the file: another file of the same name is converted anew.

    Args:
        file: One file; what was split into several is not read.
        cache: Where the folder is; None is `gguf_cache`.

    Raises:
        ModelFolderError: The file is missing, none, or of a model that transformers does not read.
        ConfigError: What reads such files is not installed.
        OutputError: The disk refuses.
    """
    try:
        with file.open("rb") as opened:
            if opened.read(len(_MAGIC)) != _MAGIC:
                raise ModelFolderError(
                    f"{file} is no GGUF file, for it begins otherwise; copy it again"
                )
            opened.seek(0)
            name = hashlib.file_digest(opened, "sha256").hexdigest()[:_HASH_LENGTH]
    except OSError as error:
        raise ModelFolderError(f"{file} cannot be read ({error.strerror or error})") from error
    folder = (cache or gguf_cache()) / f"{file.stem}-{name}"
    if not folder.is_dir():
        _convert(file, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f'{file} is a GGUF file; pip install "vlv[gguf]" to read it')
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    with naming("llm", file), quiet_loading():
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float16, use_safetensors=True, trust_remote_code=False, **where
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False, **where)
        # Its weights are plain by now; transformers would refuse to save a model that calls itself quantised.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    with replacing_folder(folder) as temporary, quiet_loading():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
