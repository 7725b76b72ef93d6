"""Questions answered from captions: the official files, readers, shots, and figures."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.endpoint.server import ScriptedServer, text_of
from tests.evaluation.support import judge
from vlv.cli import run as vlv
from vlv.errors import ConfigError, DataError
from vlv.evaluation.experiments import vqa
from vlv.evaluation.experiments.judging import score_experiment
from vlv.evaluation.experiments.predicting import predict_captions
from vlv.evaluation.experiments.run import Run
from vlv.evaluation.experiments.samples import DataSet
from vlv.toyworld.language import parse

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vlv.evaluation.experiments.backends import Backends


def toy(folder: Path, backends: Backends, num: int = 6) -> Run:
    run = Run.start(folder, vqa.NAME, DataSet("test", 3, num), vqa.settings(["true", "other"]))
    predict_captions(run, backends)
    return run


def figures(run: Run) -> dict[str, float]:
    return {f.key: f.estimate.value for f in score_experiment(run, seed=0).figures}


def test_true_captions_answer_every_question(
    tmp_path: Path, make_backends: Callable[..., Backends]
) -> None:
    """All but whether something is there that the caption cannot rule out is said; so is that."""
    run = toy(tmp_path / "run", make_backends(), num=40)
    assert judge(run, "parser", make_backends()).failed == 0
    assert judge(run, "parser", make_backends()).done == 0
    found = figures(run)
    assert found["true.parser.accuracy"] == found["true.parser.exact"] == 1
    assert found["other.parser.accuracy"] < 0.5


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("is there a red cube?", "yes"),
        ("is there a blue cube?", "no"),
        ("is there a cone?", "no"),
        ("how many objects are there?", "two"),
        ("what kind of picture is it?", "unknown"),
        ("what colour is the sphere?", "unknown"),
        ("what shape is the object on the left?", "cube"),
        ("what shape is the object on the right?", "unknown"),
        ("is the cube to the left or to the right of the sphere?", "left"),
        ("is the sphere to the left or to the right of the cube?", "right"),
        ("why?", "unknown"),
    ],
)
def test_the_reader_says_only_what_the_caption_says(question: str, answer: str) -> None:
    claims = parse(
        "There is a red cube on the left and a ball. The cube is to the left of the ball."
    )
    assert vqa.answer_from_claims(question, claims) == answer


def test_an_endpoint_reads_with_examples(
    tmp_path: Path, make_backends: Callable[..., Backends]
) -> None:
    """It answers what the last example was answered with: the examples are there, and of other pictures."""
    run = toy(tmp_path / "run", make_backends())
    prompts: list[str] = []

    def script(body: dict[str, Any], times: int) -> str:
        prompts.append(text_of(body))
        return "empty" if len(prompts) == 1 else "say Answer: yes\nQuestion: and then?"

    with ScriptedServer(script) as server:
        spec = f"llm4=endpoint:reader@{server.url}"
        tally = judge(run, spec, make_backends(), shots=4)
        assert tally.failed == 1
        assert judge(run, spec, make_backends(), shots=4).done == 1
    assert all(prompt.count("Question:") == 5 for prompt in prompts)
    assert all(prompt.startswith(vqa.INSTRUCTION) for prompt in prompts)
    assert all(prompt.endswith("Answer:") for prompt in prompts)
    rows = [json.loads(line) for line in (run.folder / "judgements/llm4.jsonl").read_text().splitlines()]  # fmt: skip
    assert {row["answer"] for row in rows} == {"yes"}
    asked = [q for q in vqa.questions_of(run) if q.answers[0] == "yes"]
    total = len(vqa.questions_of(run))
    assert figures(run)["true.llm4.accuracy"] == pytest.approx(len(asked) / total)


def test_examples_are_of_other_pictures_and_the_same_again(
    tmp_path: Path, make_backends: Callable[..., Backends]
) -> None:
    questions = vqa.questions_of(toy(tmp_path / "run", make_backends()))
    for question in questions[:8]:
        shots = vqa.pick_shots(question, questions, 4, seed=1)
        assert len({shot.id for shot in shots}) == 4
        assert all(shot.sample != question.sample for shot in shots)
        assert shots == vqa.pick_shots(question, questions, 4, seed=1)
    assert vqa.pick_shots(questions[0], questions, 4, 1) != vqa.pick_shots(questions[1], questions, 4, 1)  # fmt: skip
    with pytest.raises(ConfigError, match="fewer shots"):
        vqa.pick_shots(questions[0], questions, 99, seed=1)


def test_a_local_language_model_reads(
    tmp_path: Path, tiny_parts: tiny.TinyParts, make_backends: Callable[..., Backends]
) -> None:
    tiny_parts.llm.save_pretrained(tmp_path / "llm")
    tiny.make_llm_tokenizer().save_pretrained(tmp_path / "llm")
    run = toy(tmp_path / "run", make_backends(), num=2)
    tally = judge(run, f"llm:{tmp_path / 'llm'}", make_backends())
    assert tally.failed == 0
    assert tally.done == 2 * len(vqa.questions_of(run))
    assert "true.llm.accuracy" in figures(run)


# --- the official files ------------------------------------------------------------------------------------


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """Two pictures, three questions about them, and one about a third."""
    (tmp_path / "images").mkdir()
    for number in (42, 73):
        pixels = np.full((20, 30, 3), number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/COCO_val2014_{number:012d}.jpg")
    asked = [(42, 420, "What colour?"), (42, 421, "How many?"), (73, 730, "Is it?"), (99, 990, "?")]
    questions = [{"image_id": i, "question_id": q, "question": text} for i, q, text in asked]
    answers = {420: ["grey"] * 9 + ["gray"], 421: ["2"] * 10, 730: ["yes"] * 2 + ["no"] * 8, 990: ["x"] * 10}  # fmt: skip
    annotations = [
        {
            "image_id": i, "question_id": q, "question_type": "x", "answer_type": "other",
            "multiple_choice_answer": answers[q][0],
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n + 1} for n, a in enumerate(answers[q])],
        }
        for i, q, _ in asked
    ]  # fmt: skip
    (tmp_path / "questions.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    rows = [{"id": f"COCO_val2014_{n:012d}.jpg", "caption": f"Grey {n}."} for n in (42, 73)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def test_vqav2_from_its_files(official: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replies = {"What colour?": "Gray.", "How many?": "Two", "Is it?": "yes"}

    def script(body: dict[str, Any], times: int) -> str:
        text = text_of(body)
        return f"say {next(a for q, a in replies.items() if q in text)}"

    folder = official / "run"
    predict = [
        "eval",
        "predict",
        "vqa",
        "--run-dir",
        str(folder),
        "--images",
        str(official / "images"),
    ]
    files = ["--questions", str(official / "questions.json"), "--annotations", str(official / "annotations.json")]  # fmt: skip
    assert vlv([*predict, *files, "--from", f"ours=file:{official / 'captions.jsonl'}"]) == 0
    with ScriptedServer(script) as server:
        assert vlv(["eval", "judge", str(folder), "--judge", f"llm=endpoint:m@{server.url}"]) == 0
        assert server.requests == 3
    assert vlv(["eval", "score", str(folder)]) == 0
    assert "VQAv2 accuracy" in capsys.readouterr().out
    result = json.loads((folder / "result.json").read_text())["figures"]
    assert result["ours.llm.accuracy"]["value"] == pytest.approx((0.3 + 1 + 0.6) / 3)
    assert result["ours.llm.exact"]["value"] == pytest.approx(1 / 3)
    assert result["ours.llm.accuracy"]["n"] == 2  # pictures


def test_files_that_do_not_belong_together(official: Path) -> None:
    samples = DataSet(None, 0, None, (str(official / "images"),)).samples()
    other = official / "other.json"
    other.write_text(json.dumps({"annotations": []}))
    with pytest.raises(DataError, match="no pair of VQA files"):
        vqa.read_vqa(official / "questions.json", other, samples)
    with pytest.raises(DataError, match=r"missing\.json cannot be read"):
        vqa.read_vqa(official / "missing.json", other, samples)
    other.write_text(json.dumps({"questions": []}))
    with pytest.raises(DataError, match="about an image of the run"):
        vqa.read_vqa(other, official / "annotations.json", samples)
    with pytest.raises(ConfigError, match="name both"):
        vqa.settings(["true"], "questions.json")
