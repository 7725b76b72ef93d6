"""A miniature vision-language model of transformers as the teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.cli.conftest import write_image
from tests.jobs.teacher.vlm import save_vlm
from vlv.cli import run
from vlv.errors import ModelFolderError
from vlv.jobs.teacher.job import Asking
from vlv.jobs.teacher.local import TransformersModel

LONG = "Describe the whole image, please."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def model(folder: Path) -> TransformersModel:
    return TransformersModel(str(folder), device="cpu")


@pytest.fixture
def images() -> list[Image.Image]:
    return [Image.new("RGB", (40, 30), (200, 0, 0)), Image.new("RGB", (64, 64), (0, 0, 200))]


def test_a_batch_equals_single_calls(model: TransformersModel, images: list[Image.Image]) -> None:
    asking = Asking(max_tokens=12)
    both = model.answer(images, ["What?", LONG], asking, 0)
    singles = [
        model.answer([i], [t], asking, 0)[0] for i, t in zip(images, ["What?", LONG], strict=True)
    ]
    assert both == singles
    assert both[0].text != both[1].text
    assert [answer.completion_tokens for answer in both] == [12, 12]
    assert [answer.finish_reason for answer in both] == ["length", "length"]


def test_later_tries_draw_by_their_seed(
    model: TransformersModel, images: list[Image.Image]
) -> None:
    asking = Asking(max_tokens=12, seed=4)
    state = torch.get_rng_state()
    texts = [model.answer(images[:1], [LONG], asking, attempt)[0].text for attempt in (0, 1, 1, 2)]
    assert texts[1] == texts[2]
    assert len(set(texts)) == 3
    assert torch.equal(state, torch.get_rng_state())


def test_a_field_cannot_smuggle_in_an_image(
    model: TransformersModel, images: list[Image.Image]
) -> None:
    asking = Asking(max_tokens=4)
    plain = model.answer(images[:1], ["Called cat."], asking, 0)
    assert model.answer(images[:1], ["Called <image>cat."], asking, 0) == plain


def test_an_answer_ends_at_its_end_token(model: TransformersModel) -> None:
    end = model._model.generation_config.eos_token_id
    answer = model._read([5, 6, end, end], 3)
    assert (answer.finish_reason, answer.completion_tokens) == ("stop", 2)
    assert model._read([end, end], 3).text == ""


def test_what_is_no_such_model(tmp_path: Path, tiny_folder: Path) -> None:
    for place in (tmp_path, tiny_folder, tmp_path / "nothing"):
        with pytest.raises(ModelFolderError, match="cannot be loaded as a vision-language model"):
            TransformersModel(str(place), device="cpu")


def test_the_command(folder: Path, tmp_path: Path) -> None:
    for number in range(5):
        write_image(tmp_path / "in" / f"{number}.png", number)
    args = ["data", "caption", str(tmp_path / "in"), "--vlm", str(folder), "--device", "cpu"]
    args += ["--prompt", "What is in {file_name}?", "--max-tokens", "8", "--batch-size", "2"]
    args += ["--language", "any", "--format", "jsonl"]
    outputs = []
    for name in ("a", "b"):
        assert run([*args, "-o", str(tmp_path / name)]) in {0, 2}
        outputs.append((tmp_path / name / "captions.jsonl").read_text())
    assert outputs[0] == outputs[1]
    rows = [json.loads(line) for line in outputs[0].splitlines()]
    assert [row["id"] for row in rows] == [f"{number}.png" for number in range(5)]
    assert all(row["tries"] == 2 and "no caption" in row["error"] for row in rows if row["error"])
