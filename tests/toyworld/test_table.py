"""Scenes as tensors, and batches of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from vlv.data.source import find_records
from vlv.errors import DataError
from vlv.toyworld.inspector import encode_scenes
from vlv.toyworld.language import compare, parse
from vlv.toyworld.render import image_box, render
from vlv.toyworld.scene import Scene
from vlv.toyworld.table import (
    TableLoader,
    image_columns,
    labels_of,
    scenes_of,
    token_column,
    write_texts,
)
from vlv.toyworld.writing import write_at_length, write_mixed

CPU = torch.device("cpu")


def test_pictures_and_labels_are_those_of_the_scenes(shards: Path, tmp_path: Path) -> None:
    records = find_records([shards])[:20]
    columns = image_columns(records, 64, tmp_path / "scenes")
    scenes = scenes_of(records)
    labels = encode_scenes(scenes)
    for fact, values in labels_of(columns).items():
        assert torch.equal(values.nan_to_num(), labels[fact].nan_to_num()), fact
    for row, scene in enumerate(scenes):
        picture = torch.from_numpy(render(scene).image).permute(2, 0, 1)
        assert torch.equal(columns["pixels"][row], picture)
        boxes = [list(image_box(scene, solid)) for solid in scene.solids]
        assert columns["boxes"][row].tolist() == boxes + [[0] * 4] * (3 - len(boxes))


def test_files_are_made_once_and_for_one_data_set(shards: Path, tmp_path: Path) -> None:
    records, folder = find_records([shards]), tmp_path / "scenes"
    image_columns(records[:4], 64, folder)
    (place,) = folder.iterdir()
    before = (place / "pixels.npy").stat().st_mtime_ns
    image_columns(records[:4], 64, folder)
    assert (place / "pixels.npy").stat().st_mtime_ns == before
    image_columns(records[:5], 64, folder)
    assert len(list(folder.iterdir())) == 2


def test_texts_depend_on_seed_and_number_alone(scenes: list[Scene]) -> None:
    write = partial(write_mixed, shares={"detailed": 0.5, "plain": 0.5})
    texts = write_texts(scenes[:30], write, 2, 7, workers=1)
    assert texts == write_texts(scenes[:30], write, 2, 7, workers=1)
    assert texts[:10] == write_texts(scenes[:5], write, 2, 7, workers=1)
    assert texts != write_texts(scenes[:30], write, 2, 8, workers=1)
    pairs = zip(texts, (scene for scene in scenes[:30] for _ in range(2)), strict=True)
    assert all(compare(parse(text), scene).precision == 1 for text, scene in pairs)


@pytest.mark.slow
def test_processes_write_the_same_texts(scenes: list[Scene]) -> None:
    many = scenes * 9
    write = partial(write_mixed, shares={"short": 1.0})
    assert write_texts(many, write, 1, 0, workers=2) == write_texts(many, write, 1, 0, workers=1)


def test_texts_go_on_with_prose_or_questions_about_their_scene(scenes: list[Scene]) -> None:
    texts = write_texts(scenes[:200], write_at_length, 1, 0, workers=1)
    kinds = {1: 0, 2: 0, 3: 0}
    for text, scene in zip(texts, scenes[:200], strict=True):
        first, *more = text.split("\n")
        kinds[1 + len(more)] += 1
        assert compare(parse(first), scene).precision == 1
        if len(more) == 1:
            assert compare(parse(more[0]), scene).f1 == 1
        assert all("? " in question for question in more[1:])
    assert 70 < kinds[2] < 130
    assert kinds[1] > 25
    assert kinds[3] > 25


def test_token_ids_read_back(text_tokenizer: CLIPTokenizer) -> None:
    texts = ["a red cube", "a photo of a blue ball at night", "a cone", "a green drum"]
    ids = token_column(text_tokenizer, texts, 2, max_length=64)
    assert ids.shape[:2] == (2, 2)
    rows = [text_tokenizer.decode(row, skip_special_tokens=True) for row in ids.flatten(0, 1)]
    assert [row.strip() for row in rows] == texts
    assert token_column(text_tokenizer, texts, 2, max_length=4).shape == (2, 2, 4)


# --- batches --------------------------------------------------------------------------------------


def make_loader(num: int = 10, batch_size: int = 4, seed: int = 0) -> TableLoader:
    number = torch.arange(num)
    columns = {"number": number, "texts": (10 * number[:, None] + torch.arange(3))[..., None]}
    return TableLoader(columns, batch_size, seed=seed, device=CPU, texts=["texts"])


def take(loader: TableLoader, num: int) -> list[dict[str, Tensor]]:
    return [next(loader) for _ in range(num)]


def test_an_epoch_has_no_row_twice_and_a_text_of_each_row() -> None:
    first, second, *later = take(make_loader(), 40)
    rows = torch.cat((first["number"], second["number"]))
    assert len(set(rows.tolist())) == 8
    for batch in later:
        assert torch.equal(batch["texts"][:, 0] // 10, batch["number"])
    assert {int(t) % 10 for batch in later for t in batch["texts"]} == {0, 1, 2}
    assert not torch.equal(later[0]["number"], first["number"])


def test_a_loader_goes_on_where_it_was() -> None:
    whole = take(make_loader(), 7)
    loader = make_loader()
    take(loader, 3)
    again = make_loader()
    again.load_state_dict(loader.state_dict())
    for expected, batch in zip(whole[3:], take(again, 4), strict=True):
        assert all(torch.equal(batch[name], value) for name, value in expected.items())


def test_another_position_is_refused() -> None:
    with pytest.raises(DataError, match="another number of scenes, or in other batches"):
        make_loader().load_state_dict(make_loader(num=12).state_dict())


def test_too_few_scenes() -> None:
    with pytest.raises(DataError, match="3 scenes are too few for batches of 4"):
        make_loader(num=3)
