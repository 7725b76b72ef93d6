"""What must not change by restructuring: figures of the shipped model, of 20 training steps, and of the data commands.

Everything goes through the command line and the public names. Values are compared with a tolerance that other
processors keep, not by hashes. A wanted change records new values, in a commit of its own that says why:

    python -m tests.test_golden
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests import tiny
from vlv import VLVPipeline
from vlv.cli import run
from vlv.toyworld.render import render
from vlv.toyworld.scene import sample_scene

GOLDEN = Path(__file__).with_suffix(".json")
RELATIVE = 2e-4


def vlv(*arguments: object) -> None:
    assert run([str(argument) for argument in arguments]) in (0, 2)


def digest(tensor: torch.Tensor) -> list[float]:
    """Mean, spread and two fixed projections: a change anywhere shows."""
    values = tensor.detach().double().flatten()
    places = torch.arange(
        len(values), dtype=torch.float64
    )  # the cosine of many turns, in float32, is the processor's own
    waves = [torch.cos(places * step) for step in (0.37, 1.91)]
    return [float(values.mean()), float(values.std()), *(float(values @ w) for w in waves)]


def shipped_model(_: Path) -> dict[str, Any]:
    """Captions, z, context and reconstructions of vlv-tiny on four scenes."""
    pipe = VLVPipeline.from_pretrained("vlv-tiny")
    images = [render(sample_scene(7, index, "test")).image for index in range(4)]
    z = pipe.embed(images)
    mixed = pipe.mix([images[0], images[1]], weights=[0.5, 0.5], mode="slerp")
    reconstructions = [pipe.reconstruct(z=one, seed=3, steps=4) for one in (z[0], mixed)]
    generated = pipe.generate("A red cube.", seed=1, steps=4)
    return {
        "captions": pipe.caption(images),
        "z": digest(z),
        "mixed": digest(mixed),
        "pixels": [
            digest(pixels(pipe, pipe.context(one), 3, image))
            for one, image in zip((z[0], mixed), reconstructions, strict=True)
        ],
        "generated": digest(
            pixels(pipe, pipe.decoder.encode_text(["A red cube."]).c, 1, generated)
        ),
    }


def pixels(
    pipe: VLVPipeline, c: torch.Tensor, seed: int, image: Image.Image, steps: int = 4
) -> torch.Tensor:
    """What an image was before it was rounded to 256 colours: there another processor may come to the next one."""
    (drawn,) = pipe.decoder.sample(
        c, seeds=[seed], steps=steps, height=pipe.image_size, width=pipe.image_size
    )
    shown = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert (drawn * 255 - shown).abs().max() <= 0.5 + 1e-3
    return drawn


def write_parts(folder: Path) -> None:
    """Florence-2, decoder and language model with random weights; ten captioned images."""
    parts = tiny.make_parts()
    for name, tokenizer in (("florence", "florence_tokenizer"), ("llm", "llm_tokenizer")):
        getattr(parts, name).save_pretrained(folder / name)
        getattr(parts, tokenizer).save_pretrained(folder / name)
    for name in ("text_encoder", "tokenizer", "unet", "vae", "scheduler"):
        getattr(parts, name).save_pretrained(folder / "decoder" / name)
    for number in range(10):
        path = folder / ("train" if number < 8 else "held_out") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text(tiny.CAPTIONS[number % len(tiny.CAPTIONS)])


def train(folder: Path, stage: str, model: dict[str, Any], settings: dict[str, Any]) -> Path:
    config = {
        "stage": stage,
        "model": {"decoder": str(folder / "decoder")} | model,
        "data": {
            "inputs": [str(folder / "train")],
            "held_out": [str(folder / "held_out")],
            "image_size": tiny.IMAGE_SIZE,
            "num_workers": 0,
        },
        "optim": {"lr": 1e-3},
        "loop": {"steps": 20, "batch_size": 3, "log_every": 5, "trackers": [], "ema": 0.9},
        stage: settings,
    }
    (folder / f"{stage}.yaml").write_text(yaml.safe_dump(config))
    vlv("train", folder / f"{stage}.yaml", "--run-dir", folder / f"run-{stage}")
    return folder / f"run-{stage}"


def trained(run_dir: Path, *parts: str) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = ("loss", "grad_norm", "denoising_z", "denoising_null", "denoising_true")
    kept += ("held_out_caption", "held_out_denoising")
    found: dict[str, Any] = {
        "log": [{key: line[key] for key in kept if key in line} for line in lines]
    }
    for part in parts:
        weights = load_file(run_dir / "model" / part / "model.safetensors")
        found[part] = digest(torch.cat([weights[name].flatten() for name in sorted(weights)]))
    return found


def two_stages(folder: Path) -> dict[str, Any]:
    """Twenty steps of each stage: logged figures and final weights."""
    write_parts(folder)
    florence = {"florence": str(folder / "florence"), "num_queries": tiny.NUM_QUERIES}
    first = train(folder, "stage1", florence, {})
    encoder = {"encoder": str(first / "model"), "llm": str(folder / "llm")}
    second = train(folder, "stage2", encoder, {"denoising_weight": 0.5})
    return {
        "stage1": trained(first, "encoder"),
        "stage2": trained(second, "encoder", "caption_decoder"),
    }


def write_collection(folder: Path) -> None:
    """Shards of twelve images: two alike, one too small, one broken, one without a caption."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(6):
                number = shard * 6 + index
                seed = 3 if number == 7 else number
                coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
                size = (40, 40) if number == 5 else (420, 400)
                image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                data = b"torn" if number == 9 else buffer.getvalue()
                members = {"png": data, "txt": f"a caption of image number {seed}".encode()}
                if number == 10:
                    del members["txt"]
                for suffix, content in members.items():
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def kept_samples(folder: Path) -> dict[str, str]:
    """Name of every member of the shards in a folder, with the hash of its bytes."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if not member.name.endswith(".json"):
                    found[member.name] = hashlib.sha256(file.read()).hexdigest()[:16]
    return found


def data_commands(folder: Path) -> dict[str, Any]:
    """What `vlv data filter`, `pack` and `split` make of a small collection."""
    write_collection(folder / "in")
    vlv("data", "filter", folder / "in", "--config", "relaxed", "--output", folder / "clean")
    vlv(
        "data",
        "split",
        folder / "clean",
        "--output",
        folder / "split",
        "--train",
        0.6,
        "--val",
        0.2,
        "--test",
        0.2,
    )
    parts = sorted(path for path in (folder / "split").iterdir() if path.is_dir())
    return {
        "filter": kept_samples(folder / "clean"),
        "split": {part.name: kept_samples(part) for part in parts},
    }


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "shipped_model": shipped_model,
    "two_stages": two_stages,
    "data_commands": data_commands,
}


def assert_close(found: Any, wanted: Any, where: str = "") -> None:
    assert type(found) is type(wanted), where
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_close(found[key], wanted[key], f"{where}/{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for number, pair in enumerate(zip(found, wanted, strict=True)):
            assert_close(*pair, f"{where}/{number}")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=RELATIVE, abs=RELATIVE), where
    else:
        assert found == wanted, where


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "two_stages")) for n in CASES]
)
def test_golden_values(name: str, tmp_path: Path) -> None:
    found = json.loads(json.dumps(CASES[name](tmp_path)))
    assert_close(found, json.loads(GOLDEN.read_text())[name])


def record(names: list[str]) -> None:
    torch.set_num_threads(1)
    values = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            values[name] = CASES[name](Path(folder))
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    record(sys.argv[1:])
