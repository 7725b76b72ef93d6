"""Captions against references, against the truth, and with CLIP: figures as by hand, and every step resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.support import judge, save_clip
from vlv.cli import run as vlv
from vlv.errors import ConfigError, DataError, OutputError
from vlv.evaluation.experiments import arena
from vlv.evaluation.experiments.judging import judge_run, score_experiment
from vlv.evaluation.experiments.predicting import predict_captions
from vlv.evaluation.experiments.run import Judge, Run, by_id
from vlv.evaluation.experiments.samples import DataSet
from vlv.evaluation.experiments.viewing import captions_of
from vlv.evaluation.metrics.features import ClipScore
from vlv.evaluation.metrics.sentences import bleu, bleu_counts, cider_d, rouge_l
from vlv.toyworld.language import compare, parse, true_claims

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vlv.evaluation.experiments.backends import Backends
    from vlv.evaluation.results import Figure

REFERENCES: dict[str, list[str]] = {
    "0.png": ["A red cube stands on grass.", "There is a cube on a green meadow.", "A cube."],
    "1.png": ["Two dogs run over the sand.", "The dogs are running on a beach."],
    "2.png": ["A man's bicycle leans on the wall of a house."],
    "3.png": ["A bowl of soup with bread next to it.", "Soup and bread on a table."],
}
OURS = {
    "0.png": "A red cube on a green meadow.",
    "1.png": "Two dogs run on the sand of a beach.",
    "2.png": "A bicycle stands before a house.",
    "3.png": "A bowl of soup on a table.",
}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in REFERENCES:
        pixels = rng.integers(256, size=(40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_references(path: Path, references: dict[str, list[str]]) -> Path:
    rows = [{"id": id, "captions": texts} for id, texts in references.items()]
    return write_lines(path, rows)


def start(folder: Path, pictures: Path, ours: dict[str, str], references: Path | None) -> Run:
    """A run whose captions are written."""
    file = write_lines(
        folder.with_suffix(".jsonl"), [{"id": i, "caption": t} for i, t in ours.items()]
    )
    data = DataSet(None, 0, None, (str(pictures),), None if references is None else str(references))
    return Run.start(folder, arena.NAME, data, arena.settings([f"ours=file:{file}"]))


@pytest.fixture
def run(tmp_path: Path, pictures: Path, make_backends: Callable[..., Backends]) -> Run:
    run = start(tmp_path / "run", pictures, OURS, write_references(tmp_path / "r.jsonl", REFERENCES))  # fmt: skip
    predict_captions(run, make_backends())
    return run


@pytest.fixture
def toy(tmp_path: Path, make_backends: Callable[..., Backends]) -> Run:
    """Six scenes."""
    settings = arena.settings(["true", "again", "words", "other"])
    run = Run.start(tmp_path / "toy", arena.NAME, DataSet("test", 3, 6), settings)
    predict_captions(run, make_backends())
    return run


def lines(run: Run, name: str) -> list[dict[str, Any]]:
    path = run.folder / f"judgements/{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def figures(run: Run, baseline: Path | None = None) -> dict[str, Figure]:
    return {figure.key: figure for figure in score_experiment(run, 0, baseline).figures}


def values(run: Run) -> dict[str, float]:
    return {key: figure.estimate.value for key, figure in figures(run).items()}


def result(run: Run) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run.folder / "result.json").read_text())
    return content


# --- references ------------------------------------------------------------------------------------------


def by_hand(ours: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    pairs = list(zip(ours, references, strict=True))
    sums = np.sum([bleu_counts(*pair).columns for pair in pairs], 0).astype(float)
    found = {f"ours.references.bleu{n}": float(bleu(sums, n)) for n in (1, 2, 3, 4)}
    found["ours.references.rouge_l"] = float(np.mean([rouge_l(*pair) for pair in pairs]))
    found["ours.references.cider_d"] = float(np.mean(cider_d(ours, references)))
    return found


def test_figures_are_those_of_the_functions(
    run: Run, make_backends: Callable[..., Backends]
) -> None:
    assert judge(run, "references", make_backends()).done == 4
    expected = by_hand(list(OURS.values()), list(REFERENCES.values()))
    found = figures(run)
    assert {key: figure.estimate.value for key, figure in found.items()} == pytest.approx(expected)
    assert 0 < expected["ours.references.bleu4"] < expected["ours.references.bleu1"] < 1
    for figure in found.values():
        e = figure.estimate
        assert e.n == 4
        assert e.low < e.value < e.high
    row = lines(run, "references")[1]
    assert (row["id"], row["caption"], row["references"]) == ("1.png", OURS["1.png"], REFERENCES["1.png"])  # fmt: skip
    content = result(run)
    assert content["settings"]["texts of references"] == "4 images, 1 to 3 captions each"
    assert len(content["settings"]["judge references"]["references"]) == 64
    (table,) = content["tables"]
    assert table["rows"][0]["n"] == 4
    assert table["rows"][0]["CIDEr-D"] == pytest.approx(expected["ours.references.cider_d"])


def test_the_example_of_a_textbook(
    tmp_path: Path, pictures: Path, make_backends: Callable[..., Backends]
) -> None:
    """Papineni et al. (2002), example 1; BLEU-4 as NLTK's documentation gives it, 17 / 18 unigrams as the paper does."""
    caption = "It is a guide to action which ensures that the military always obeys the commands of the party."
    known = [
        "It is a guide to action that ensures that the military will forever heed Party commands.",
        "It is the guiding principle which guarantees the military forces always being under the command of the Party.",
        "It is the practical guide for the army always to heed the directions of the party.",
    ]
    references = write_references(tmp_path / "r.jsonl", {"0.png": known})
    run = start(tmp_path / "run", pictures, {"0.png": caption}, references)
    predict_captions(run, make_backends())
    judge(run, "references", make_backends())
    found = values(run)
    assert found["ours.references.bleu4"] == pytest.approx(0.5045666840058485)
    assert found["ours.references.bleu1"] == pytest.approx(17 / 18)
    assert found["ours.references.cider_d"] == 0
    assert any("of one image it is 0" in note for note in result(run)["notes"])


