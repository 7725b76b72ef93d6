"""Doubts about captions, fit and measured on scenes whose truth is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlv.errors import DataError
from vlv.evaluation.experiments.doubts import (
    Case,
    collect,
    fit_calibration,
    measure,
)
from vlv.evaluation.experiments.scene_plan import ScenePlan
from vlv.models.decoding import Caption
from vlv.models.doubts import ClaimEvidence, Evidence, SentenceEvidence
from vlv.models.pipeline import VLVPipeline
from vlv.toyworld.claims import find_claims, mark_claims
from vlv.toyworld.writing import describe

PLAN = ScenePlan("val", 40, 3)
TEXT = "A photo of a red cube. A cone."


def case(index: int) -> Case:
    """A scene with the caption of the same or of the next one, and a decoder that knows the truth but for some noise."""
    scene = PLAN.scene(index)
    rng = np.random.default_rng(index)
    text = describe(PLAN.scene(index + index % 2), "detailed", rng)
    right = {mark.start: mark.right for mark in mark_claims(text, scene)}
    claims = []
    for claim in find_claims(text):
        changes = rng.normal(-0.3 if right[claim.start] else 0.1, 0.1, len(claim.alternatives))
        claims.append(ClaimEvidence(claim, tuple(changes.tolist())))
    known = SentenceEvidence(0, len(text), -0.5, None, tuple(claims))
    plain = SentenceEvidence(0, len(text), -0.5, max(x.best for x in claims), ())
    return Case(index, scene, Evidence(text, 0.9, 1, (known,)), Evidence(text, 0.9, 1, (plain,)))


@pytest.mark.slow
def test_the_fit_tells_wrong_from_right() -> None:
    cases = [case(index) for index in range(PLAN.num)]
    calibration = fit_calibration(cases, PLAN)
    assert calibration.claims == "toyworld"
    assert calibration.about["sentences"] == PLAN.num
    assert calibration.sentence.weights[0] > 0
    assert 0 < calibration.threshold < 1
    figures = {
        key: figure.estimate for key, figure in measure(cases, calibration, PLAN).figures.items()
    }
    assert figures["doubts.wrong"].value == pytest.approx(0.5, abs=0.05)
    for name in ("sentence", "plain", "claim"):
        assert figures[f"doubts.{name}.auroc"].value > 0.9
        assert figures[f"doubts.{name}.ece"].value < 0.2
    assert figures["doubts.precision"].value > 0.9
    written, fixed = (figures[f"doubts.{x}.hallucinated"].value for x in ("written", "fixed"))
    assert fixed < written
    with pytest.raises(DataError, match="hold no claim that is wrong"):
        fit_calibration([x for x in cases if x.index % 2 == 0], PLAN)


def test_what_the_decoder_said_is_kept(
    tiny_pipeline: VLVPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def described(self: VLVPipeline, *given: Any, seed: list[int], **options: Any) -> list[Caption]:
        asked.extend(seed)
        return [
            Caption(TEXT if number % 2 == 0 else "", 3, finished=True)
            for number in range(len(seed))
        ]

    monkeypatch.setattr(VLVPipeline, "describe", described)
    plan = ScenePlan("val", 3, 3, batch_size=3)
    done: list[int] = []
    first = collect(tiny_pipeline, plan, tmp_path, done.append)
    assert [x.index for x in first] == [0, 1], "the third caption is empty"
    assert done == [0, 3]
    assert [len(x.claims) for x in first[0].known.sentences] == [3, 1]
    assert [x.word is None for x in first[0].plain.sentences] == [False, False]
    more = collect(tiny_pipeline, replace(plan, num=4), tmp_path, done.append)
    assert more[:2] == first
    assert done[2:] == [3, 1]
    assert len(set(asked)) == 4, "every caption has its own seed"
