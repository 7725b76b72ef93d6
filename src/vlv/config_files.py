"""YAML files and presets as nested values: reading, inheriting with `base`, and overriding on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vlv.errors import ConfigError
from vlv.storage import Json

RUNS = "presets"
MODELS = "presets/models"
RELEASED = "presets/released"


def names_in(folder: str) -> list[str]:
    """The presets in a folder of the package."""
    files = (resources.files("vlv") / folder).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def model_preset_names() -> list[str]:
    """The names of models that `load_models` knows."""
    return names_in(MODELS)


def known_repositories() -> list[Json]:
    """The repositories whose configurations are in the package."""
    files = (resources.files("vlv") / "presets" / "hub").iterdir()
    return [yaml.safe_load(file.read_text("utf-8")) for file in files]


def read_values(
    source: str | Path, overrides: Sequence[str] = (), folders: Sequence[str] = (RUNS, MODELS)
) -> tuple[Json, str]:
    """Nested values of a file or preset, and its name.

    `base: NAME` (a preset, or a file beside this one) supplies what is not said; nested values are joined, a part
    with a path is replaced as a whole, and null takes away what the base says.

    Args:
        source: Path of a YAML file, or the name of a preset.
        overrides: Changes such as `optim.lr=1e-4` or `base=paper-1.5b`.
        folders: Of the package, where presets are looked for.

    Raises:
        ConfigError: Unknown file or preset, no YAML, no settings in it, or bases in a circle.
    """
    values, name = _read_mapping(source, folders)
    first = [override for override in overrides if override.partition("=")[0].strip() == "base"]
    for override in first:
        _apply(values, override)
    values = _with_base(values, _folder_of(source), [name], folders)
    for override in overrides:
        if override not in first:
            _apply(values, override)
    return values, name


def _with_base(values: Json, folder: Path, chain: list[str], folders: Sequence[str]) -> Json:
    """Join values with those of their base, and of its base."""
    base = values.pop("base", None)
    if base is None:
        return values
    beside = folder / str(base)
    inherited, name = _read_mapping(beside if beside.is_file() else str(base), folders)
    if name in chain:
        raise ConfigError(
            f"{' -> '.join([*chain, name])}: each is the base of the next; remove one"
        )
    inherited = _with_base(inherited, _folder_of(name), [*chain, name], folders)
    return _joined(inherited, values)


def _joined(base: Json, values: Json) -> Json:
    joined = dict(base)
    for key, value in values.items():
        old = joined.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and "path" not in value:
            joined[key] = _joined(old, value)
        elif isinstance(old, dict) and value is None:
            del joined[key]  # its default comes back: nothing, whether that is written null or {}
        else:
            joined[key] = value
    return joined


def _folder_of(source: str | Path) -> Path:
    return Path(source).parent if Path(source).is_file() else Path()


def _read_mapping(source: str | Path, folders: Sequence[str]) -> tuple[Json, str]:
    text, name = _read(source, folders)
    values = _parse_yaml(text, name)
    if not isinstance(values, dict):
        raise ConfigError(
            f"{name} holds no settings; it should be a YAML mapping such as a preset's"
        )
    return values, name


def _read(source: str | Path, folders: Sequence[str]) -> tuple[str, str]:
    """Text and name of a YAML file or preset."""
    path = Path(source)
    if path.is_file():
        return path.read_text(encoding="utf-8"), str(path)
    for folder in folders:
        if str(source) in names_in(folder):
            preset = resources.files("vlv") / folder / f"{source}.yaml"
            return preset.read_text("utf-8"), str(source)
    known = [name for folder in folders for name in names_in(folder)]
    near = difflib.get_close_matches(str(source), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"the presets are {', '.join(known)}"
    raise ConfigError(f"there is no file or preset {str(source)!r}; {hint}")


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is no valid YAML: {' '.join(str(error).split())}") from error


def _apply(values: Json, override: str) -> None:
    """Set one `a.b=c` in nested values; of a part that is named by its path alone, `revision` and the like too."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{override!r} is no setting; write it as optim.lr=1e-4")
    *path, last = key.strip().split(".")
    for depth, name in enumerate(path):
        if values.get(name) is None:
            values[name] = {}
        elif path[0] == "model" and depth == 1 and isinstance(values[name], str):
            values[name] = {"path": values[name]}
        values = values[name]
        if not isinstance(values, dict):
            raise ConfigError(f"{override!r} sets something below {name}, which is a single value")
    values[last] = _parse_yaml(text, override)