def test_what_is_judged_is_not_judged_again(
    run: Run, make_backends: Callable[..., Backends]
) -> None:
    judge(run, "references", make_backends())
    before = (run.folder / "judgements/references.jsonl").read_bytes()
    tally = judge(run, "references", make_backends())
    assert (tally.done, tally.skipped, tally.failed) == (0, 4, 0)
    assert (run.folder / "judgements/references.jsonl").read_bytes() == before


def test_an_interrupted_judge_goes_on(run: Run, make_backends: Callable[..., Backends]) -> None:
    def interrupt(rows: Sequence[dict[str, Any]]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge_run(run, Judge.parse("references"), make_backends(), interrupt)
    assert len(lines(run, "references")) == 3  # one batch
    tally = judge(run, "references", make_backends())
    assert (tally.done, tally.skipped) == (1, 3)
    assert [row["id"] for row in lines(run, "references")] == list(REFERENCES)
    assert values(run) == pytest.approx(by_hand(list(OURS.values()), list(REFERENCES.values())))


def test_a_picture_without_reference_fails_alone(
    tmp_path: Path, pictures: Path, make_backends: Callable[..., Backends]
) -> None:
    some = {id: texts for id, texts in REFERENCES.items() if id != "2.png"}
    run = start(tmp_path / "run", pictures, OURS, write_references(tmp_path / "r.jsonl", some))
    predict_captions(run, make_backends())
    tally = judge(run, "references", make_backends())
    assert (tally.done, tally.failed) == (3, 1)
    (bad,) = [row for row in lines(run, "references") if row.get("error")]
    assert bad["id"] == "2.png"
    assert "2.png has no reference caption" in bad["error"]
    ours = [text for id, text in OURS.items() if id in some]
    assert values(run) == pytest.approx(by_hand(ours, list(some.values())))
    assert "references: 1 of 4 judgements failed" in result(run)["notes"]


def test_without_any_reference_it_says_so_at_once(
    tmp_path: Path,
    pictures: Path,
    make_backends: Callable[..., Backends],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = start(tmp_path / "run", pictures, OURS, None)
    predict_captions(run, make_backends())
    assert vlv(["eval", "judge", str(run.folder), "--judge", "references"]) == 1
    assert "none of the 4 images has a reference caption" in capsys.readouterr().err
    assert not (run.folder / "judgements").exists()


def test_other_references_are_not_mixed_in(
    run: Run, tmp_path: Path, make_backends: Callable[..., Backends]
) -> None:
    judge(run, "references", make_backends())
    write_references(tmp_path / "r.jsonl", {**REFERENCES, "0.png": ["A blue cube."]})
    with pytest.raises(OutputError, match="references was"):
        judge(run, "references", make_backends())
    assert judge(run, "changed=references", make_backends()).done == 4


def test_every_source_is_weighed_alike(toy: Run, make_backends: Callable[..., Backends]) -> None:
    """A source that lacks a caption has the weights of all samples."""
    path = toy.folder / "captions/other.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    judge(toy, "references", make_backends())
    found = figures(toy)
    assert found["other.references.cider_d"].estimate.n == 5
    samples = toy.data.samples()
    known = [sample.references for sample in samples]
    texts = {id: row["caption"] for id, row in captions_of(toy, "other").items()}
    expected = cider_d(list(texts.values()), known[1:], known)
    assert found["other.references.cider_d"].estimate.value == pytest.approx(np.mean(expected))
    assert found["true.references.cider_d"].estimate.value == pytest.approx(10)
    assert found["words.references.bleu1"].estimate.value == 1
    assert found["words.references.bleu4"].estimate.value < 0.2
    notes = [note for note in result(toy)["notes"] if "are references themselves" in note]
    assert len(notes) == 1
    assert "captions of true are" in notes[0]


def test_two_runs_are_compared_pair_by_pair(
    run: Run, tmp_path: Path, pictures: Path, make_backends: Callable[..., Backends]
) -> None:
    worse = {**OURS, "0.png": "A blue ball.", "1.png": "A cat sleeps in the sun."}
    other = start(tmp_path / "other", pictures, worse, tmp_path / "r.jsonl")
    predict_captions(other, make_backends())
    for one in (run, other):
        judge(one, "references", make_backends())
    theirs = values(other)
    ours = figures(run, other.folder)
    compared = result(run)["comparisons"]
    assert compared.keys() == ours.keys()
    for key, figure in ours.items():
        gain = figure.estimate.value - theirs[key]
        assert compared[key]["difference"] == pytest.approx(gain)
        assert gain > 0
        assert 0 < compared[key]["p"] <= 1


# --- claims ----------------------------------------------------------------------------------------------


def test_claims_of_captions(toy: Run, make_backends: Callable[..., Backends]) -> None:
    assert judge(toy, "facts=claims", make_backends()).done == 24
    found, known = values(toy), by_id(toy.data.samples())
    for name in ("true", "again", "words", "other"):
        counts = [compare(parse(row["caption"]), known[id].scene) for id, row in captions_of(toy, name).items()]  # fmt: skip
        stated, true, correct = (sum(getattr(c, k) for c in counts) for k in ("stated", "true", "correct"))  # fmt: skip
        assert found[f"{name}.facts.precision"] == pytest.approx(correct / stated)
        assert found[f"{name}.facts.recall"] == pytest.approx(correct / true)
        assert found[f"{name}.facts.f1"] == pytest.approx(2 * correct / (stated + true))
        assert found[f"{name}.facts.hallucinated"] == pytest.approx(1 - correct / stated)
    assert found["again.facts.f1"] == 1
    assert found["other.facts.hallucinated"] > 0.3


def test_told_again_in_other_words(toy: Run) -> None:
    told = captions_of(toy, "again")
    for sample in toy.data.samples():
        caption = told[sample.id]["caption"]
        assert caption != sample.references[0]
        assert parse(caption).scene == true_claims(sample.scene).scene


def test_the_truth_of_files_is_not_known(
    run: Run, tmp_path: Path, pictures: Path, make_backends: Callable[..., Backends]
) -> None:
    with pytest.raises(ConfigError, match="the judge claims is for the toy world"):
        judge(run, "claims", make_backends())
    data = DataSet(None, 0, None, (str(pictures),))
    other = Run.start(tmp_path / "again", arena.NAME, data, arena.settings(["again"]))
    with pytest.raises(
        ConfigError, match=r"the truth of 0\.png is not known, as it is in the toy world only"
    ):
        predict_captions(other, make_backends())


# --- CLIP ------------------------------------------------------------------------------------------------


def test_clip_reads_captions_of_any_length(
    run: Run, tmp_path: Path, pictures: Path, make_backends: Callable[..., Backends]
) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    spec = f"clip=clip:{save_clip(folder)}"
    (pictures / "3.png").write_bytes(b"no picture")
    tally = judge(run, spec, make_backends())
    assert (tally.done, tally.failed) == (3, 1)
    rows = {row["id"]: row for row in lines(run, "clip")}
    assert "3.png" in rows["3.png"]["error"]
    images = [sample.load() for sample in run.data.samples()[:3]]
    expected = ClipScore(str(folder)).in_pieces(images, list(OURS.values())[:3])
    assert [rows[f"{i}.png"]["clip_score"] for i in range(3)] == pytest.approx(expected.scores, abs=1e-5)  # fmt: skip
    assert [rows[f"{i}.png"]["in_pieces"] for i in range(3)] == expected.truncated.tolist()
    found = values(run)
    assert found["ours.clip.clip"] == pytest.approx(expected.scores.mean(), abs=1e-5)
    assert found["ours.clip.in_pieces"] == pytest.approx(expected.truncated.mean())


def test_what_measures_nothing_is_refused(run: Run, make_backends: Callable[..., Backends]) -> None:
    for wrong in ("x=references:y", "clip", "claims:z"):
        with pytest.raises(ConfigError, match="write references, claims or clip:MODEL"):
            judge(run, wrong, make_backends())
    with pytest.raises(ConfigError, match="pairs has no effect on the judge references"):
        judge(run, "references", make_backends(), pairs=True)
    with pytest.raises(DataError, match=r"nothing of .* has been judged"):
        score_experiment(run, 0)


# --- commands --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_commands_and_the_pages(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, references = tmp_path / "run", write_references(tmp_path / "r.jsonl", REFERENCES)
    predict = ["eval", "predict", "arena", "--run-dir", str(folder), "--from", "true", "--from", "words"]  # fmt: skip
    assert vlv([*predict, "--references", str(references)]) == 1
    assert "--references has no effect without --images" in capsys.readouterr().err
    files = ["--images", str(pictures), "--references", str(references)]
    assert vlv([*predict, *files]) == 0
    assert vlv(["eval", "judge", str(folder), "--judge", "references"]) == 0
    assert vlv(["eval", "judge", str(folder), "--judge", "references"]) == 0
    assert "skipped 8" in capsys.readouterr().err
    assert vlv(["eval", "score", str(folder)]) == 0
    assert "words: CIDEr-D (references)" in capsys.readouterr().out
    content = json.loads((folder / "result.json").read_text())
    assert content["figures"]["words.references.bleu4"]["value"] == 0
    document, page = tmp_path / "results.md", tmp_path / "report.html"
    assert vlv(["eval", "results", str(folder), "-o", str(document)]) == 0
    rouge, cider = (content["figures"][f"words.references.{k}"]["value"] for k in ("rouge_l", "cider_d"))  # fmt: skip
    text = document.read_text()
    assert "\nseed: 1; files: 1;" in text  # of the data
    assert text.split("\n## run: ")[1].splitlines()[2].endswith("; seed of intervals: 0")
    assert "| captions | BLEU-1 | BLEU-2 | BLEU-3 | BLEU-4 | ROUGE-L | CIDEr-D | n |" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| words | 1.000")]
    assert row.endswith(f"| 0.000 | {rouge:.3f} | {cider:.3f} | 4 |")
    assert "| true: BLEU-4 (references) | 1.000 | 1.000 to 1.000 | 4 |" in text
    pytest.importorskip("matplotlib")
    assert vlv(["eval", "report", str(folder), "-o", str(page)]) == 0
    assert f'<td class="number">{cider:.3f}</td><td class="number">4</td>' in page.read_text()
