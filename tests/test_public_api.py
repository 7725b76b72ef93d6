"""The public surface: every name loads, nothing is public by accident, importing is quick."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import vlv
from tests.cli.conftest import write_image


def test_every_public_name_loads_and_is_documented() -> None:
    for name in vlv.__all__:
        value = getattr(vlv, name)
        if name != "__version__":
            assert inspect.getdoc(value), f"{name} has no docstring"
            assert value.__module__.startswith("vlv."), name
    assert sorted(vlv.__all__) == vlv.__all__ == dir(vlv)


def test_all_errors_are_public() -> None:
    from vlv import errors

    found = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert found <= set(vlv.__all__)
    assert all(issubclass(getattr(vlv, name), vlv.VLVError) for name in found)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'VLVPipelin'"):
        vlv.VLVPipelin  # type: ignore[attr-defined]  # noqa: B018


def test_version_is_that_of_the_package() -> None:
    assert vlv.__version__ == importlib.metadata.version("vlv")


def test_import_and_help_load_no_heavy_library() -> None:
    code = (
        "import sys, vlv, vlv.cli; vlv.cli.run(['caption', '--help']); "
        "print([m for m in ('torch', 'transformers', 'diffusers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_importing_is_quick_and_silent(tiny_folder: Path, tmp_path: Path) -> None:
    """In a fresh process, which then writes a caption with fewer bits: nor do the packages for that say a word."""
    code = (
        "import sys, time; start = time.process_time(); import vlv; dir(vlv); "
        "took = time.process_time() - start; "
        "heavy = {'numpy', 'torch', 'transformers', 'diffusers', 'torchao', 'bitsandbytes'}; "
        "print(took < 1.5, sorted(heavy & sys.modules.keys())); vlv.VLVPipeline; "
        "print('imported', file=sys.stderr); from vlv.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    write_image(tmp_path / "a.png")
    few_bits = ["--llm-bits", "8"] if importlib.util.find_spec("torchao") else []
    caption = ["caption", tmp_path, "--model", tiny_folder, "--max-new-tokens", "5", *few_bits]
    result = subprocess.run(
        [sys.executable, "-c", code, *caption], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("True []\n")
    imported, done = result.stderr.splitlines()
    assert imported == "imported"
    assert done.startswith("done 1, ")


def test_module_and_script_are_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "vlv", "caption"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("vlv: Missing argument")
