"""What a run with adapters leaves behind, through the whole of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft", reason='adapters need the package peft: pip install "vlv[lora]"')

from tests import tiny
from tests.cli.conftest import write_image
from vlv.config import RunConfig, parse_run
from vlv.models.pipeline import VLVPipeline
from vlv.training.assemble import train
from vlv.training.checkpoint import latest_checkpoint
from vlv.training.interrupt import Interrupted

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("models_read_once")]

LORA = {"rank": 2, "targets": ["q_proj", "v_proj"], "dropout": 0.1}


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with captions."""
    folder = tmp_path_factory.mktemp("captioned")
    for number in range(4):
        image = write_image(folder / f"{number}.png", number)
        image.with_suffix(".txt").write_text(tiny.CAPTIONS[number])
    return folder


def settings(base: Path, data: Path, stage: str = "stage2", **changes: Any) -> RunConfig:
    parts = dict.fromkeys(("encoder", "decoder", "caption_decoder"), str(base))
    values: dict[str, Any] = {
        "stage": stage,
        "model": parts,
        "data": {"inputs": [str(data)], "image_size": tiny.IMAGE_SIZE, "num_workers": 0},
        "optim": {"lr": 0.01},
        "loop": {"steps": 3, "batch_size": 2, "trackers": []},
        stage: {"trainable": "mlp+llm", "lora": LORA},
    }
    values["data"] |= changes.pop("held_out", {})
    for key, change in changes.items():
        values[key] = values[key] | change
    return parse_run(values)


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def same_adapters(a: Path, b: Path) -> bool:
    return files(a / "adapter") == files(b / "adapter")


def test_adapters_alone_train_and_are_saved(
    tiny_folder: Path, captioned: Path, pixels: torch.Tensor, tmp_path: Path
) -> None:
    before, run = files(tiny_folder), tmp_path / "run"
    config = settings(tiny_folder, captioned)
    train(config, run, export=tmp_path / "merged")
    assert files(tiny_folder) == before
    assert not (run / "model").exists()
    assert not (run / "base").exists(), "the base lies in one folder"
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    trained = checkpoint.tensors("trainable")
    assert {name.split(".")[1] for name in trained} == {"mlp", "llm"}
    assert all("lora_" in name for name in trained if ".llm." in name)
    whole = load_file(run / "adapter" / "trained.safetensors")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in whole.items())

    pipe = VLVPipeline.from_pretrained(tiny_folder, adapter=run / "adapter")
    merged = VLVPipeline.from_pretrained(tmp_path / "merged")
    wanted = pipe.caption(list(pixels), max_new_tokens=8)
    assert merged.caption(list(pixels), max_new_tokens=8) == wanted
    plain = VLVPipeline.from_pretrained(tiny_folder).caption(list(pixels), max_new_tokens=8)
    assert wanted != plain
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "caption decoder, by adapters" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_an_interrupted_run_ends_with_the_same_adapter(
    stage: str, tiny_folder: Path, captioned: Path, tmp_path: Path
) -> None:
    known: dict[str, Any] = {"method": "dpo", "candidates": 2, "max_caption_tokens": 5}
    known |= {"score_timesteps": 1}
    own = known if stage == "stage3" else {"trainable": "mlp+llm+encoder"}
    config = settings(tiny_folder, captioned, stage, **{stage: own})
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", max_seconds=0)
    assert not (tmp_path / "parts" / "adapter").exists()
    train(config, tmp_path / "parts")
    assert same_adapters(tmp_path / "whole", tmp_path / "parts")
    assert (tmp_path / "whole" / "adapter" / "encoder").is_dir() == (stage == "stage2")


def test_adapters_train_beside_4_bits(
    tiny_folder: Path, captioned: Path, pixels: torch.Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason='4 bits need bitsandbytes: pip install "vlv[quant]"')
    lora = {"trainable": "mlp+llm", "lora": LORA | {"bits": 4, "targets": "all-linear"}}
    looked = {"precision": "bf16", "eval_every": 1}
    held_out = {"held_out": [str(captioned)]}
    config = settings(tiny_folder, captioned, stage2=lora, loop=looked, held_out=held_out)
    before = files(tiny_folder)
    train(config, tmp_path / "whole")
    assert files(tiny_folder) == before
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("held_out_caption") for line in lines]
    first, *_, last = [loss for loss in losses if loss is not None]
    assert last < first, "gradients reach the adapters after each look, too"
    adapter = tmp_path / "whole" / "adapter"
    adapted = VLVPipeline.from_pretrained(tiny_folder, parts=["caption"], adapter=adapter)
    assert adapted.caption_decoder is not None
    z = adapted.embed(pixels)
    captions = [*tiny.CAPTIONS[:3]]
    loss = adapted.caption_decoder.loss(adapted.context(z).sequence, captions).item()
    plain = VLVPipeline.from_pretrained(tiny_folder, parts=["caption"])
    assert plain.caption_decoder is not None
    assert loss < plain.caption_decoder.loss(plain.context(z).sequence, captions).item()


def test_parts_of_several_folders_become_a_base(
    tiny_folder: Path,
    tiny_parts: tiny.TinyParts,
    captioned: Path,
    pixels: torch.Tensor,
    tmp_path: Path,
) -> None:
    """A fresh projector on a language model: the base has both as they were before the training."""
    tiny_parts.llm.save_pretrained(tmp_path / "llm")
    tiny_parts.llm_tokenizer.save_pretrained(tmp_path / "llm")
    parts = {"llm": str(tmp_path / "llm"), "caption_decoder": None}
    config = settings(tiny_folder, captioned, model=parts, loop={"precision": "bf16"})
    train(config, tmp_path / "run")
    base = load_file(tmp_path / "run" / "base" / "caption_decoder" / "model.safetensors")
    for name, tensor in tiny_parts.llm.model.state_dict().items():
        assert torch.equal(base[f"llm.model.{name}"], tensor), name
    run = tmp_path / "run"
    adapted = VLVPipeline.from_pretrained(run / "base", adapter=run / "adapter")
    fresh = VLVPipeline.from_pretrained(run / "base")
    assert adapted.caption(list(pixels), max_new_tokens=8) != fresh.caption(
        list(pixels), max_new_tokens=8
    )
