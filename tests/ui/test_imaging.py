"""Reconstructions and mixes: the files that the shown commands write."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Vlv, vlv
from tests.ui.conftest import no_model
from vlv.errors import ConfigError, DataError
from vlv.jobs.images import SampleSettings
from vlv.models.pipeline import VLVPipeline
from vlv.ui.desk import Work
from vlv.ui.imaging import MixPlan, ReconstructPlan, mix_of, path_of
from vlv.ui.workbench import Workbench

__all__ = ["vlv"]  # a fixture

Make = Callable[..., Workbench]


def sampling(model: Path) -> SampleSettings:
    return SampleSettings(str(model), steps=2, guidance=1.5, seed=3)


def test_a_reconstruction_is_that_of_its_command(
    folder: Path, tiny_folder: Path, tiny_pipeline: VLVPipeline, make_bench: Make, vlv: Vlv
) -> None:
    bench = make_bench(lambda: tiny_pipeline, tiny_folder)
    plan = ReconstructPlan(folder / "a.png", sampling(tiny_folder), bench.folder / "r", bench.flags)
    left, right = plan.run(bench.desk, Work("drawing"))
    assert left.size == right.size == (tiny_pipeline.image_size, tiny_pipeline.image_size)
    ours = (plan.folder / "a.png").read_bytes()
    (plan.folder / "a.png").unlink()
    result = vlv(*shlex.split(plan.command)[1:])
    assert result.code == 0, result.err
    assert (plan.folder / "a.png").read_bytes() == ours


def test_a_bad_image_is_one_sentence(folder: Path, make_bench: Make) -> None:
    (folder / "a.png").write_bytes(b"none")
    bench = make_bench(no_model)
    settings = SampleSettings("vlv-tiny")
    plan = ReconstructPlan(folder / "a.png", settings, bench.folder, bench.flags)
    with pytest.raises(DataError, match=r"a\.png: this is no image"):
        plan.run(bench.desk, Work("drawing"))


@pytest.mark.usefixtures("loads_once")
@pytest.mark.parametrize("mode", ["average", "slerp", "concat"])
def test_a_path_of_mixes_is_that_of_its_commands(
    folder: Path,
    tiny_folder: Path,
    tiny_pipeline: VLVPipeline,
    make_bench: Make,
    vlv: Vlv,
    mode: str,
) -> None:
    bench = make_bench(lambda: tiny_pipeline, tiny_folder)
    hows = path_of(mode, 3, tiny_pipeline.encoder.num_queries)  # type: ignore[arg-type,union-attr]
    images = (folder / "a.png", folder / "c.png")
    away = folder / "c.png" if mode == "slerp" else None
    plan = MixPlan(images, hows, sampling(tiny_folder), bench.folder / "m", bench.flags, away)
    drawn = plan.run(bench.desk, Work("mixing"))
    assert (len(drawn), plan.strip.exists()) == (3, True)
    assert len({image.tobytes() for image in drawn}) == 3
    ours = [path.read_bytes() for path in plan.outputs]
    for path, line in zip(plan.outputs, plan.commands, strict=True):
        path.unlink()
        result = vlv(*shlex.split(line)[1:])
        assert result.code == 0, result.err
    assert [path.read_bytes() for path in plan.outputs] == ours


def test_what_cannot_be_mixed(folder: Path, make_bench: Make) -> None:
    bench = make_bench(no_model)
    for number in (1, 5):
        images = (folder / "a.png",) * number
        with pytest.raises(ConfigError, match=f"{number} images are chosen"):
            MixPlan(images, (), SampleSettings("x"), bench.folder, bench.flags)
    for frames in (1, 99):
        with pytest.raises(ConfigError, match=f"{frames} frames make no path"):
            path_of("slerp", frames, 77)
    assert mix_of("concat", 2, (0.5,) * 4, (10, 20, 30, 40)).keep == (10, 20)
    assert mix_of("slerp", 3, (0.5, 0.25, 0.25, 1), ()).weights == (0.5, 0.25, 0.25)
