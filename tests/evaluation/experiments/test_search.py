"""Search among rendered scenes, once with a miniature model."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("usearch", reason='search needs the package usearch: pip install "vlv[search]"')

from vlv.cli import run as vlv
from vlv.errors import ConfigError
from vlv.evaluation.experiments.search import (
    CaptionSearch,
    Measured,
    SearchPlan,
    build,
    in_another_style,
    measure,
)
from vlv.models.search_space import Space

if TYPE_CHECKING:
    from pathlib import Path

    from vlv.models.pipeline import VLVPipeline

PLAN = SearchPlan("val", num=6, seed=3, batch_size=4, queries=4)


@pytest.fixture(scope="module")
def measured(tiny_pipeline: VLVPipeline, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    index = build(tiny_pipeline, PLAN, tmp_path_factory.mktemp("search"), lambda count: None)
    return Measured(index, PLAN)


def test_an_own_text_is_satisfied_and_others_rarely_are(measured: Measured) -> None:
    for form in ("detailed", "tags"):
        texts = measured.texts(form)
        assert all(measured.satisfied(text, number) for number, text in enumerate(texts))
        wrong = sum(measured.satisfied(text, (n + 1) % 4) for n, text in enumerate(texts))
        assert wrong == 0
    assert not measured.satisfied("Something else.", 0), "a text that says nothing finds nothing"


def test_figures_of_every_way_to_search(measured: Measured) -> None:
    (section,) = measure(measured, lambda count: None).sections
    figures = {figure.key: figure for figure in section.figures}
    assert {f"search.{x}.late" for x in ("text", "image", "short", "tags")} <= figures.keys()
    assert "search.text.captions" not in figures
    assert all(0 <= figure.estimate.value <= 1 for figure in figures.values())
    assert figures["search.text.late"].estimate.n == PLAN.queries
    # ten of six scenes are all of them
    assert figures["search.image.late"].estimate.value == 1
    assert figures["search.image.late"].verdict == "goal"


def test_true_captions_are_found(measured: Measured) -> None:
    captions = measured.texts("detailed")
    rival = CaptionSearch(measured.index, captions)
    queries = measured.index.text_queries(captions)
    assert [rival.first(query, 3) for query in queries] == list(range(len(captions)))
    found = Measured(measured.index, PLAN, [*captions, "", ""]).by_text("detailed", lambda n: None)
    assert found["captions"] == [True] * PLAN.queries


def test_another_style_keeps_the_content() -> None:
    for number in range(20):
        scene = PLAN.scene(number)
        other = in_another_style(scene, 0, number)
        assert other.style != scene.style
        assert replace(other, style=scene.style, time=scene.time) == scene


def test_a_plan_that_makes_no_sense() -> None:
    with pytest.raises(ConfigError, match="500 scenes cannot be searched for among 20"):
        SearchPlan(num=20)


@pytest.mark.slow
def test_the_command_measures_and_fits(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(tiny_folder), "--batch-size", "8"]
    space, file = tmp_path / "s.safetensors", tmp_path / "f.json"
    fit = ["eval", "search", "--split", "train", "--num", "8", "--steps", "3", "--fit", str(space)]
    assert vlv([*fit, *model]) == 0
    assert Space.load(space).width == 128
    command = ["eval", "search", "--num", "4", "--queries", "2", "--space", str(space), *model]
    assert vlv([*command, "--json", str(file)]) == 0
    assert "recall at 1" in capsys.readouterr().out
    (section,) = json.loads(file.read_text())["sections"].values()
    assert "search.detailed.captions" in section["figures"]
