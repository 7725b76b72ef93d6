"""The encoder's own captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.data import files
from vlv.data.loader import LoaderSettings
from vlv.data.records import BadRecord, Record
from vlv.data.source import find_records
from vlv.errors import DataError
from vlv.models.encoder import VLVEncoder, normalize
from vlv.progress import Progress
from vlv.training.own_captions import own_caption_ids


def test_same_tokens_as_florence_with_its_ordinary_inputs(
    tiny_encoder: VLVEncoder, pixels: torch.Tensor
) -> None:
    backbone = tiny_encoder.backbone
    num_tokens = tiny_encoder.image_features(pixels).shape[1]
    ids = [backbone.config.image_token_id] * num_tokens + list(tiny_encoder.config.prompt_ids)
    expected = backbone.generate(  # type: ignore[operator]
        input_ids=torch.tensor([ids]).expand(len(pixels), -1),
        pixel_values=normalize(pixels, tiny_encoder.config),
        max_new_tokens=tiny_encoder.num_queries,
        num_beams=1,
        do_sample=False,
    )
    assert torch.equal(tiny_encoder.write(pixels, tiny_encoder.num_queries), expected)


def captions(encoder: VLVEncoder, records: list[Record], journal: Path, **options: Any) -> Any:
    settings = LoaderSettings(batch_size=2, image_size=tiny.IMAGE_SIZE)
    return own_caption_ids(
        encoder,
        tiny.make_florence_tokenizer,
        tiny.make_clip_tokenizer(),
        records,
        settings,
        journal,
        **options,
    )


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(files.noise_png(number, tiny.IMAGE_SIZE))
    return find_records([tmp_path])


def test_captions_are_written_once_and_go_on_after_an_interruption(
    tiny_encoder: VLVEncoder,
    records: list[Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = captions(tiny_encoder, records, tmp_path / "whole.jsonl")
    assert whole.shape == (5, tiny_encoder.num_queries)
    assert (whole[:, 0] == tiny.make_clip_tokenizer().bos_token_id).all()
    plain = VLVEncoder.write
    answers = iter([plain])
    with monkeypatch.context() as patch:
        patch.setattr(VLVEncoder, "write", lambda *arguments: next(answers)(*arguments))
        with pytest.raises(StopIteration):
            captions(tiny_encoder, records, tmp_path / "run" / "own.jsonl")
    sizes: list[int] = []

    def write(encoder: VLVEncoder, pixels: torch.Tensor, most: int) -> torch.Tensor:
        sizes.append(len(pixels))
        return plain(encoder, pixels, most)

    monkeypatch.setattr(VLVEncoder, "write", write)
    assert np.array_equal(captions(tiny_encoder, records, tmp_path / "run" / "own.jsonl"), whole)
    assert sizes == [2, 1]  # the first two were done
    assert np.array_equal(captions(tiny_encoder, records, tmp_path / "run" / "own.jsonl"), whole)
    assert sizes == [2, 1]


def test_an_image_that_cannot_be_read_has_an_empty_caption(
    tiny_encoder: VLVEncoder, records: list[Record], tmp_path: Path
) -> None:
    (tmp_path / "1.png").write_bytes(b"no image")
    bad: list[BadRecord] = []
    ids = captions(tiny_encoder, records, tmp_path / "own.jsonl", on_bad=bad.append)
    assert [record.id for record in bad] == ["1.png"]
    tokenizer = tiny.make_clip_tokenizer()
    empty = tokenizer([""], padding="max_length").input_ids[0][: tiny_encoder.num_queries]
    assert ids[1].tolist() == empty
    with pytest.raises(DataError, match=r"1\.png"):
        captions(tiny_encoder, records, tmp_path / "strict.jsonl")


def test_progress_is_shown(
    tiny_encoder: VLVEncoder,
    records: list[Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Progress, "EVERY", 0.0)
    captions(tiny_encoder, records, tmp_path / "own.jsonl")
    shown = capsys.readouterr().err
    assert "own captions: 2/5 images" in shown
    assert "own captions: 4/5 images" in shown
