"""What is refused of a model folder before a library sees it: a stranger may have made it.

Code, pickles and special files; weights that lead out of the folder; classes that are none of the libraries'; numbers
that make no sense; and models larger than the memory of this machine. Each is one ModelFolderError that names the file.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import RopeParameters
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vlv.data.foreign import decode_text, parse_object, printable, read_file
from vlv.errors import ConfigError, DataError, ModelFolderError, VLVError
from vlv.storage import Json

MEMORY_VARIABLE = "VLV_MEMORY_GB"
"""Environment variable that says how large a model may be, in place of the memory of this machine."""

_CONFIG_BYTES = 2**24
_LARGEST = 2**27
_MOST_LAYERS = 1000
_LAYERS = ("layers", "depth", "num_blocks")
"""Parts of the names of counts, each of which is a module that has to be built."""
_SIZES = ("_dim", "_model", "_size", "channels", "layers", "attention_heads")
"""Ends of names that a library may call optional, and still needs."""
_POSITIVE = ("_dim", "_model", "_size", "channels", "heads", "groups")
"""Ends of names of sizes and numbers of parts, where 0 is none."""
_CODE = ("auto_map", "custom_pipelines")
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")


def read_json(path: Path) -> Json:
    """The JSON object in a file of a model folder.

    Raises:
        ModelFolderError: It is missing, no regular file, or damaged.
    """
    name = printable(path)
    try:
        return parse_object(decode_text(read_file(path, _CONFIG_BYTES), name), name)
    except DataError as error:
        raise ModelFolderError(f"{error}; copy the model again") from error


def read_config(path: Path) -> Json:
    """The configuration in a file of a model folder.

    Raises:
        ModelFolderError: It cannot be read, names code, or holds a number that is none.
    """
    values = read_json(path)
    _refuse_code(values, path)
    return values


def _refuse_code(value: object, path: Path, where: str = "") -> None:
    """Refuse what names code, at any depth, and numbers that are none."""
    if isinstance(value, float) and not math.isfinite(value):
        field = where.removeprefix(".")
        raise ModelFolderError(f"{path} holds the number {value} ({field}); copy the model again")
    if isinstance(value, list):
        for inner in value:
            _refuse_code(inner, path, where)
    if isinstance(value, dict):
        for name, inner in value.items():
            kernel = name.startswith(_KERNELS) and "/" in str(inner)
            if (name in _CODE and inner) or kernel:
                raise ModelFolderError(
                    f"{path} names code ({name} is {_short(inner)}), which is never run; take a model without"
                )
            _refuse_code(inner, path, f"{where}.{name}"[:200])


def check_files(folder: Path) -> None:
    """Refuse special files, adapters, shards outside the folder, and configurations that name code or foreign classes.

    Raises:
        ModelFolderError: There is one.
    """
    for path in sorted(folder.rglob("*")):
        if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
            raise ModelFolderError(f"{path} is no regular file; copy the model again")
        if path.name == "adapter_config.json":
            raise ModelFolderError(f"{path} names an adapter; merge it into the weights first")
        if path.name.endswith(".index.json"):
            _check_shards(path)
        elif path.name.endswith("config.json"):
            config = read_config(path)
            if path.name == "tokenizer_config.json":
                _check_tokenizer(config, path)


def _check_shards(path: Path) -> None:
    shards = read_config(path).get("weight_map")
    if not isinstance(shards, dict):
        raise ModelFolderError(f"{path} has no weight_map; copy the model again")
    for name in shards.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelFolderError(
                f"{path} names the shard {_short(name)} outside its folder; copy the model again"
            )


def _check_tokenizer(config: Mapping[str, object], path: Path) -> None:
    name = config.get("tokenizer_class")
    kind = getattr(transformers, str(name), None)
    if name is not None and not (
        isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerBase)
    ):
        raise ModelFolderError(
            f"{path}: the tokenizer {_short(name)} is none of transformers; copy the model again"
        )


# --- numbers --------------------------------------------------------------------------------------


def check_values(values: Json, kind: Any, path: Path, where: str = "") -> None:
    """Compare the numbers of a configuration with what a class of transformers or diffusers says about each.

    Args:
        values: The configuration.
        kind: A model, scheduler or configuration class.
        path: Its file, for the error.
        where: Dotted name of the values within the file.

    Raises:
        ModelFolderError: A number is missing, of another kind, negative where none can be, or absurdly large.
    """
    kind = getattr(kind, "config_class", None) or kind
    for name, (hint, default) in _fields(kind).items():
        if name in values and (wanted := _wanted(name, values[name], hint, default)):
            raise ModelFolderError(
                f"{path}: {where}{name} is {_short(values[name])}, but {wanted} is wanted; copy the model again"
            )
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(values.get(name), dict):
            _check_rope(values[name], path, f"{where}{name}.")
    is_own = kind.__module__.startswith("vlv.") or bool(where)  # we write all of it
    for name, inner in getattr(kind, "sub_configs", {}).items():
        if is_own and not values.get(name):
            raise ModelFolderError(f"{path} has no {where}{name}; copy the model again")
        if isinstance(values.get(name), dict):
            check_values(
                values[name], _config_class(inner, values[name], path), path, f"{where}{name}."
            )


def _check_rope(values: Json, path: Path, where: str) -> None:
    """Compare the numbers of rotary positions; a layer type may have some of its own."""
    hints = get_type_hints(RopeParameters)
    for name, value in values.items():
        if isinstance(value, dict) and name not in hints:
            _check_rope(value, path, f"{where}{name}.")
            continue
        wanted = _wanted(name, value, hints[name], 1.0) if name in hints else None
        if value == 0 and name.endswith(("theta", "factor")):
            wanted = "a number above 0"
        if wanted:
            raise ModelFolderError(
                f"{path}: {where}{name} is {_short(value)}, but {wanted} is wanted; copy the model again"
            )


def _config_class(kind: Any, values: Mapping[str, object], path: Path) -> Any:
    if kind is not AutoConfig:
        return kind
    name = values.get("model_type")
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        raise ModelFolderError(
            f"{path}: the model type {_short(name)} is none of transformers; copy the model again"
        )
    return CONFIG_MAPPING[name]


def _fields(kind: Any) -> dict[str, tuple[Any, Any]]:
    """Type and default of each setting of a class."""
    names = {"torch": torch}
    if issubclass(kind, PreTrainedConfig):
        hints = get_type_hints(kind, localns=names)
        return {f.name: (hints[f.name], getattr(kind, f.name, None)) for f in dataclasses.fields(kind)}  # fmt: skip
    hints = get_type_hints(kind.__init__, localns=names)
    parameters = inspect.signature(kind.__init__).parameters
    return {name: (hints[name], parameters[name].default) for name in hints if name in parameters}


def _wanted(name: str, value: object, hint: Any, default: object) -> str | None:
    """What is wanted instead of a value; None where it will do."""
    kinds = set(_alternatives(hint))
    scalars, lists = kinds & {int, float}, kinds & {list, tuple}
    numbers = scalars or ({int, float} & set(_inside(hint)) if lists else set())
    if not numbers:  # no number, so the library has to know
        return _wanted_text(value, kinds, default)
    if value is None:
        fits = default is None or (NoneType in kinds and not name.endswith(_SIZES))
    elif isinstance(value, list):
        fits = bool(lists) and (bool(value) or not default)
        if fits:
            return _first(_wanted_number(name, x, {int, float} & set(_inside(hint)), 0) for x in _leaves(value))  # fmt: skip
    elif isinstance(value, str | dict | bool):
        fits = type(value) in kinds
    else:
        fits = bool(scalars)
    if not fits:
        return "a number" if scalars else "a list of numbers"
    return _wanted_number(name, value, scalars, default) if isinstance(value, int | float) else None


def _wanted_text(value: object, kinds: set[Any], default: object) -> str | None:
    """As `_wanted`, where texts and lists of them are known; None leaves it to the library."""
    if value is None and (default is None or NoneType in kinds):
        return None
    if kinds <= {str, Literal, NoneType}:
        return None if isinstance(value, str) else "a text"
    if kinds <= {list, tuple, NoneType}:
        return None if isinstance(value, list) else "a list"
    return None


def _wanted_number(name: str, value: object, kinds: set[Any], default: object) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None if value is None else "a number"
    if float not in kinds and not isinstance(value, int):
        return "a whole number"
    can_be_negative = default is None or (isinstance(default, int | float) and default < 0)
    if value < 0 and not can_be_negative and not name.endswith("_id"):
        return "a number of 0 or more"
    if value == 0 and name.endswith(_POSITIVE) and isinstance(default, int) and default > 0:
        return "a number of 1 or more"
    limit = _MOST_LAYERS if any(part in name for part in _LAYERS) else _LARGEST
    return f"a number of {limit} or less" if isinstance(value, int) and value > limit else None


def _first(found: Iterator[str | None]) -> str | None:
    return next((wanted for wanted in found if wanted), None)


def _leaves(values: list[Any]) -> Iterator[object]:
    for value in values:
        yield from _leaves(value) if isinstance(value, list) else [value]


def _alternatives(hint: Any) -> Iterator[Any]:
    """The types of a union, without what stands in brackets."""
    if get_origin(hint) in (Union, UnionType):
        for inner in get_args(hint):
            yield from _alternatives(inner)
    else:
        yield get_origin(hint) or hint


def _inside(hint: Any) -> Iterator[Any]:
    """The types that the lists and tuples of a hint hold."""
    for inner in get_args(hint):
        yield from _alternatives(inner)
        yield from _inside(inner)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


# --- size -----------------------------------------------------------------------------------------


def num_parameters(module: nn.Module) -> int:
    """Numbers in the weights; shared ones count once."""
    return sum(math.prod(p.shape) for p in module.parameters())


def predicted_bytes(values: Mapping[str, object], kind: Any, dtype: torch.dtype) -> int:
    """Memory that the weights of a configuration will take."""
    return _num_weights(json.dumps(values, sort_keys=True), kind) * dtype.itemsize


@lru_cache(maxsize=64)  # a process often loads the same model again
def _num_weights(config: str, kind: Any) -> int:
    """Numbers in the weights of a configuration: the model is built without any."""
    values: Json = json.loads(config)
    with torch.device("meta"), no_init_weights():
        if hasattr(kind, "config_class"):
            model = kind(kind.config_class.from_dict(values))
            model.tie_weights()
        else:
            model = kind.from_config(values)
    return num_parameters(model)


def check_memory(folder: Path, needed: int) -> None:
    """Refuse a model that this machine cannot hold, before its memory is asked for.

    Raises:
        ModelFolderError: It needs more.
    """
    if needed > (memory := machine_memory()):
        raise ModelFolderError(
            f"the model {folder} needs {needed / 1e9:.1f} GB, above the {memory / 1e9:.1f} GB of this machine; "
            f"take a smaller one or another dtype, or set {MEMORY_VARIABLE} if you know better"
        )


def machine_memory() -> float:
    """Bytes of memory of this machine or of its container, or what the environment says.

    Raises:
        ConfigError: The environment says no number.
    """
    if told := os.environ.get(MEMORY_VARIABLE):
        try:
            return float(told) * 1e9
        except ValueError:
            raise ConfigError(f"{MEMORY_VARIABLE} is {told!r}; give a number") from None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no such group, or "max"
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return float(memory)


@contextmanager
def naming(name: str, folder: Path) -> Iterator[None]:
    """Turn whatever a library throws at a strange folder into one sentence.

    Raises:
        ModelFolderError: The part cannot be loaded.
    """
    try:
        yield
    except ModelFolderError:
        raise
    except Exception as error:  # no list of what a library throws is complete
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0] if isinstance(error, VLVError | OSError) else _with_kind(error, lines[0])
        raise ModelFolderError(
            f"the part {name} in {folder} cannot be loaded ({reason[:300]}); copy the model again"
        ) from error


def _with_kind(error: Exception, text: str) -> str:
    """A message that may be a bare word, such as the key of a KeyError."""
    return text if " " in text else f"{type(error).__name__}: {text}"
