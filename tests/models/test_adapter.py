"""Adapters as folders: saved, merged into their base, refused by any other model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft", reason='adapters need the package peft: pip install "vlv[lora]"')

from tests import tiny
from vlv.config import LoraConfig
from vlv.errors import ConfigError, ModelFolderError, OutputError
from vlv.models.adapter import ABOUT_NAME, base_of, language_models, save_adapter
from vlv.models.card import Training, past_trainings
from vlv.models.folder import read_index
from vlv.models.lora import WEIGHTS_NAME, add_low_rank
from vlv.models.pipeline import VLVPipeline

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("models_read_once")

TRAINING = Training("stage2", 3, 2, 6, 1e-3, "cosine", 0, "fp32", "caption decoder, by adapters")


class Adapted(NamedTuple):
    """A base and an adapter of it."""

    base: Path
    adapter: Path
    trained: VLVPipeline
    """In memory, with the adapter's layers."""


def adapted(base: Path, adapter: Path, *, encoder: bool = False) -> Adapted:
    pipe = tiny.make_pipeline()
    assert pipe.encoder is not None
    assert pipe.caption_decoder is not None
    taught = language_models(pipe.encoder if encoder else None, pipe.caption_decoder)
    for model in taught.values():
        add_low_rank(model, LoraConfig(rank=2), 0)
    pipe.encoder.trainable("language" if encoder else "none")
    pipe.caption_decoder.trainable("mlp+llm")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (*pipe.encoder.parameters(), *pipe.caption_decoder.parameters()):
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    pipe.caption_decoder.config.styles = {"short": "Short:"}
    found = base_of(read_index(base), "the-base")
    save_adapter(adapter, pipe.encoder, pipe.caption_decoder, found, TRAINING)
    return Adapted(base, adapter, pipe)


@pytest.fixture(scope="module")
def reader(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """An adapter of the caption decoder."""
    return adapted(tiny_folder, tmp_path_factory.mktemp("reader") / "adapter")


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """An adapter of the caption decoder and of the encoder."""
    return adapted(tiny_folder, tmp_path_factory.mktemp("whole") / "adapter", encoder=True)


def captions(pipe: VLVPipeline, pixels: torch.Tensor) -> list[str]:
    return pipe.caption(list(pixels), max_new_tokens=12)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["reader", pytest.param("whole", marks=pytest.mark.slow)])
