"""`vlv verify`: anybody's captions judged, whatever is wrong with some of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Vlv, write_image
from tests.models.test_doubts import CALIBRATION
from vlv.errors import ConfigError
from vlv.jobs.formats import Row, read_rows
from vlv.jobs.verify import COLUMNS
from vlv.models.doubts import gather_evidence
from vlv.models.pipeline import VLVPipeline
from vlv.storage import write_json

CAPTIONS = {
    "0.png": "A red cube. A cone.",
    "1.png": "Ein Haus.",
    "2.png": "A red cube stands here. " * 12,
    "3.png": "",
    "9.png": "A cone.",
}


@pytest.fixture
def args(tiny_folder: Path, photos: Path, tmp_path: Path) -> tuple[object, ...]:
    """Five images; captions for three of them, an empty one, none for the fifth, and one without an image."""
    table = tmp_path / "captions.jsonl"
    lines = [json.dumps({"id": id, "caption": text}) + "\n" for id, text in CAPTIONS.items()]
    table.write_text("".join(lines), encoding="utf-8")
    calibration = tmp_path / "doubts.json"
    write_json(calibration, CALIBRATION.to_dict())
    return ("verify", photos, "--captions", table, "--model", tiny_folder, "--calibration", calibration, "--timesteps", 1)  # fmt: skip


def rows(path: Path) -> dict[str, Row]:
    return {row["id"]: row for row in read_rows(path, COLUMNS)}


@pytest.mark.slow
def test_the_rest_is_judged(vlv: Vlv, args: tuple[object, ...], tmp_path: Path) -> None:
    output, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    result = vlv(*args, "--output", output, "--fix", "--page", page)
    assert result.code == 2
    assert "done 3, skipped 0, failed 3" in result.err
    for words in (
        "3.png: the caption is empty",
        "4.jpg: ",
        "has no caption for it",
        "there is no image 9.png among the inputs",
        "1 captions make no claim that the grammar toyworld knows",
        "1 captions are longer than the text tower",
    ):
        assert words in result.err
    found = rows(output)
    assert list(found["0.png"]) == [*COLUMNS, "fixed"]
    one, two = found["0.png"]["sentences"]
    assert (one["text"], two["text"]) == ("A red cube.", "A cone.")
    assert found["0.png"]["doubt"] == pytest.approx(max(one["doubt"], two["doubt"]), abs=1e-4)
    assert [x["fact"] for x in found["0.png"]["claims"]] == ["colour", "shape", "shape"]
    assert found["1.png"]["claims"] == []
    assert found["2.png"]["n_chunks"] > 1
    assert found["9.png"]["file_name"] is None
    html = page.read_text("utf-8")
    assert html.count('class="case"') == 3
    changed = [row for row in found.values() if row["fixed"] not in (None, row["caption"])]
    assert html.count("proposed:") == len(changed) < 3
    assert "Ein Haus." in re.sub("<[^>]+>", "", html)
    assert 'name="viewport"' in html


@pytest.mark.slow
def test_it_goes_on_where_it_stopped(
    vlv: Vlv, args: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.csv"
    vlv(*args, "--output", output)
    first = rows(output)
    assert first["0.png"]["sentences"][0]["text"] == "A red cube."
    with monkeypatch.context() as patch:
        patch.setattr(VLVPipeline, "from_pretrained", None)  # the model is not even loaded
        again = vlv(*args, "--output", output)
    assert "done 0, skipped 3, failed 3" in again.err
    assert rows(output) == first
    table = tmp_path / "captions.jsonl"
    table.write_text(table.read_text("utf-8").replace("cube. A cone", "cube. A drum"), "utf-8")
    assert "done 1, skipped 2, failed 3" in vlv(*args, "--output", output).err
    other = vlv(*args, "--output", output, "--seed", 1)
    assert other.code == 1
    assert "seed" in other.err


@pytest.mark.slow
def test_captions_beside_the_images(vlv: Vlv, args: tuple[object, ...], tmp_path: Path) -> None:
    image = write_image(tmp_path / "own" / "1.png")
    image.with_suffix(".txt").write_text("A red cube.")
    calibration, model = args[args.index("--calibration") + 1], args[args.index("--model") + 1]
    result = vlv("verify", image.parent, "--model", model, "--calibration", calibration)
    assert result.code == 0
    name, score, doubt, text = result.out.rstrip("\n").split("\t")
    assert (name, text) == (str(image), "A red cube.")
    assert 0 <= float(doubt) <= 1
    assert float(score) <= 1 or float(score) > 1
    plain = vlv("verify", image.parent, "--model", model, "--output", "-", "--claims", "none")
    assert json.loads(plain.out)["claims"] == []
    assert "has no doubts.json; with that of vlv-tiny doubts rank sentences" in plain.err


def test_a_loss_that_is_not_finite_spoils_no_other(
    vlv: Vlv, args: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflows(*given: object, **options: object) -> object:
        if any("Haus" in text for text in given[2]):  # type: ignore[attr-defined]
            raise ConfigError("the denoising loss is not finite")
        return gather_evidence(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("vlv.models.judging.gather_evidence", overflows)
    output = tmp_path / "out.jsonl"
    result = vlv(*args, "--output", output)
    assert "1.png: the denoising loss is not finite" in result.err
    assert rows(output)["0.png"]["error"] is None
    assert "done 2, skipped 0, failed 4" in result.err


def test_wrong_use(vlv: Vlv, args: tuple[object, ...], photos: Path, tmp_path: Path) -> None:
    assert "there is no column x" in vlv(*args, "--caption-column", "x").err
    assert "must end in .jsonl" in vlv(*args, "--output", tmp_path / "out.txt").err
    assert "must be a file that ends in .html" in vlv(*args, "--page", tmp_path).err
    assert (
        "--id-column has no effect without --captions"
        in vlv("verify", photos, "--id-column", "x").err
    )
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    result = vlv("verify", photos, "--calibration", bad)
    assert "bad.json holds no calibration" in result.err
    assert result.code == 1


def test_a_model_without_denoiser(
    vlv: Vlv, tiny_pipeline: VLVPipeline, photos: Path, tmp_path: Path
) -> None:
    image = write_image(tmp_path / "own" / "1.png")
    image.with_suffix(".txt").write_text("A red cube.")
    parts = {k: v for k, v in tiny_pipeline.components.items() if k not in {"unet", "vae"}}
    VLVPipeline(**parts, image_size=32).save_pretrained(tmp_path / "blind")
    result = vlv("verify", image.parent, "--model", tmp_path / "blind")
    assert result.code == 1
    assert "no unet and no vae" in result.err
    assert torch.is_grad_enabled()
