"""The benchmarks against the straightforward way: same work, same loss, and a page that agrees with the files."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState

from tests import tiny
from vlv.config import Stage1Config, Stage2Config
from vlv.models.captioner import CaptionDecoder
from vlv.training.distributed import join_world
from vlv.training.stages import Stage1, Stage2

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import one of the scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "ids": list("abc"),
        "pixels": torch.randint(0, 256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "captions": list(tiny.CAPTIONS[:3]),
        "step": 10,
    }


def make_writer() -> CaptionDecoder:
    """With room for the 300 tokens of the baseline."""
    writer = tiny.make_caption_decoder()
    writer.llm.config.max_position_embeddings = 512
    return writer


@pytest.fixture
def models(load: Any) -> Any:
    encoder = tiny.make_encoder(image_size=64)
    encoder.backbone.model.vision_tower.eval()
    return load("models").Models(encoder, tiny.make_decoder(), make_writer())


@pytest.mark.parametrize("stage", [1, 2])
def test_both_ways_give_one_loss_and_one_gradient(stage: int, models: Any, load: Any) -> None:
    baseline = load("baseline")
    contestant = (baseline.BaselineStage1 if stage == 1 else baseline.BaselineStage2)(models, lr=0)
    contestant.encoder.backbone.model.vision_tower.eval()  # without drop path
    own = (models.encoder, models.decoder)
    ours: Any = (
        Stage1(*own, Stage1Config())
        if stage == 1
        else Stage2(*own, models.caption_decoder, Stage2Config())
    )
    draws = load("training").draws
    expected, found = (who.loss(batch(), draws(0, 3)) for who in (contestant, ours))
    found = found.total
    assert found.item() == pytest.approx(expected.item(), abs=1e-4)
    expected.backward()
    found.backward()
    theirs = contestant.encoder.queries.grad
    torch.testing.assert_close(models.encoder.queries.grad, theirs, rtol=1e-3, atol=1e-6)
    assert contestant.step(batch(), draws(0, 3)) == pytest.approx(expected.item(), abs=1e-4)


class Forked:
    """Stands in for `subprocess.Popen` of a script: a process forked from this one, which has imported everything."""

    others: list[Forked] = []  # noqa: RUF012

    def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
        (its_stdin, stdin), (stdout, its_stdout) = os.pipe(), os.pipe()
        self.process = os.fork()
        if not self.process:
            for pipe in (stdin, *(other.stdin.fileno() for other in self.others)):
                os.close(pipe)  # or the process behind it would never see its end
            os.environ.update(env)
            sys.argv = command[1:]
            sys.stdin, sys.stdout = os.fdopen(its_stdin), os.fdopen(its_stdout, "w")
            join_world.cache_clear()  # the process that was forked has trained alone
            PartialState._reset_state()
            try:
                runpy.run_path(command[1], run_name="__main__")
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(0)
        os.close(its_stdin)
        os.close(its_stdout)
        self.stdin, self.stdout = os.fdopen(stdin, "w"), os.fdopen(stdout)
        self.others.append(self)

    def communicate(self) -> None:
        self.others.remove(self)
        self.stdin.close()
        self.stdout.read()
        os.waitpid(self.process, 0)


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the step of the training loop, whatever is cached; the first loss is the baseline's."""
    ours, training = load("ours"), load("training")
    monkeypatch.setattr(ours.subprocess, "Popen", Forked)
    variant = ours.Variant("miniature", 1, "fp32")
    models = load("models").make_models("miniature")
    baseline = load("baseline").BaselineStage1(models)
    whole = ours.make_batches(models, variant)["live"]
    expected = baseline.step(whole, training.draws(0, len(whole["ids"])))
    with contextlib.closing(ours.Processes(variant)) as processes:
        live = processes.step("live")
        cached = processes.step("features")
    alone = ours.make_ours(models, variant)
    assert live == pytest.approx(expected, abs=1e-4)
    assert float(alone.step("live")) == pytest.approx(live, abs=1e-5)
    assert float(alone.step("features")) == pytest.approx(cached, abs=1e-4)


