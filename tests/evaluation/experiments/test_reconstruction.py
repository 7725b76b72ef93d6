"""Captions and embeddings are drawn and judged: every step resumes, loses nothing, and its figures are right."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from tests import tiny
from tests.endpoint.server import ScriptedServer, always
from tests.evaluation.support import judge
from vlv.cli import run as vlv
from vlv.errors import ConfigError, DataError, EndpointError, OutputError
from vlv.evaluation.experiments import reconstruction
from vlv.evaluation.experiments.backends import Backends
from vlv.evaluation.experiments.generators import DiffusersGenerator, ModelGenerator
from vlv.evaluation.experiments.instruments import make_instrument
from vlv.evaluation.experiments.judging import score_experiment
from vlv.evaluation.experiments.predicting import predict_captions
from vlv.evaluation.experiments.run import Judge, Run
from vlv.evaluation.experiments.samples import DataSet, read_references, read_rows
from vlv.evaluation.experiments.viewing import image_path
from vlv.evaluation.metrics.distances import kernel_distance
from vlv.evaluation.metrics.inception import FIDInception
from vlv.storage import to_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Make = "Callable[..., Backends]"
TOY = DataSet("test", 3, 7)


def start(folder: Path, model: Path | str, *sources: str, data: DataSet = TOY, **more: Any) -> Run:
    settings = {"generator": f"model:{model}", "steps": 2, "guidances": [1.0, 2.0]} | more
    return Run.start(
        folder, reconstruction.NAME, data, reconstruction.settings(sources, **settings)
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_from_nothing_to_figures(
    tmp_path: Path,
    tiny_folder: Path,
    inspector_folder: Path,
    make_backends: Callable[..., Backends],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconstruction, "FEWEST_FOR_KERNEL", 7)
    run = start(tmp_path / "run", tiny_folder, "true", "ours=model:" + str(tiny_folder), f"z=z:{tiny_folder}")  # fmt: skip
    backends = make_backends()
    tally = reconstruction.predict(run, backends)
    assert (tally.done, tally.failed) == (2 * 7 + 3 * 2 * 7, 0)
    assert reconstruction.predict(run, backends).skipped == tally.done
    for spec in ("pixels", f"toy=inspector:{inspector_folder}"):
        assert judge(run, spec, backends).done == 7 + 3 * 2 * 7
        assert judge(run, spec, backends).done == 0
    section = score_experiment(run, seed=0)
    figures = {figure.key: figure for figure in section.figures}

    row = next(r for r in lines(run.folder / "judgements/toy.jsonl") if (r["source"], r["guidance"]) == ("z", 2.0))  # fmt: skip
    assert len(row["objects"]) == 3
    sums = np.sum([r["claims"] for r in lines(run.folder / "judgements/toy.jsonl") if (r["source"], r["guidance"]) == ("z", 2.0)], 0)  # fmt: skip
    assert figures["z.g2.toy.claims"].estimate.value == pytest.approx(sums[2] / sums[1])
    real, drawn = (np.load(run.folder / f"features/toy/{name}.npy") for name in ("original-g0", "z-g2"))  # fmt: skip
    kid = figures["z.g2.toy.kid"].estimate
    assert kid.low <= kernel_distance(real, drawn, paired=True) <= kid.high
    assert "z.g2.toy.fid" not in figures, "fewer images than features"

    content = json.loads((run.folder / "result.json").read_text())
    assert content["settings"]["steps"] == 2
    assert content["settings"]["judge toy"]["instrument"] == "inspector"
    assert content["data"] == {"split": "test", "seed": 3, "num": 7, "files": 0}
    assert content["figures"]["ours.g1.truncated"]["n"] == 7
    assert any("no FID and no KID of 7 images" in note for note in content["notes"])
    assert any("only 7 samples" in note for note in content["notes"])


@pytest.mark.slow
def test_the_generator_is_that_of_the_model_and_of_the_seed(
    tmp_path: Path, tiny_folder: Path, make_backends: Callable[..., Backends]
) -> None:
    backends = make_backends()
    run = start(tmp_path / "run", tiny_folder, "true", f"z=z:{tiny_folder}")
    reconstruction.predict(run, backends)
    pipe, sample = backends.pipeline(str(tiny_folder)), run.data.samples()[4]
    texts = pipe.decoder.encode_text([sample.references[0]]).c
    for source, c in (("true", texts), ("z", pipe.context(pipe.embed([sample.load()])))):
        (expected,) = pipe.draw(c, seed=[sample.seed], steps=2, guidance=2.0)
        with Image.open(image_path(run, source, 2.0, sample.id)) as found:
            difference = np.abs(np.asarray(found, int) - np.asarray(expected, int)).max()
        assert difference <= 1  # another batch


@pytest.mark.slow
def test_pictures_in_bfloat16_are_nearly_those_in_float32(
    tmp_path: Path, tiny_folder: Path, make_backends: Callable[..., Backends]
) -> None:
    """Captions stay in float32; what draws them, and what makes z, does not."""
    backends, sources = make_backends(), ("ours=model:" + str(tiny_folder), f"z=z:{tiny_folder}")
    full = start(tmp_path / "full", tiny_folder, *sources)
    half = start(tmp_path / "half", tiny_folder, *sources, dtype="bfloat16")
    assert "dtype" not in full.settings, "as in runs from before it was a setting"
    assert half.settings["dtype"] == "bfloat16"
    for run in (full, half):
        reconstruction.predict(run, backends)
    assert lines(half.folder / "captions/ours.jsonl") == lines(full.folder / "captions/ours.jsonl")
    for source in ("ours", "z"):
        one, two = (
            [
                np.asarray(Image.open(image_path(run, source, 2.0, sample.id)), int)
                for sample in run.data.samples()
            ]
            for run in (full, half)
        )
        difference = np.abs(np.array(one) - np.array(two))
        assert 0 < difference.mean() < 2, "of 255 levels"
    assert half.table_settings("images/z-g2")["dtype"] == "bfloat16"
    pipe = backends.pipeline(str(tiny_folder), torch.bfloat16)
    assert (pipe.unet.dtype, pipe.encoder.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)  # fmt: skip


@pytest.mark.slow
def test_an_interrupted_prediction_goes_on(
    tmp_path: Path,
    tiny_folder: Path,
    make_backends: Callable[..., Backends],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = start(tmp_path / "whole", tiny_folder, "true", guidances=[2.0])
    reconstruction.predict(whole, make_backends())
    prepare, calls = ModelGenerator.prepare, []

    def failing(self: ModelGenerator, *arguments: Any) -> Any:
        job = prepare(self, *arguments)

        def drawn() -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return job()

        return drawn

    monkeypatch.setattr(ModelGenerator, "prepare", failing)
    run = start(tmp_path / "run", tiny_folder, "true", guidances=[2.0])
    with pytest.raises(KeyboardInterrupt):
        reconstruction.predict(run, make_backends())
    tally = reconstruction.predict(run, make_backends())
    assert (tally.skipped, tally.done) == (7 + 3, 4)
    name = "images/true-g2.jsonl"
    assert lines(run.folder / name) == lines(whole.folder / name)


def test_other_settings_are_not_mixed_in(tmp_path: Path, tiny_folder: Path) -> None:
    start(tmp_path / "run", tiny_folder, "true")
    with pytest.raises(OutputError, match="other settings") as raised:
        start(tmp_path / "run", tiny_folder, "true", steps=3)
    assert "name another folder" in str(raised.value)
    with pytest.raises(DataError, match="no run of an experiment"):
        Run.open(tmp_path)


def test_controls_are_other_captions_and_shuffled_words(
    tmp_path: Path, tiny_folder: Path, make_backends: Callable[..., Backends]
) -> None:
    run = start(tmp_path / "run", tiny_folder, "true", "other", "words", guidances=[1.0])
    predict_captions(run, make_backends())
    true, other, words = ([r["caption"] for r in lines(run.folder / f"captions/{n}.jsonl")] for n in ("true", "other", "words"))  # fmt: skip
    assert other == [*true[1:], true[0]]
    assert words != true
    assert [sorted(w.split()) for w in words] == [sorted(t.split()) for t in true]


# --- files of a user -----------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        pixels = rng.integers(256, size=(40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"COCO_val2014_{number:012d}.png")
    return folder


@pytest.mark.slow
def test_captions_of_a_file_and_missing_ones(
    tmp_path: Path, tiny_folder: Path, pictures: Path, make_backends: Callable[..., Backends]
) -> None:
    """As `vlv caption` writes them, with one missing; and a picture that cannot be opened."""
    rows = [{"id": f"COCO_val2014_{n:012d}.png", "caption": f"A cube {n}.", "n_tokens": 4} for n in range(3)]  # fmt: skip
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSet(None, 0, None, (str(pictures),))
    run = start(tmp_path / "run", tiny_folder, f"theirs=file:{tmp_path / 'captions.jsonl'}", f"z=z:{tiny_folder}", data=data, guidances=[1.0])  # fmt: skip
    broken = pictures / "COCO_val2014_000000000001.png"
    kept = broken.read_bytes()
    broken.write_bytes(kept[:60])
    tally = reconstruction.predict(run, make_backends())
    assert (tally.done, tally.failed) == (3 + 3 + 3, 1 + 1)
    assert (
        judge(run, "pixels", make_backends()).failed == 2
    )  # the original, and what was drawn of its caption
    content_notes = score_experiment(run, seed=0)
    assert {figure.estimate.n for figure in content_notes.figures if "psnr" in figure.key} == {2, 3}
    notes = json.loads((run.folder / "result.json").read_text())["notes"]
    assert any("1 of 4 captions failed" in note for note in notes)
    broken.write_bytes(kept)
    again = reconstruction.predict(run, make_backends())
    assert (again.done, again.failed) == (1, 1)


def test_captions_of_other_pictures_are_refused(
    tmp_path: Path, tiny_folder: Path, pictures: Path, make_backends: Callable[..., Backends]
) -> None:
    (tmp_path / "captions.jsonl").write_text('{"id": "elsewhere.png", "caption": "A cube."}\n')
    data = DataSet(None, 0, None, (str(pictures),))
    run = start(tmp_path / "run", tiny_folder, f"theirs=file:{tmp_path / 'captions.jsonl'}", data=data)  # fmt: skip
    with pytest.raises(
        DataError, match=r"elsewhere.png and others.*belongs to a sample such as COCO"
    ):
        reconstruction.predict(run, make_backends())


def test_references_in_the_form_of_coco(tmp_path: Path, pictures: Path) -> None:
    content = {
        "images": [{"id": 7, "file_name": "COCO_val2014_000000000002.png"}],
        "annotations": [{"image_id": 7, "caption": "One."}, {"image_id": 7, "caption": "Two."}],
    }
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps(content))
    assert read_references(path) == {"COCO_val2014_000000000002.png": ["One.", "Two."]}
    samples = DataSet(None, 0, None, (str(pictures),), str(path)).samples()
    assert [sample.references for sample in samples] == [(), (), ("One.", "Two."), ()]
    path.write_text('{"images": [], "annotations": [{"image_id": 1}]}')
    with pytest.raises(DataError, match="holds no captions"):
        read_references(path)


# --- endpoints -----------------------------------------------------------------------------------------


def test_captions_of_an_endpoint_that_fails_half_way(
    tmp_path: Path, tiny_folder: Path, make_backends: Callable[..., Backends]
) -> None:
    backends = make_backends(store=tmp_path / "answers")
    with ScriptedServer(always("say A red cube.")) as server:
        server.script = lambda body, times: "say A red cube." if server.requests <= 4 else "401"
        spec = f"theirs=endpoint:painter@{server.url}"
        run = start(tmp_path / "run", tiny_folder, spec, guidances=[1.0])
        with pytest.raises(EndpointError, match="does not accept the key"):
            reconstruction.predict(run, backends)
        kept = len(lines(run.folder / "captions/theirs.jsonl"))
        assert 1 <= kept <= 4
        server.script = always("say A red cube.")
        tally = reconstruction.predict(run, backends)
        assert (tally.skipped, tally.done) == (kept, 7 - kept + 7)
        asked = server.requests
        assert reconstruction.predict(run, backends).done == 0
        assert server.requests == asked
    row = lines(run.folder / "captions/theirs.jsonl")[0]
    assert (row["caption"], row["model"]) == ("A red cube.", "scripted/painter")
    backends.close()


def test_refusals_fail_one_caption_each(
    tmp_path: Path, tiny_folder: Path, make_backends: Callable[..., Backends]
) -> None:
    with ScriptedServer(always("refusal")) as server:
        run = start(tmp_path / "run", tiny_folder, f"theirs=endpoint:painter@{server.url}")
        tally = reconstruction.predict(run, make_backends())
    assert (tally.done, tally.failed) == (0, 7)
    assert "gave no text" in lines(run.folder / "captions/theirs.jsonl")[0]["error"]


# --- other generators and instruments --------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers_folder(tiny_parts: tiny.TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    StableDiffusionPipeline(
        vae=tiny_parts.vae, text_encoder=tiny_parts.text_encoder, unet=tiny_parts.unet,
        tokenizer=tiny_parts.tokenizer, scheduler=tiny_parts.scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.slow
def test_any_pipeline_of_diffusers_draws(
    tmp_path: Path, diffusers_folder: Path, make_backends: Callable[..., Backends]
) -> None:
    run = start(tmp_path / "run", "", "true", generator=f"diffusers:{diffusers_folder}", guidances=[3.0])  # fmt: skip
    tally = reconstruction.predict(run, make_backends())
    assert (tally.done, tally.truncated) == (14, 7)  # 16 positions hold no detailed caption
    generator = DiffusersGenerator(str(diffusers_folder), 2, torch.device("cpu"))
    drawn = generator.prepare(["a cube", "a cube"], [1, 1], 3.0)()
    assert drawn.truncated == [False, False]
    first, second = (np.asarray(picture, int) for picture in drawn.images)
    assert np.abs(first - second).max() <= 1
    again = generator.prepare(["a ball", "a cube"], [9, 1], 3.0)().images[1]
    assert np.abs(np.asarray(again, int) - first).max() <= 1
    half = make_backends().generator(f"diffusers:{diffusers_folder}", 2, torch.bfloat16)
    assert isinstance(half, DiffusersGenerator)
    assert half.pipe.unet.dtype == torch.bfloat16
    (rough,) = half.prepare(["a cube"], [1], 3.0)().images
    assert 0 < np.abs(np.asarray(rough, int) - first).mean() < 4, "of 255 levels"


@pytest.mark.slow
def test_inception_looks_at_a_run(
    tmp_path: Path,
    tiny_folder: Path,
    make_backends: Callable[..., Backends],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconstruction, "FEWEST_FOR_KERNEL", 3)
    torch.manual_seed(0)
    save_file({k: v for k, v in FIDInception().state_dict().items() if "tracked" not in k}, tmp_path / "w.safetensors")  # fmt: skip
    run = start(tmp_path / "run", tiny_folder, "true", data=DataSet("test", 0, 3), guidances=[1.0])
    reconstruction.predict(run, make_backends())
    judge(run, f"fid=inception:{tmp_path / 'w.safetensors'}", make_backends())
    figures = {f.key for f in score_experiment(run, seed=0).figures}
    assert "true.g1.fid.kid" in figures
    assert "true.g1.fid.fid" not in figures, "fewer images than features"
    about = json.loads((run.folder / "result.json").read_text())["settings"]["judge fid"]
    assert about["resize"].endswith("(pytorch-fid)")
    with pytest.raises(OutputError, match=r"other settings .*resize was.*give it another name"):
        judge(run, f"fid=inception:{tmp_path / 'w.safetensors'}", make_backends(), resize="clean-fid")  # fmt: skip


def test_what_is_no_instrument_is_refused() -> None:
    for text in ("pixels:8", "inception", "dino:x", "boxes"):
        with pytest.raises(ConfigError, match="is no instrument"):
            make_instrument(Judge.parse(text), Backends())


# --- the command line ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_three_commands_and_a_baseline(
    tmp_path: Path, tiny_folder: Path, inspector_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def steps(folder: Path, guidance: str) -> None:
        more = ["--generator", f"model:{tiny_folder}", "--steps", "2", "--guidance", guidance]
        assert vlv(["eval", "predict", "reconstruction", "--run-dir", str(folder), "--from", "true", "--num", "5", *more]) == 0  # fmt: skip
        assert vlv(["eval", "judge", str(folder), "--judge", f"toy=inspector:{inspector_folder}"]) == 0  # fmt: skip

    one, two = tmp_path / "one", tmp_path / "two"
    steps(one, "2"), steps(two, "2")
    assert vlv(["eval", "score", str(one)]) == 0
    assert "true claims found" in capsys.readouterr().out
    assert vlv(["eval", "score", str(two), "--baseline", str(one)]) == 0
    shown = capsys.readouterr()
    assert "true.g2.toy.claims: +0.0000 against the baseline" in shown.out
    assert "p = 1" in shown.out
    assert "written:" in shown.err
    compared = json.loads((two / "result.json").read_text())["comparisons"]["true.g2.toy.claims"]
    assert (compared["difference"], compared["p"], compared["n"]) == (0, 1, 5)


@pytest.mark.slow
def test_the_dtype_is_stated_and_not_mixed(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def predict(dtype: str) -> int:
        more = ["--generator", f"model:{tiny_folder}", "--steps", "1", "--guidance", "1", "--device", "cpu"]  # fmt: skip
        command = ["eval", "predict", "reconstruction", "--run-dir", str(tmp_path / "run")]
        return vlv([*command, "--from", "true", "--num", "2", *more, "--dtype", dtype])

    assert predict("bfloat16") == 0
    assert vlv(["eval", "judge", str(tmp_path / "run"), "--judge", "pixels"]) == 0
    assert vlv(["eval", "score", str(tmp_path / "run")]) == 0
    settings = json.loads((tmp_path / "run" / "result.json").read_text())["settings"]
    assert settings["dtype"] == "bfloat16"
    for other in ("float32", "auto"):
        assert predict(other) == 1
        assert "was made with other settings" in capsys.readouterr().err
    assert predict("bf32") == 1
    assert "choose auto or one of float32, float16, bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "reconstruction", "--from", "nobody"], "is no source"),
        (["predict", "reconstruction", "--from", "true", "--from", "true"], "two sources are called true"),
        (["predict", "reconstruction", "--from", "model"], "needs a value"),
        (["predict", "reconstruction", "--from", "true", "--generator", "x"], "is no generator"),
        (["predict", "reconstruction", "--from", "t=endpoint:x", "--num", "2"], "is no endpoint"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vlv(["eval", *arguments, "--run-dir", str(tmp_path / "run")]) == 1
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in shown


def test_steps_out_of_order_say_what_to_do(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(tmp_path / "run", tiny_folder, "true")
    assert vlv(["eval", "judge", str(run.folder), "--judge", "pixels"]) == 1
    assert "begin with vlv eval predict" in capsys.readouterr().err
    assert vlv(["eval", "score", str(run.folder)]) == 1
    assert "begin with vlv eval judge" in capsys.readouterr().err
    assert vlv(["eval", "score", str(tmp_path)]) == 1
    assert "is no run of an experiment" in capsys.readouterr().err


def test_captions_of_a_file_may_hold_any_line_separator(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_bytes(to_line({"id": "a", "caption": "one\u2028two\x85"}) * 2)
    assert [row["caption"] for row in read_rows(path)] == ["one\u2028two\x85"] * 2
    path.write_bytes(b'{"caption": "\xff"}')
    with pytest.raises(DataError, match="the text is not UTF-8"):
        read_rows(path)
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        read_rows(tmp_path / "none.jsonl")
