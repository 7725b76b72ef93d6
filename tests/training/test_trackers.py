"""Trackers: who is told what, where a run goes on, and what is said of a package that is absent."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from tests.training.support import train
from vlv.errors import ConfigError
from vlv.training.interrupt import Interrupted

if TYPE_CHECKING:
    from pathlib import Path


class FakeService:
    """A module like wandb or trackio that remembers what it is told."""

    def __init__(self, api_key: str | None = None) -> None:
        self.api = SimpleNamespace(api_key=api_key)
        self.starts: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str]] = []
        self.logged: list[dict[str, Any]] = []
        self.ended = 0

    def init(self, **kwargs: Any) -> FakeService:
        self.starts.append(kwargs)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append(values if step is None else values | {"step": step})

    def finish(self) -> None:
        self.ended += 1

    def Image(self, file: str, caption: str | None) -> tuple[str, str | None]:  # noqa: N802
        return (file, caption)


def draw(step: int, folder: Path) -> None:
    Image.new("RGB", (8, 6), "red").save(folder / f"{step:07d}.png")
    (folder / f"{step:07d}.txt").write_text(f"a: caption of {step}\n")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_everything_and_goes_on_in_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    service = FakeService()
    monkeypatch.setitem(sys.modules, name, service)  # type: ignore[arg-type]
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = tmp_path / "stage1"
    common: dict[str, Any] = {"trackers": [name], "sample": draw, "sample_every": 4}
    with pytest.raises(Interrupted):
        train(run, max_seconds=0, **common)
    train(run, evaluate=lambda step: {"gap": step / 2}, **common)

    run_id = json.loads((run / "trackers.json").read_text())[name]
    assert run_id.startswith("stage1-")
    assert [start["id" if name == "wandb" else "name"] for start in service.starts] == [run_id] * 2
    assert all(start["resume"] == "allow" for start in service.starts)
    assert all(start["project"] == "vlv" for start in service.starts)
    assert service.starts[0]["config"]["loop"]["steps"] == 9
    assert service.ended == 2
    steps = [values["step"] for values in service.logged if "train/loss" in values]
    assert steps == [2, 4, 6, 8, 9]
    assert {"step": 8, "eval/gap": 4.0} in service.logged
    pictures = {v["step"]: v["samples/0"] for v in service.logged if "samples/0" in v}
    assert pictures[4] == (str(run / "samples" / "0000004.png"), "a: caption of 4\n")
    assert sorted(pictures) == [4, 8, 9]
    if name == "wandb":
        assert service.metrics[0] == ("*", "step")
        assert service.starts[0]["mode"] == "offline", "no key is known"


def test_wandb_is_online_where_a_key_or_the_environment_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", service := FakeService("key"))  # type: ignore[arg-type]
    monkeypatch.delenv("WANDB_MODE", raising=False)
    train(tmp_path / "a", trackers=["wandb"])
    monkeypatch.setitem(sys.modules, "wandb", other := FakeService())  # type: ignore[arg-type]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    train(tmp_path / "b", trackers=["wandb"])
    assert service.starts[0]["mode"] is None
    assert (other.starts[0]["mode"], other.starts[0]["project"]) == (None, "mine")


@pytest.mark.parametrize(
    ("name", "extra"), [("wandb", "track"), ("trackio", "track"), ("tensorboard", "train")]
)
def test_a_package_that_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"names {name}, which is not installed.*vlv\[{extra}\]"):
        train(tmp_path, trackers=[name])


def test_without_tensorboard_the_default_is_no_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert train(tmp_path, trackers=None).finished
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_gets_figures_pictures_and_captions(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, trackers=None, sample=draw, sample_every=4)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8, 9]
    assert [event.step for event in events.Images("samples/0")] == [4, 8, 9]
    text = events.Tensors("samples/captions/text_summary")[-1].tensor_proto.string_val[0]
    assert text == b"a: caption of 9"
