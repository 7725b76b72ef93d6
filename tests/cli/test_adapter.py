"""`--adapter` of the commands, and what trains and merges one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("peft", reason='adapters need the package peft: pip install "vlv[lora]"')

from tests.cli.conftest import Vlv, write_image
from tests.cli.test_train import UNWATCHED, write_config
from tests.models.test_adapter import Adapted, adapted
from vlv.jobs.push import check_card
from vlv.models.pipeline import VLVPipeline
from vlv.search.build import ABOUT_NAME

if TYPE_CHECKING:
    from pathlib import Path

SHORT = ("--max-new-tokens", 5)


@pytest.fixture(scope="module")
def style(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """An adapter of the shared model, with a style of its own and another encoder."""
    return adapted(tiny_folder, tmp_path_factory.mktemp("style") / "adapter", encoder=True)


def test_captions_of_an_adapter(vlv: Vlv, style: Adapted, tmp_path: Path) -> None:
    photo = write_image(tmp_path / "photo.png")
    table = tmp_path / "captions.jsonl"
    args = ("caption", photo, "--model", style.base, *SHORT, "-o", table)
    assert vlv(*args, "--adapter", style.adapter).code == 0
    (row,) = (json.loads(line) for line in table.read_text().splitlines())
    assert row["caption"] == style.trained.caption(str(photo), max_new_tokens=5)
    assert row["model"] == f"{style.base}+{style.adapter}"
    other = vlv(*args)
    assert (other.code, "model was" in other.err) == (1, True), "the table is that of the adapter"
    styled = vlv(*args[:-2], "--adapter", style.adapter, "--style", "short")
    assert styled.code == 0


@pytest.mark.slow
def test_what_is_no_adapter_of_the_model(vlv: Vlv, style: Adapted, tmp_path: Path) -> None:
    args = ("caption", write_image(tmp_path / "photo.png"), *SHORT)
    wrong = vlv(*args, "--model", "vlv-tiny", "--adapter", style.adapter)
    assert wrong.code == 1
    assert "belongs to the model the-base, and the encoder of" in wrong.err
    (tmp_path / "empty").mkdir()
    none = vlv(*args, "--model", style.base, "--adapter", tmp_path / "empty")
    assert none.code == 1
    assert "an adapter is a folder with vlv.json" in none.err


@pytest.mark.slow
def test_commands_that_load_a_model_take_an_adapter(
    vlv: Vlv, style: Adapted, tmp_path: Path
) -> None:
    photo = write_image(tmp_path / "photo.png")
    model = ("--model", style.base, "--adapter", style.adapter)
    z, index = tmp_path / "z.safetensors", tmp_path / "index"
    assert vlv("embed", photo, *model, "-o", z).code == 0
    assert json.loads(z.with_suffix(".json").read_text())["model"].endswith(str(style.adapter))
    drawn = vlv("reconstruct", photo, *model, "--steps", 1, "-o", tmp_path / "drawn")
    assert drawn.code == 0
    teacher = ("data", "caption", photo, *model, "-o", tmp_path / "teacher", "--batch-size", 1)
    assert vlv(*teacher).code == 2, "random weights end no caption"
    alone = vlv(*teacher[:-2], "--endpoint", "http://127.0.0.1:9/v1")
    assert "--adapter has no effect without a model of vlv" in alone.err
    pytest.importorskip("usearch", reason="search needs the package usearch")
    assert vlv("index", "build", photo, *model, "-o", index).code == 0
    assert json.loads((index / ABOUT_NAME).read_text())["adapter"] == str(style.adapter)
    found = vlv("search", index, "--image", photo)
    assert found.out.startswith("1\t1.0000"), "the index names its adapter"
    plain = vlv("search", index, "--image", photo, "--model", style.base)
    assert (plain.code, "whose weights are not those of" in plain.err) == (1, True)


@pytest.mark.slow
def test_an_adapter_becomes_a_model(vlv: Vlv, style: Adapted, tmp_path: Path) -> None:
    photo = write_image(tmp_path / "photo.png")
    merge = ("convert", "adapter", style.adapter, tmp_path / "merged", "--model", style.base)
    assert vlv(*merge).code == 0
    merged = VLVPipeline.from_pretrained(tmp_path / "merged")
    wanted = style.trained.caption(str(photo), max_new_tokens=5)
    assert merged.caption(str(photo), max_new_tokens=5) == wanted
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    refused = vlv(*merge[:3], tmp_path / "mine", *merge[4:])
    assert (refused.code, "is no model folder" in refused.err) == (1, True)


@pytest.mark.slow
def test_a_run_with_adapters(
    vlv: Vlv, ingredients: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path / "2.yaml",
        ingredients,
        "stage2",
        model={"encoder": str(tiny_folder), "decoder": str(tiny_folder)},
        data=UNWATCHED,
        loop={"steps": 2},
        stage2={"trainable": "mlp+llm", "lora": {"rank": 2}},
    )
    run = tmp_path / "run"
    args = ("train", config, "--run-dir", run)
    trained = vlv(*args)
    assert trained.code == 0
    assert f"the adapter is in {run / 'adapter'}, its base in {run / 'base'}" in trained.err
    photo = (ingredients / "held_out" / "6.png", *SHORT)
    assert vlv("caption", *photo, "--model", run / "base", "--adapter", run / "adapter").code == 0
    again = vlv(*args, "--export", tmp_path / "merged")
    assert f"and merged with its base in {tmp_path / 'merged'}" in again.err
    assert vlv("caption", *photo, "--model", tmp_path / "merged").code == 0


def test_an_adapter_goes_to_the_hub(style: Adapted) -> None:
    card = check_card(style.adapter, "me/style")
    assert "# me/style\n" in card
    assert "vlv caption IMAGE --model the-base --adapter me/style\n" in card
