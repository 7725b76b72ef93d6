"""Low-rank adapters (LoRA) of a language model: peft makes, writes, reads and merges them.

The layers lie inside the model, as peft injects them; the weights below stay as they are. peft is optional, `vlv[lora]`.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vlv.errors import ConfigError, ModelFolderError
from vlv.models.vetting import naming, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlv.config import LoraConfig

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MOST_RANKS = 1024
_MATRICES = {"lora_A", "lora_B"}
_PREFIX = "base_model.model."
"""Before each name in the files of peft."""
_READ = {"r", "lora_alpha", "target_modules", "use_rslora", "fan_in_fan_out", "peft_type"}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "peft_version",
    "revision",
    "task_type",
}
"""Settings of an adapter's file that change nothing in a finished one."""


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(
            f'adapters need peft ({" ".join(str(error).split())}); install it with pip install "vlv[lora]"'
        ) from error


# --- training -------------------------------------------------------------------------------------


def low_rank_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a module's adapters, by name; empty where it has none."""
    named = module.named_parameters()
    return {name: p for name, p in named if _MATRICES & set(name.split("."))}


def let_train(module: nn.Module, wanted: bool) -> None:
    """Let a module train or rest: all of it, or where it has adapters these alone."""
    adapters = low_rank_parameters(module)
    module.requires_grad_(wanted and not adapters)
    for parameter in adapters.values():
        parameter.requires_grad_(wanted)


def add_low_rank(model: PreTrainedModel, settings: LoraConfig, seed: int) -> None:
    """Put fresh adapters, which change nothing yet, into a language model; one that has adapters keeps them.

    Args:
        model: Changed in place.
        settings: Rank, scale, dropout, and which layers get one.
        seed: Of the first weights.

    Raises:
        ConfigError: peft is missing, or the model has no such layers.
    """
    peft = _peft()
    if low_rank_parameters(model):
        return
    targets = settings.targets
    if targets != "all-linear":
        known = _linear_names(model)
        for name in targets:
            if name not in known:
                raise ConfigError(
                    f"lora.targets names {name!r:.60}, which is no linear layer of {type(model).__name__}; it has "
                    f"{', '.join(sorted(known))}"
                )
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),
    )
    with _set_apart(seed):
        peft.inject_adapter_in_model(config, model)
    for parameter in low_rank_parameters(model).values():
        parameter.data = parameter.data.float()  # whatever the layers below are held in


def _linear_names(model: PreTrainedModel) -> set[str]:
    """Last names of the linear layers, without the output layer, which may share its weights with the embeddings."""
    head = model.get_output_embeddings()
    return {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head
    }


@contextmanager
def _set_apart(seed: int) -> Iterator[None]:
    """Let peft draw first weights from the global generator, which goes on as if it had not, and ask for what is deprecated."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        yield


# --- files ----------------------------------------------------------------------------------------


def save_low_rank(model: PreTrainedModel, folder: Path, base_name: str) -> None:
    """Write the adapters of a model as peft reads them.

    Args:
        model: With adapters.
        folder: Gets `adapter_config.json` and `adapter_model.safetensors`.
        base_name: Of the model that they belong to, for the reader.
    """
    peft, injected = _peft(), cast("Any", model).peft_config["default"]
    config = peft.LoraConfig(**injected.to_dict())
    config.base_model_name_or_path, config.inference_mode = base_name, True
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(folder)
    found = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(
        {f"{_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in found.items()},
        folder / WEIGHTS_NAME,
        {"format": "pt"},
    )


def merge_low_rank(model: PreTrainedModel, folder: Path) -> None:
    """Add the adapters in a folder to the weights of a model, which is an ordinary one afterwards.

    Raises:
        ConfigError: peft is missing.
        ModelFolderError: The adapters do not fit the model, or hold what is not read here.
    """
    peft, settings = _peft(), read_settings(folder / CONFIG_NAME)
    weights = read_weights(folder / WEIGHTS_NAME)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.is_stabilised,
        target_modules=list(settings.targets),
        fan_in_fan_out=settings.is_transposed,
    )
    with naming("adapter", folder), _set_apart(seed=0):
        wrapped = peft.PeftModel(model, config)
        _check_shapes(wrapped, weights, folder)
        peft.set_peft_model_state_dict(wrapped, weights)
        wrapped.merge_and_unload(safe_merge=True)


def _check_shapes(wrapped: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    own = {
        name.replace(".default.", "."): tuple(parameter.shape)
        for name, parameter in low_rank_parameters(wrapped).items()
    }
    for name in sorted(own.keys() | weights.keys()):
        there = tuple(weights[name].shape) if name in weights else "nothing"
        if there != own.get(name):
            raise ModelFolderError(
                f"the adapter {folder} holds {there} for {name.removeprefix(_PREFIX)!r:.100}, where the model has "
                f"{own.get(name, 'nothing')}; name its base with --model, or copy the adapter again"
            )


@dataclass(frozen=True)
class Saved:
    """What a finished adapter says of itself."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Names of layers, or ends of them."""
    is_stabilised: bool = False
    """Whether it is scaled by the root of its rank (rsLoRA)."""
    is_transposed: bool = False
    """Whether its layers hold their weights as GPT-2 does."""


def read_settings(path: Path) -> Saved:
    """The settings of a finished adapter, from a file that a stranger may have written.

    Only plain LoRA is read: what else peft knows may import modules or start from other weights.

    Raises:
        ModelFolderError: It is missing, damaged, or asks for more than that.
    """
    values = read_config(path)
    usual = _peft().LoraConfig().to_dict()
    if values.get("peft_type") != "LORA":
        raise ModelFolderError(
            f"{path}: peft_type is {values.get('peft_type')!r:.60}, and only LORA is read"
        )
    for name, value in values.items():
        if name not in _READ | _WITHOUT_EFFECT and value and value != usual.get(name):
            raise ModelFolderError(
                f"{path} sets {name:.60} to {value!r:.60}, which is not read; train the adapter without"
            )
    rank, alpha, targets = (values.get(name) for name in ("r", "lora_alpha", "target_modules"))
    flags = [values.get(name, False) for name in ("use_rslora", "fan_in_fan_out")]
    match rank, alpha, targets, flags:
        case int(rank), int(alpha) | float(alpha), [_, *_], [bool(root), bool(transposed)]:
            named = all(isinstance(name, str) and name for name in targets)
            if named and 0 < rank <= MOST_RANKS and 0 < alpha < math.inf and rank is not True:
                return Saved(rank, alpha, tuple(targets), root, transposed)
    raise ModelFolderError(
        f"{path}: r, lora_alpha and target_modules are {rank!r:.60}, {alpha!r:.60} and {targets!r:.60}, but a number up to "
        f"{MOST_RANKS}, a number and names of layers are wanted; copy the adapter again"
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of an adapter.

    Raises:
        ModelFolderError: It is missing or damaged, or holds numbers that are none.
    """
    if not path.is_file():
        raise ModelFolderError(f"{path} is missing; copy the adapter again")
    try:
        weights = load_file(path)
        bad = [name for name, tensor in weights.items() if not tensor.float().isfinite().all()]
    except Exception as error:  # no list of what the library throws is complete
        reason = " ".join(str(error).split())[:200]
        raise ModelFolderError(f"{path} is damaged ({reason}); copy the adapter again") from error
    if bad:
        raise ModelFolderError(f"{path}: {bad[0]!r:.100} holds NaN or infinity; train it again")
    return weights
