"""Running the command line in this process, and images for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests import tiny
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
