"""Rules for which a model looks, with miniature models of the real classes; and duplicates by embedding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from tests.curation.files import dropped_of, index_of, run, scene, write_folder
from vlv.curation.embeddings import similar_pairs
from vlv.curation.job import ShardJob
from vlv.curation.settings import FilterConfig, load_filter
from vlv.curation.vision import Backbone, Classifier
from vlv.errors import ConfigError, DataError, ModelFolderError
from vlv.models.pipeline import VLVPipeline

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 16,
}


def save_preprocessor(folder: Path) -> None:
    values = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        **VIT, id2label={0: "clean", 1: "watermark"}, label2id={"clean": 0, "watermark": 1}
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "classifier")
    save_preprocessor(tmp_path / "classifier")
    return tmp_path / "classifier"


@pytest.fixture
def dino(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**{**VIT, "mlp_ratio": 1})).save_pretrained(
        tmp_path / "dino"
    )
    save_preprocessor(tmp_path / "dino")
    return tmp_path / "dino"


def test_watermarks_by_a_model(classifier: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", range(20))
    model = transformers.ViTForImageClassification.from_pretrained(classifier).eval()
    scores = {}
    for path in sorted(folder.glob("*.jpg")):
        square = np.asarray(Image.open(path).resize((32, 32)), np.float32) / 127.5 - 1
        with torch.no_grad():
            logits = model(torch.from_numpy(square).permute(2, 0, 1)[None]).logits
        scores[path.name] = float(logits.softmax(1)[0, 1])
    bound = float(np.median(list(scores.values())))
    changes = [
        f"watermark.model={classifier}",
        "watermark.label=watermark",
        "short_side_above=null",
    ]
    config = load_filter("paper", [*changes, f"watermark.below={bound}"])
    run(ShardJob([str(folder)], tmp_path / "out", config=config))
    assert dropped_of(tmp_path / "out") == {
        name: "watermark" for name, score in scores.items() if score >= bound
    }
    for row in index_of(tmp_path / "out"):
        assert row["watermark"] == pytest.approx(scores[row["id"]], abs=1e-5)


def test_a_model_that_does_not_fit(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no label logo; choose one of clean, watermark"):
        Classifier(str(classifier), None, "logo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFolderError, match=r"preprocessor_config.json"):
        Backbone(str(tmp_path / "empty"), None)


def test_duplicates_by_a_backbone(dino: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", range(3))
    scene(1, (192, 160)).save(folder / "large.jpg", quality=95)
    config = FilterConfig.model_validate(
        {"embedding_duplicates": {"cosine": 0.9999, "backbone": str(dino)}}
    )
    run(ShardJob([str(folder)], tmp_path / "out", config=config))
    assert dropped_of(tmp_path / "out") == {"001.jpg": "embedding_duplicate"}


def test_duplicates_by_stored_embeddings(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", range(4))
    z = torch.eye(4)[:, None, :].repeat(1, 2, 1)
    z[2] = z[0] * 3 + 0.1
    ids = [f"{number:03d}.jpg" for number in range(3)]
    save_file({"z": z[:3].to(torch.bfloat16)}, tmp_path / "z.safetensors")
    (tmp_path / "z.json").write_text(json.dumps({"ids": ids}))
    rule = {"cosine": 0.95, "file": str(tmp_path / "z.safetensors")}
    config = FilterConfig.model_validate({"embedding_duplicates": rule})
    run(ShardJob([str(folder)], tmp_path / "out", config=config))
    assert dropped_of(tmp_path / "out") == {"002.jpg": "embedding_duplicate"}
    others = write_folder(tmp_path / "others", range(7, 9))
    with pytest.raises(DataError, match="has none of the images"):
        run(ShardJob([str(others)], tmp_path / "none", config=config))
    (tmp_path / "z.json").unlink()
    with pytest.raises(DataError, match="no file of vlv embed"):
        run(ShardJob([str(folder)], tmp_path / "gone", config=config))


def test_pairs_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    monkeypatch.setattr("vlv.curation.embeddings._BLOCK", 7)
    pairs, cosines = similar_pairs(vectors, 0.9)
    products = vectors @ vectors.T
    expected = {(a, b) for a in range(50) for b in range(a + 1, 50) if products[a, b] >= 0.9}
    assert {tuple(pair) for pair in pairs.tolist()} == expected
    assert len(pairs) == len(expected)
    np.testing.assert_allclose(cosines, [products[a, b] for a, b in pairs], atol=1e-6)


@pytest.mark.slow
def test_captions_that_explain_nothing(
    tiny_pipeline: VLVPipeline, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "in", range(5))
    paths = sorted(folder.glob("*.jpg"))
    texts = ["A red cube.", "A cone.", "A blue ball.", "A drum."]
    for path, text in zip(paths, texts, strict=False):
        path.with_suffix(".txt").write_text(text)
    paths[4].with_suffix(".txt").unlink(missing_ok=True)
    images = [Image.open(path) for path in paths[:4]]
    scores = [x.recovered[0] for x in tiny_pipeline.score(images, texts, timesteps=2)]
    bound = float(np.median(scores))
    rule = {"model": str(tiny_folder), "at_least": bound, "timesteps": 2}
    config = FilterConfig.model_validate({"caption_score": rule})
    run(ShardJob([str(folder)], tmp_path / "out", config=config))
    bad = [path.name for path, score in zip(paths, scores, strict=False) if score < bound]
    assert dropped_of(tmp_path / "out") == dict.fromkeys([*bad, paths[4].name], "caption_score")
    for row in index_of(tmp_path / "out"):
        number = [path.name for path in paths].index(row["id"])
        assert row["caption_score"] == pytest.approx(scores[number], abs=1e-3)
    keep = FilterConfig.model_validate({"caption_score": {**rule, "unknown": "keep"}})
    run(ShardJob([str(folder)], tmp_path / "kept", config=keep))
    assert sorted(dropped_of(tmp_path / "kept")) == sorted(bad)
