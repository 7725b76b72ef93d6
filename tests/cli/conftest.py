"""Running the command line in this process, and images for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from vlv.cli import run


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
