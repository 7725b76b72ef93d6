"""``vlv info`` and ``vlv doctor``."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Annotated

import typer

from vlv.cli import common

if TYPE_CHECKING:
    from vlv.jobs.model_info import Part

PACKAGES = (
    "vlv",
    "torch",
    "transformers",
    "diffusers",
    "accelerate",
    "tokenizers",
    "numpy",
    "pillow",
)


def info(
    model: Annotated[
        str, typer.Argument(help="vlv-tiny, a model folder, or OWNER/NAME.")
    ] = common.SHIPPED_MODEL,
    revision: common.Revision = None,
) -> int:
    """Show the parts of a model, their sizes and licences, and what it knows.

    A model of the hub is looked up among the downloaded ones; nothing is fetched.
    """
    from vlv.jobs.model_info import describe_model
    from vlv.models.folder import find_folder

    about = describe_model(find_folder(model, revision=revision, local_files_only=True))
    typer.echo(f"{model}  ({about.folder})")
    for part in about.parts:
        typer.echo(_line(part))
    total = sum(part.num_parameters for part in about.parts)
    size = sum(part.num_bytes for part in about.parts)
    typer.echo(f"  {'in all':<16} {'':<28} {total / 1e6:9.2f} M {size / 1e6:9.1f} MB")
    typer.echo(f"licence: {about.licence or 'the model card names none'}")
    typer.echo(f"knows:   {about.knows or 'the model card does not say'}")
    typer.echo(f"can:     {', '.join(about.commands) or 'nothing: parts are missing'}")
    return 0


def _line(part: Part) -> str:
    if part.reference:
        return f"  {part.name:<16} -> {part.reference}  {part.licence}".rstrip()
    numbers = f"{part.num_parameters / 1e6:9.2f} M {part.num_bytes / 1e6:9.1f} MB"
    return f"  {part.name:<16} {part.kind:<28} {numbers}  {'/'.join(part.dtypes):<5} {part.licence}".rstrip()


def doctor() -> int:
    """Check the installation: versions, devices, and packages that are known to break it."""
    import torch

    typer.echo(f"python {platform.python_version()} on {sys.platform}")
    for package in PACKAGES:
        typer.echo(f"{package} {metadata.version(package)}")
    typer.echo(f"device: {common.pick_device('auto')}, {torch.get_num_threads()} threads")
    if importlib.util.find_spec("torchvision") and not _imports("torchvision"):
        common.say(
            "vlv: torchvision is installed but does not fit this torch, which breaks transformers and "
            "diffusers; remove it (pip uninstall torchvision) or install the matching build"
        )
        return 1
    return 0


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except (ImportError, RuntimeError):
        return False
    return True