def test_the_baseline_reads_what_the_encoder_reads(models: Any, load: Any) -> None:
    pixels, encoder = batch()["pixels"], models.encoder
    z = load("baseline").encode(encoder, pixels)
    torch.testing.assert_close(z, encoder(pixels), rtol=0, atol=1e-5)


def test_other_losses_stop_the_race(load: Any) -> None:
    training = load("training")
    training.agree("x", 1.00005, 1.0)
    with pytest.raises(SystemExit, match="not the same work"):
        training.agree("x", 1.001, 1.0)


def test_contestants_take_turns(load: Any, tmp_path: Path) -> None:
    contest, turns, now = load("contest"), [], [0.0]

    def who(name: str, seconds: float) -> Any:
        def act() -> None:
            turns.append(name)
            now[0] += seconds

        return act

    actions = {"a": who("a", 6.0), "b": who("b", 2.0)}
    found = contest.compete("title", "unit", actions, repeats=2, calls=2, clock=lambda: now[0])
    assert turns == ["a", "a", "b", "b"] * 3
    assert found.rows[0].seconds == [6.0, 6.0]
    assert found.rows[1].ratios == [3.0, 3.0]
    assert "3.00 x" in str(found)
    other = contest.compete(
        "title", "unit", {"a": who("a", 8.0), "c": who("c", 1.0)}, clock=lambda: now[0]
    )
    both = contest.joined([found, other])
    assert [row.name for row in both.rows] == ["a", "b", "c"]
    assert both.rows[0].seconds == [6.0, 6.0, 8.0, 8.0, 8.0]
    assert both.rows[2].ratios == [8.0] * 3
    contest.write(tmp_path / "results" / "x.json", "mid", [found])
    assert (
        json.loads((tmp_path / "results" / "x.json").read_text())["contests"][0]["title"] == "title"
    )
    report = load("report")
    assert "| b | 2.000 | 3.00 | 3.00 | 3.00 |" in report.table(tmp_path / "results" / "x.json")
    assert "Not measured yet" in report.table(tmp_path / "absent.json")


def test_the_page_agrees_with_the_figures(load: Any) -> None:
    report = load("report")
    text = report.PAGE.read_text(encoding="utf-8")
    assert report.page(text) == text, "run `python benchmarks/report.py`"
    assert len(report.BLOCK.findall(text)) == 14


def test_a_stage_measured_alone_keeps_the_other(load: Any, tmp_path: Path) -> None:
    contest, file = load("contest"), tmp_path / "x.json"
    one, two, new = (
        contest.Contest(title, "unit", [contest.Row("a", [seconds], [1.0], {"loss": 0.5})])
        for title, seconds in (("stage 1", 1.0), ("stage 2", 2.0), ("stage 2", 3.0))
    )
    assert contest.others(file, "mid", ["stage 2"]) == []
    contest.write(file, "mid", [one, two])
    kept = contest.others(file, "mid", ["stage 2"])
    assert kept == [one]
    contest.write(file, "mid", [*kept, new])
    assert [c["rows"][0]["seconds"] for c in json.loads(file.read_text())["contests"]] == [
        [1.0],
        [3.0],
    ]
    with pytest.raises(SystemExit, match=r"stage 1 of another measurement \(models was mid, now"):
        contest.others(file, "miniature", ["stage 2"])
    assert contest.others(file, "miniature", ["stage 1", "stage 2"]) == [], "nothing would be kept"
    other = json.loads(file.read_text())
    other["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(other))
    with pytest.raises(SystemExit, match=r"torch was 1\.0, now .*; measure all anew"):
        contest.others(file, "mid", ["stage 2"])


def test_captions_have_the_lengths_of_the_paper(load: Any) -> None:
    benchmark = load("models")
    tokenizer = tiny.make_llm_tokenizer()
    sizes = benchmark.Sizes(8, 8, 64, 64)
    captions = benchmark.make_batch(sizes, tokenizer)["captions"]
    lengths = [len(tokenizer(caption).input_ids) + 1 for caption in captions]
    assert 215 < sum(lengths) / len(lengths) < 240
    assert 100 < min(lengths) < max(lengths) <= 300
