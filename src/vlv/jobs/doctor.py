"""Checks of the installation; each says what it found, and how to mend what is bad."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vlv.models.folder import released_folder, released_names
from vlv.models.placement import pick_device, pick_dtype
from vlv.models.released import is_cached, released_model

OLDEST_PYTHON = (3, 11)
ENOUGH_ROOM = 15e9  # bytes: the models of the paper, with room to spare


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        good: Whether vlv can work with it.
        text: What was found, and where it is bad what to do.
        lacks: Whether something optional is missing.
    """

    good: bool
    text: str
    lacks: bool = False


def examine() -> list[Finding]:
    """All checks, in the order in which trouble is best looked for."""
    findings = [_python(), *_packages(), _torchvision(), *_cache(), *_released()]
    return [*findings, _device(), *_extras()]


def _python() -> Finding:
    found = platform.python_version()
    good = sys.version_info >= OLDEST_PYTHON
    mend = "" if good else f"; vlv needs {'.'.join(map(str, OLDEST_PYTHON))} or newer"
    return Finding(good, f"python {found} on {sys.platform}{mend}")


# --- packages -------------------------------------------------------------------------------------


def requirements(extra: str | None = None) -> dict[str, str]:
    """Packages that vlv needs, or that one of its extras adds, and the versions that fit."""
    found = {}
    for need in map(Requirement, _declared()):
        always = need.marker is None or need.marker.evaluate({"extra": ""})
        added = need.marker is not None and need.marker.evaluate({"extra": extra or ""})
        if always if extra is None else added and not always:
            found[need.name] = str(need.specifier)
    return found


def _declared() -> list[str]:
    """What the installed vlv declares to need; nothing where it runs from its sources alone."""
    try:
        return metadata.requires("vlv") or []
    except metadata.PackageNotFoundError:
        return []


def version_of(package: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def fits(version: str, wanted: str) -> bool:
    """Whether a version lies in a range such as ``>=2.6,<3``.

    >>> fits("2.13.0+cpu", ">=2.6,<3"), fits("3.0", ">=2.6,<3"), fits("2.5", ">=2.6,<3")
    (True, False, False)
    """
    return SpecifierSet(wanted).contains(version, prereleases=True)


def _packages() -> Iterator[Finding]:
    own = version_of("vlv")
    mend = "" if own else ", so the versions it needs are not known; pip install -e ."
    yield Finding(own is not None, f"vlv {own or 'is not installed'}{mend}")
    for package, wanted in requirements().items():
        version = version_of(package)
        good = version is not None and fits(version, wanted)
        mend = "" if good else f'; pip install "{package}{wanted}"'
        yield Finding(good, f"{package} {version or 'is missing'} ({wanted or 'any'}){mend}")


def _torchvision() -> Finding:
    """A torchvision made for another torch: its mere presence breaks transformers and diffusers."""
    version = version_of("torchvision")
    if version is None and importlib.util.find_spec("torchvision") is None:
        return Finding(True, "torchvision is not installed, and not needed")
    error = _import_error("torchvision")
    if error is None:
        return Finding(True, f"torchvision {version} fits torch {torch.__version__}")
    kind = "CUDA" if torch.version.cuda else "CPU"
    return Finding(
        False,
        f"torchvision {version} was not made for the {kind} torch {torch.__version__} beside it ({error}), which breaks "
        "transformers and diffusers; remove it (pip uninstall torchvision), or install the build that matches torch "
        "(for a CPU torch: pip install torchvision --index-url https://download.pytorch.org/whl/cpu)",
    )


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def _extras() -> Iterator[Finding]:
    """The optional packages, and how to get those that are missing; that is no fault."""
    installed = version_of("vlv") is not None
    names = metadata.metadata("vlv").get_all("Provides-Extra") if installed else None
    for extra in names or []:
        missing = [
            f"{package} {version or 'is missing'}"
            for package, wanted in requirements(extra).items()
            if (version := version_of(package)) is None or not fits(version, wanted)
        ]
        state = f'{", ".join(missing)}; pip install "vlv[{extra}]"' if missing else "complete"
        yield Finding(True, f"extra [{extra}]: {state}", bool(missing))


# --- the machine ----------------------------------------------------------------------------------


def _cache() -> Iterator[Finding]:
    """Where downloads go, whether they fit, and whether they are allowed."""
    cache = Path(constants.HF_HUB_CACHE)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(there).free
    models = sorted(cache.glob("models--*")) if cache.is_dir() else []
    text = f"hub cache {cache}: {len(models)} models, {free / 1e9:.1f} GB free"
    if not os.access(there, os.W_OK):
        yield Finding(False, f"{text}, and not writable; set HF_HOME to a folder that is yours")
    else:
        short = "" if free >= ENOUGH_ROOM else " (little for real models: set HF_HOME elsewhere)"
        yield Finding(True, text + short)
    if constants.HF_HUB_OFFLINE:
        yield Finding(True, "HF_HUB_OFFLINE is set: only cached models and folders can be used")


def _released() -> Iterator[Finding]:
    """Models that others have released, and whether they are here."""
    for name in released_names():
        folder = released_folder(name)
        here = f"in {folder}" if is_cached(name) else "not downloaded, which is no fault"
        yield Finding(True, f"{name} ({released_model(name).about}): {here}")


def _device() -> Finding:
    """What auto stands for here; a GPU that torch cannot use is worth a word."""
    device = pick_device("auto")
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    text = f"auto is {device} in {dtype}, {torch.get_num_threads()} threads"
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        text += f", {torch.cuda.get_device_name(0)} with {memory / 1e9:.0f} GB"
    elif shutil.which("nvidia-smi") and torch.version.cuda is None:
        return Finding(
            False, f"{text}: there is an NVIDIA GPU, but torch is a CPU build; install one for CUDA"
        )
    return Finding(True, text)
