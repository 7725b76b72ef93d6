from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

from tests import tiny
from tests.evaluation.support import make_inspector, save_clip
from vlv.errors import ModelFolderError
from vlv.evaluation.metrics.features import (
    ClipScore,
    clean_resize,
    cosine,
    feature_distances,
    inception_features,
    inspector_features,
    pieces,
    stack,
    vision_features,
)
from vlv.evaluation.metrics.inception import FIDInception

if TYPE_CHECKING:
    from pathlib import Path


def pictures(n: int, side: int = 40) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(256, size=(side, side, 3), dtype=np.uint8)) for _ in range(n)]  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def test_features_of_the_inspector() -> None:
    inspector = make_inspector()
    extractor, images = inspector_features(inspector), pictures(3, 64)
    with torch.no_grad():
        expected = inspector.features(stack(images)).flatten(1).numpy()
    found = extractor(images)
    assert found.shape == (3, extractor.width)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_features_of_a_vision_backbone(kind: str, clip: Path, tmp_path: Path) -> None:
    folder = clip
    if kind == "dinov2":
        folder = tmp_path
        config = Dinov2Config(
            hidden_size=20, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
        )
        Dinov2Model(config).save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    extractor, images = vision_features(str(folder)), pictures(3)
    found = extractor(images)
    assert found.shape == (3, extractor.width)
    np.testing.assert_allclose(found[1:], extractor(images[1:]), rtol=1e-4, atol=1e-5)
    assert cosine(found, found) == pytest.approx([1, 1, 1])


@pytest.mark.slow
def test_features_of_inception(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FIDInception().eval()
    torch.save(model.state_dict(), tmp_path / "inception.pth")
    images = pictures(1, 50)
    plain = inception_features(tmp_path / "inception.pth")
    with torch.no_grad():
        np.testing.assert_allclose(plain(images), model(stack(images)).numpy(), atol=1e-6)
    clean = inception_features(tmp_path / "inception.pth", "clean-fid")
    assert "Pillow" in clean.resize
    assert np.abs(clean(images) - plain(images)).max() > 0


def test_clean_resizing_averages_and_the_other_does_not() -> None:
    """A fine chessboard made small is grey with antialiasing; each channel keeps its own value."""
    board = np.indices((600, 600)).sum(0) % 2 * 200
    picture = Image.fromarray(np.stack((board, board * 0 + 30, board * 0), -1).astype(np.uint8))
    small = clean_resize(picture, 100)
    assert small.shape == (3, 100, 100)
    assert small[0].mean() == pytest.approx(100 / 255, abs=0.01)
    assert small[0].std() < 0.02
    assert small[1].mean() == pytest.approx(30 / 255, abs=1e-4)


def test_clip_score_keeps_the_end_of_a_long_text(clip: Path) -> None:
    scorer, images = ClipScore(str(clip)), pictures(3)
    long = " ".join(["red cube"] * 40)
    found = scorer(images, ["a red cube", long, long + " and more"])
    assert found.truncated.tolist() == [False, True, True]
    ids = scorer._tokenizer([long], max_length=16, truncation=True).input_ids[0]
    assert ids[-1] == tiny.make_clip_tokenizer().eos_token_id
    assert len(ids) == 16
    # the two long texts begin alike, so that they are one text to CLIP
    again = scorer([images[1], images[1]], [long, long + " and more"])
    assert again.scores[0] == pytest.approx(again.scores[1])


def test_clip_score_in_pieces_reads_a_long_text_to_its_end(clip: Path) -> None:
    scorer, (image, other) = ClipScore(str(clip)), pictures(2)
    halves = ["red cube " * 3 + "red", "cube red " * 3 + "cube"]  # 7 words of two tokens each
    count = [len(ids) for ids in scorer._tokenizer(halves, add_special_tokens=False).input_ids]
    assert count == [14, 14]  # and start and end
    long = " ".join(halves)
    found = scorer.in_pieces([image, other, image], [long, "a red cube", long.removesuffix("cube") + "red"])  # fmt: skip
    assert found.truncated.tolist() == [True, False, True]

    def cosines(texts: list[str]) -> list[float]:
        inputs = scorer._tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            read = scorer._model.get_text_features(**inputs)
        read = getattr(read, "pooler_output", read).numpy()
        return cosine(scorer._images([image] * len(texts)), read).tolist()

    assert found.scores[0] == pytest.approx(2.5 * max(0, np.mean(cosines(halves))), abs=1e-5)
    assert found.scores[1] == pytest.approx(scorer([other], ["a red cube"]).scores[0], abs=1e-5)
    assert abs(found.scores[2] - found.scores[0]) > 1e-4  # the last word counts


def test_pieces_are_few_and_alike() -> None:
    assert pieces([], 3) == [[]]
    assert pieces([1, 2, 3], 3) == [[1, 2, 3]]
    for n in range(1, 60):
        found = pieces(list(range(n)), 7)
        assert [i for piece in found for i in piece] == list(range(n))
        assert len(found) == -(-n // 7)
        assert max(map(len, found)) - min(map(len, found)) <= 1


def test_clip_score_is_the_clipped_cosine(clip: Path) -> None:
    scorer, images = ClipScore(str(clip)), pictures(8)
    model = CLIPModel.from_pretrained(clip)
    processor = CLIPImageProcessor.from_pretrained(clip)
    tokens = tiny.make_clip_tokenizer()(["a red cube"] * 8, return_tensors="pt")
    with torch.no_grad():
        output = model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=processor(images, return_tensors="pt")["pixel_values"],
        )
    cosines = (output.text_embeds[0] * output.image_embeds).sum(-1)
    expected = 2.5 * cosines.clamp_min(0).numpy()
    assert scorer(images, ["a red cube"] * 8).scores == pytest.approx(expected, abs=1e-4)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="no vision model"):
        vision_features(str(tmp_path))
    with pytest.raises(ModelFolderError, match="no CLIP"):
        ClipScore(str(tmp_path))


def test_feature_distances() -> None:
    first, second = np.zeros((2, 4), np.float32), np.zeros((2, 4), np.float32)
    second[0, :2] = 3, 4
    assert feature_distances(first, second).tolist() == [5, 0]
