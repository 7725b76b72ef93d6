"""Running the command line in this process, and images for it."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vlv.cli import main, run


@pytest.fixture(autouse=True)
def read_once(models_read_once: None) -> None:
    """Every command reads a model; what matters here is what it does with it."""


class Result(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


Vlv = Callable[..., Result]


@pytest.fixture
def vlv(capsys: pytest.CaptureFixture[str]) -> Vlv:
    """Run `vlv ARGUMENTS`; every failure must be one sentence without a traceback."""

    def command(*arguments: object) -> Result:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        result = Result(code, *capsys.readouterr())
        assert "Traceback" not in result.err
        if code == 1:
            assert result.err.strip().splitlines()[-1].startswith("vlv: ")
        return result

    return command


def start(*arguments: object) -> BaseProcess:
    """Run `vlv ARGUMENTS` in a process forked from this one, which has imported everything."""
    words = [str(argument) for argument in arguments]
    process = multiprocessing.get_context("fork").Process(target=_command, args=(words,))
    process.start()
    return process


def _command(arguments: list[str]) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    sys.argv = ["vlv", *arguments]
    main()


RunScript = Callable[..., list[Result]]

_CLIENT = """#!/bin/sh
[ "$1" = -m ] && shift 2
{ pwd; printf '%s\\n' "$@"; } > ASKED
read -r code < ANSWERED
exit "$code"
"""


@pytest.fixture
def run_script(vlv: Vlv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunScript:
    """Run a script to its end; its commands `vlv` and `$PYTHON -m vlv` run here, where everything is imported."""
    folder = tmp_path / "client"
    folder.mkdir()
    asked, answered, client = (folder / name for name in ("asked", "answered", "vlv"))
    os.mkfifo(asked)
    os.mkfifo(answered)
    client.write_text(_CLIENT.replace("ASKED", str(asked)).replace("ANSWERED", str(answered)))
    client.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"

    def run_it(script: Path, cwd: Path, *arguments: str, **environment: str) -> list[Result]:
        results: list[Result] = []
        known = os.environ | {"PATH": path, "PYTHON": str(client)} | environment
        ending = ["sh", "-c", f'"$@"; code=$?; : > {asked}; exit $code', "sh"]
        with subprocess.Popen([*ending, script, *arguments], cwd=cwd, env=known) as process:
            while words := asked.read_text().splitlines():
                with monkeypatch.context() as patch:
                    patch.chdir(words[0])
                    results.append(vlv(*words[1:]))
                answered.write_text(f"{results[-1].code}\n")
        assert process.returncode == 0, [result.err for result in results]
        return results

    return run_it


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (32, 32)) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of five images, one of them in a subfolder."""
    for number in range(4):
        write_image(tmp_path / "photos" / f"{number}.png", number)
    write_image(tmp_path / "photos" / "more" / "4.jpg", 4, (50, 40))
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def ingredients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Florence-2, diffusion decoder and language model as folders; images with captions."""
    folder = tmp_path_factory.mktemp("ingredients")
    parts = tiny.make_parts()
    parts.florence.save_pretrained(folder / "florence")
    parts.florence_tokenizer.save_pretrained(folder / "florence")
    parts.llm.save_pretrained(folder / "llm")
    parts.llm_tokenizer.save_pretrained(folder / "llm")
    for name in ("text_encoder", "tokenizer", "unet", "vae", "scheduler"):
        getattr(parts, name).save_pretrained(folder / "decoder" / name)
    for number in range(10):
        where = folder / ("train" if number < 6 else "held_out")
        write_image(where / f"{number}.png", number).with_suffix(".txt").write_text(
            tiny.CAPTIONS[number % len(tiny.CAPTIONS)]
        )
    return folder