def test_loaded_captions_are_those_in_memory(
    kind: str, pixels: torch.Tensor, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    made: Adapted = request.getfixturevalue(kind)
    before = bytes_of(made.base)
    pipe = VLVPipeline.from_pretrained(made.base, parts=["caption"], adapter=made.adapter)
    wanted = captions(made.trained, pixels)
    assert captions(pipe, pixels) == wanted
    assert captions(VLVPipeline.from_pretrained(made.base), pixels) != wanted
    assert pipe.caption_decoder is not None
    assert pipe.caption_decoder.styles == {"short": "Short:"}
    pipe.save_pretrained(tmp_path / "merged")
    assert captions(VLVPipeline.from_pretrained(tmp_path / "merged"), pixels) == wanted
    assert past_trainings(tmp_path / "merged") == past_trainings(made.adapter) == (TRAINING,)
    assert bytes_of(made.base) == before
    sizes = sum(path.stat().st_size for path in made.adapter.rglob("*"))
    assert sizes < (made.base / "caption_decoder" / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_the_encoder_alone_is_enough_for_z(
    whole: Adapted, reader: Adapted, pixels: torch.Tensor
) -> None:
    pipe = VLVPipeline.from_pretrained(whole.base, parts=["embed"], adapter=whole.adapter)
    torch.testing.assert_close(pipe.embed(pixels), whole.trained.embed(pixels))
    with pytest.raises(ConfigError, match="changes the caption decoder alone, which is not used"):
        VLVPipeline.from_pretrained(reader.base, parts=["embed"], adapter=reader.adapter)


@pytest.mark.slow
def test_a_copy_of_the_base_in_half_precision_is_the_base(
    reader: Adapted, pixels: torch.Tensor, tmp_path: Path
) -> None:
    pipe = VLVPipeline.from_pretrained(reader.base, parts=["caption"])
    pipe.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    half = VLVPipeline.from_pretrained(tmp_path / "half", adapter=reader.adapter)
    z = half.embed(pixels)
    loss, other = (
        decoder.loss(x.context(z).sequence, list(tiny.CAPTIONS[:3])).item()
        for x in (half, reader.trained)
        if (decoder := x.caption_decoder) is not None
    )
    assert loss == pytest.approx(other, rel=0.05)


@pytest.mark.slow
def test_a_part_that_was_only_named_is_written_out(
    reader: Adapted, pixels: torch.Tensor, tmp_path: Path
) -> None:
    pipe = VLVPipeline.from_pretrained(reader.base, parts=["caption"])
    where: dict[str, str | None] = {"repo": str(reader.base), "subfolder": "caption_decoder"}
    pipe.save_pretrained(tmp_path / "naming", references={"caption_decoder": where})
    named = VLVPipeline.from_pretrained(tmp_path / "naming", adapter=reader.adapter)
    named.save_pretrained(tmp_path / "merged")
    merged = VLVPipeline.from_pretrained(tmp_path / "merged")
    assert captions(merged, pixels) == captions(reader.trained, pixels)


def change_weights(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Any:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / name)
        change(weights)
        save_file(weights, folder / name)

    return spoil


def change_about(**changes: Any) -> Any:
    def spoil(folder: Path) -> None:
        about = json.loads((folder / ABOUT_NAME).read_text())
        (folder / ABOUT_NAME).write_text(json.dumps(about | changes))

    return spoil


def _widen(weights: dict[str, torch.Tensor]) -> None:
    name = min(weights)
    weights[name] = torch.zeros(7, 7)


def _poison(weights: dict[str, torch.Tensor]) -> None:
    weights[min(weights)][0] = float("nan")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / ABOUT_NAME).unlink(), "an adapter is a folder with vlv.json"),
        (change_about(format=2), "has the format 2"),
        (change_about(caption_decoder={"styles": 3}), "does not say what the captions may be"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
        (
            lambda folder: (folder / "trained.safetensors").unlink(),
            "trained.safetensors is missing",
        ),
        (lambda folder: (folder / WEIGHTS_NAME).write_bytes(b"1" * 99), "is damaged"),
        (change_weights(WEIGHTS_NAME, _widen), r"holds \(7, 7\) for .*lora_A.*model has \(2, "),
        (change_weights(WEIGHTS_NAME, lambda x: x.pop(min(x))), "holds nothing for"),
        (change_weights(WEIGHTS_NAME, _poison), "holds NaN"),
        (change_weights("trained.safetensors", _widen), r"holds \(7, 7\) for 'caption_decoder.mlp"),
        (
            change_weights("trained.safetensors", lambda x: x.update(other=torch.ones(1))),
            "for 'other', where the model has nothing",
        ),
    ],
)
def test_a_damaged_adapter(reader: Adapted, spoil: Any, told: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(reader.adapter, folder)
    spoil(folder)
    with pytest.raises(ModelFolderError, match=told):
        VLVPipeline.from_pretrained(reader.base, parts=["caption"], adapter=folder)


@pytest.mark.slow
def test_another_base_and_what_is_no_adapter(reader: Adapted, tmp_path: Path) -> None:
    other = tiny.make_pipeline()
    other.caption_decoder = tiny.make_caption_decoder(seed=7)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelFolderError, match=r"belongs to the model the-base, and the caption_d"):
        VLVPipeline.from_pretrained(tmp_path / "other", adapter=reader.adapter)
    with pytest.raises(ModelFolderError, match="is a model: give it with --model"):
        VLVPipeline.from_pretrained(reader.base, adapter=reader.base)
    with pytest.raises(ModelFolderError, match='there is no adapter "nowhere"'):
        VLVPipeline.from_pretrained(reader.base, adapter="nowhere")


@pytest.mark.slow
def test_only_an_adapter_is_replaced(reader: Adapted, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists and is no adapter"):
        adapted(reader.base, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    again = adapted(reader.base, tmp_path / "again").adapter
    first = {path.name: path.read_bytes() for path in again.iterdir()}
    adapted(reader.base, again)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == first
