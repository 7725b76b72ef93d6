"""Searches of the workbench: what the shown commands find."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Vlv, vlv
from tests.search.support import telling_space
from vlv.errors import ConfigError, DataError
from vlv.models.pipeline import VLVPipeline
from vlv.search.index import Index
from vlv.ui.searching import SearchableIndex, SearchPlan
from vlv.ui.workbench import Workbench

pytest.importorskip("usearch", reason='searching needs pip install "vlv[search]"')

__all__ = ["vlv"]  # a fixture

Make = Callable[..., Workbench]


@pytest.fixture
def index(folder: Path, tiny_pipeline: VLVPipeline, tmp_path: Path) -> SearchableIndex:
    space = telling_space(tiny_pipeline, sorted(folder.rglob("*.png")))
    Index.build([folder], tmp_path / "images.index", tiny_pipeline, space=space)
    return SearchableIndex(tmp_path / "images.index")


def test_a_search_is_that_of_its_command(
    index: SearchableIndex,
    folder: Path,
    tiny_folder: Path,
    tiny_pipeline: VLVPipeline,
    make_bench: Make,
    vlv: Vlv,
) -> None:
    flags = make_bench(lambda: tiny_pipeline, tiny_folder).flags
    for text, image in (("", folder / "c.png"), ("-a red cube", None)):
        plan = SearchPlan(index, text, image, 3, flags)
        found = plan.run(tiny_pipeline)
        result = vlv(*shlex.split(plan.command)[1:])
        assert result.code == 0, result.err
        names = [line.split("\t")[2] for line in result.out.splitlines()]
        assert [x.hit.file_name for x in found] == names
        assert len(names) == 3
        assert all(x.picture is not None for x in found)
        if image is not None:
            assert found[0].hit.file_name == str(image)


def test_what_cannot_be_searched(
    index: SearchableIndex, folder: Path, tmp_path: Path, make_bench: Make
) -> None:
    flags = make_bench(lambda: pytest.fail("no model is needed")).flags
    for text, image in (("", None), ("a cube", folder / "a.png")):
        with pytest.raises(ConfigError, match="one of the two"):
            SearchPlan(index, text, image, 3, flags)
    with pytest.raises(ConfigError, match="k is 0"):
        SearchPlan(index, "a cube", None, 0, flags)
    with pytest.raises(DataError, match="index"):
        SearchableIndex(tmp_path / "none")
