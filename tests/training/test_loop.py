from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vlv
from tests.training.support import (
    Denoiser,
    RepeatableLoader,
    assert_same_weights,
    optim_config,
    train,
    weights,
)
from vlv.config import OptimConfig
from vlv.errors import CheckpointError, ConfigError, DataError, OutputError
from vlv.training.interrupt import Interrupted
from vlv.training.journal import Journal, read_metrics
from vlv.training.loop import Run, _check_settings
from vlv.training.objective import FitResult, Losses
from vlv.training.weights import load_trained

TIMES = {"images_per_second", "elapsed_seconds", "eta_seconds", "device_hours"}


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the times."""
    found = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def interrupted_at_every_step(
    run_dir: Path, **kwargs: Any
) -> tuple[Denoiser, list[str], FitResult]:
    """Train with a new process's worth of objects for each step."""
    seen: list[str] = []
    while True:
        objective, loader = Denoiser(), RepeatableLoader()
        torch.manual_seed(random.randrange(1000))  # what the caller drew before must not matter
        try:
            result = train(run_dir, objective, loader=loader, max_seconds=0, **kwargs)
        except Interrupted:
            seen += loader.seen
        else:
            return objective, seen + loader.seen, result


def evaluate(step: int) -> dict[str, float]:
    return {"global_draw": float(torch.rand(1)) * 0 + step, "python_draw": random.random() * 0}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"ema": 0.9, "accumulate": 3}])
def test_interrupted_run_equals_uninterrupted(tmp_path: Path, options: dict[str, Any]) -> None:
    objective, loader = Denoiser(), RepeatableLoader()
    result = train(tmp_path / "a", objective, loader=loader, evaluate=evaluate, **options)
    again, seen, resumed = interrupted_at_every_step(tmp_path / "b", evaluate=evaluate, **options)
    assert_same_weights(objective.module, again.module)
    assert seen == loader.seen
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert result.finished
    assert resumed.finished
    assert resumed.step == result.step == 9


def test_evaluation_does_not_disturb_training(tmp_path: Path) -> None:
    plain, looked_at = Denoiser(), Denoiser()

    def disturb(step: int) -> dict[str, float]:
        torch.rand(5), random.random(), np.random.rand()  # noqa: NPY002
        assert not looked_at.module.training
        assert not torch.is_grad_enabled()
        return {"x": 1.0}

    train(tmp_path / "a", plain)
    train(tmp_path / "b", looked_at, evaluate=disturb, eval_every=1)
    assert_same_weights(plain.module, looked_at.module)


def test_global_generators_are_left_as_they_were(tmp_path: Path) -> None:
    before = torch.get_rng_state(), random.getstate()
    train(tmp_path)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


@pytest.mark.slow
def test_killed_run_equals_uninterrupted(tmp_path: Path) -> None:
    settings = {"save_every": 1, "keep_last": 3, "ema": 0.9, "accumulate": 2}
    long = {"steps": 2000, **settings}
    folder = tmp_path / "killed" / "checkpoints"
    for target in (3, 12):
        process = multiprocessing.get_context("fork").Process(
            target=train, args=(tmp_path / "killed",), kwargs=long
        )
        process.start()
        while not any(int(path.name[5:]) >= target for path in folder.glob("step-*")):
            assert process.is_alive()
            time.sleep(0.005)
        process.kill()
        process.join()
    step = max(int(path.name[5:]) for path in folder.glob("step-*"))
    assert step >= 12
    reference, killed = Denoiser(), Denoiser()
    with pytest.raises(Interrupted):
        train(tmp_path / "killed", killed, max_seconds=0, **long)

    def stop(step_now: int) -> dict[str, float]:
        if step_now == step + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(Interrupted):
        train(
            tmp_path / "ref",
            reference,
            steps=2000,
            evaluate=stop,
            eval_every=1,
            **{**settings, "save_every": 10**6},
        )
    assert load_trained(killed.module, tmp_path / "killed") == step + 1
    load_trained(reference.module, tmp_path / "ref")
    assert_same_weights(killed.module, reference.module)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_finishes_the_step_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    def send(step: int) -> dict[str, float]:
        if step == 5:
            os.kill(os.getpid(), number)
        return {}

    handler, wakeup = signal.getsignal(number), signal.set_wakeup_fd(-1)
    with pytest.raises(Interrupted, match=rf"{number.name} was received at step 5 of 9") as caught:
        train(tmp_path, evaluate=send, eval_every=5)
    assert caught.value.result.step == 5
    assert not caught.value.result.finished
    assert isinstance(caught.value, KeyboardInterrupt)
    assert (tmp_path / "checkpoints" / "step-00000005").is_dir()
    assert caught.value.preempted == (number is not signal.SIGINT)
    assert signal.getsignal(number) is handler
    assert signal.set_wakeup_fd(-1) == wakeup
    assert train(tmp_path).finished


@pytest.mark.parametrize("at", [4, 8], ids=["in the middle", "at the end"])
def test_a_signal_ends_evaluation_and_samples_at_once_and_they_are_made_up_for(
    tmp_path: Path, at: int
) -> None:
    """Each is cut short once; the run that goes on begins with it."""
    sent: list[str] = []
    made: list[str] = []

    def signal_once(name: str) -> None:
        if name not in sent:
            sent.append(name)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)  # the rest of it, which the signal ends

    def evaluate_slowly(step: int) -> dict[str, float]:
        if step == at:
            signal_once("eval")
        return {"held_out": float(step)}

    def sample_slowly(step: int, folder: Path) -> None:
        if step == at:
            signal_once("sample")
        made.append(f"{step}")

    settings = {"steps": 8, "eval_every": 2, "sample_every": 4, "keep_best": "held_out"}
    train(tmp_path / "whole", whole := Denoiser(), evaluate=lambda step: {"held_out": float(step)},
          sample=lambda step, folder: None, **settings)  # fmt: skip
    began = time.monotonic()
    for _ in ("eval", "sample"):
        with pytest.raises(Interrupted, match=f"SIGINT was received at step {at} of 8") as caught:
            train(
                tmp_path / "cut",
                Denoiser(),
                evaluate=evaluate_slowly,
                sample=sample_slowly,
                **settings,
            )
        assert not caught.value.preempted
        if sent == ["eval"]:  # as one leaves it that was killed before it could save
            with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": at, "kind": "eval", "held_out": 0.0}) + "\n")
    assert time.monotonic() - began < 50
    cut = Denoiser()
    assert train(
        tmp_path / "cut", cut, evaluate=evaluate_slowly, sample=sample_slowly, **settings
    ).finished
    assert made == ["4", "8"]
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert_same_weights(cut.module, whole.module)


def test_finished_run_is_left_alone(tmp_path: Path) -> None:
    first = Denoiser()
    result = train(tmp_path, first, ema=0.9)
    second, loader = Denoiser(), RepeatableLoader()
    again = train(tmp_path, second, loader=loader, ema=0.9)
    assert again == result
    assert loader.seen == []
    assert_same_weights(first.module, second.module)
    assert not second.module.training


def test_module_holds_the_average_at_the_end(tmp_path: Path) -> None:
    objective, plain, averaged = Denoiser(), Denoiser(), Denoiser()
    train(tmp_path, objective, ema=0.9)
    load_trained(plain.module, tmp_path, ema=False)
    load_trained(averaged.module, tmp_path)
    assert_same_weights(objective.module, averaged.module)
    assert not torch.equal(plain.module["head"].weight, averaged.module["head"].weight)  # type: ignore[index]


def test_frozen_parameters_are_untouched_and_not_saved(tmp_path: Path) -> None:
    objective = Denoiser()
    before = weights(objective.module)
    train(tmp_path, objective, ema=0.9)
    after = objective.module.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(not name.startswith("frozen") for name in changed)
    for parameter in objective.module["frozen"].parameters():  # type: ignore[index]
        assert parameter.grad is None
    from safetensors.torch import load_file

    newest = tmp_path / "checkpoints" / "step-00000009"
    for name in ("trainable", "ema", "optimizer"):
        assert not any(
            key.startswith("frozen") for key in load_file(newest / f"{name}.safetensors")
        )


def test_frozen_submodules_stay_in_eval_mode(tmp_path: Path) -> None:
    objective = Denoiser()
    modes = []
    plain = objective.loss

    def loss(batch: dict[str, Any], generator: torch.Generator) -> Losses:
        modes.append([part.training for part in objective.module.children()])
        return plain(batch, generator)

    objective.loss = loss  # type: ignore[method-assign]
    train(tmp_path, objective, evaluate=lambda step: {}, eval_every=1)
    assert all(mode == [False, True, True] for mode in modes)


def test_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    class Linear(Denoiser):
        """Without batch norm, dropout and noise, so that a batch is the mean of its parts."""

        def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Losses:
            out = self.module["head"](self.module["frozen"][0](batch["x"]))  # type: ignore[index]
            return Losses((out - batch["x"]).square().mean())

    class Joined(RepeatableLoader):
        def __iter__(self) -> Any:
            stream = super().__iter__()
            for first in stream:
                second = next(stream)
                yield {
                    "ids": first["ids"] + second["ids"],
                    "x": torch.cat([first["x"], second["x"]]),
                }

    small, large = Linear(), Linear()
    train(tmp_path / "a", small, accumulate=2)
    train(tmp_path / "b", large, batch_size=8, loader=Joined())
    for name, value in small.module.state_dict().items():
        torch.testing.assert_close(value, large.module.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_step_counts_optimiser_steps(tmp_path: Path) -> None:
    objective = Denoiser()
    train(tmp_path, objective, steps=3, accumulate=2, optim=optim_config(warmup_steps=0))
    assert objective.steps == [0, 0, 1, 1, 2, 2]


class Poisoned(Denoiser):
    """The loss is not finite in the given steps."""

    def __init__(self, steps: set[int]) -> None:
        super().__init__()
        self.poison = steps

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Losses:
        losses = super().loss(batch, generator)
        factor = float("nan") if batch["step"] in self.poison else 1.0
        return Losses(losses.total * factor, losses.parts)


def test_steps_that_are_not_finite_are_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    objective = Poisoned({2, 3})
    result = train(tmp_path, objective, log_every=1, ema=0.9)
    assert result.metrics["skipped_steps"] == 2
    assert "step 3: the loss or its gradient is not finite" in caplog.text
    assert all(torch.isfinite(value).all() for value in objective.module.state_dict().values())


def test_skipped_step_changes_no_parameter(tmp_path: Path) -> None:
    objective = Poisoned(set(range(9)))
    before = {name: p.clone() for name, p in objective.module.named_parameters()}
    train(tmp_path, objective)
    for name, parameter in objective.module.named_parameters():
        assert torch.equal(parameter, before[name])


def test_many_bad_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"not finite in 3 steps in a row up to step 6; lower optim.lr"
    ):
        train(tmp_path, Poisoned({1, 3, 4, 5}), max_bad_steps=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"steps": 12},
            r"the run in .* other settings \(loop.steps was 9, now 12\); .* another run folder",
        ),
        ({"batch_size": 5, "loader": RepeatableLoader(5)}, "loop.batch_size was 4, now 5"),
        ({"optim": optim_config(lr=0.5)}, "optim.lr was 0.01, now 0.5"),
        ({"optim": optim_config(lr_scale={"head": 3})}, "optim.lr_scale.head was 2.0, now 3.0"),
        ({"settings": {"part": "b"}}, "part was a, now b"),
        ({"settings": {}}, "part was a, now None"),
    ],
)
def test_resume_refuses_other_settings(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, settings={"part": "a"}, max_seconds=0)
    with pytest.raises(CheckpointError, match=message):
        train(tmp_path, **{"settings": {"part": "a"}, **changes})


def test_resume_allows_other_log_settings(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, max_seconds=0)
    assert train(tmp_path, log_every=1, save_every=None, keep_last=5, eval_every=None).finished


def test_resume_refuses_another_model(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, max_seconds=0)
    wider, unfrozen = Denoiser(), Denoiser()
    wider.module["head"] = torch.nn.Linear(8, 7)  # type: ignore[index,operator]
    unfrozen.module.requires_grad_(True)
    with pytest.raises(
        CheckpointError, match=r"holds head.bias \(6,\), which is \(7,\) in this model"
    ):
        train(tmp_path, wider)
    with pytest.raises(CheckpointError, match=r"lacks frozen.0.bias; it belongs to another model"):
        train(tmp_path, unfrozen)


def test_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference, objective = Denoiser(), Denoiser()
    train(tmp_path / "a", reference)
    with pytest.raises(Interrupted):
        train(
            tmp_path / "b",
            evaluate=lambda step: os.kill(os.getpid(), signal.SIGTERM) or {},
            eval_every=7,
        )
    newest = tmp_path / "b" / "checkpoints" / "step-00000007" / "trainable.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    train(tmp_path / "b", objective)
    assert (
        "step-00000007 is damaged: trainable.safetensors is not the file that was saved"
        in caplog.text
    )
    assert_same_weights(reference.module, objective.module)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_full_disk_is_survived_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any, **kwargs: Any) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vlv.training.loop.save_checkpoint", full)
        with pytest.raises(
            OutputError, match=r"step 3 could not be saved .*No space left.*make room"
        ):
            train(tmp_path, save_every=1)
        with pytest.raises(OutputError, match="step 1"):
            train(tmp_path, max_seconds=0)
    assert "step 2: the checkpoint could not be saved" in caplog.text
    assert train(tmp_path, save_every=1).finished


def test_full_disk_under_the_log_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Run.open_journal

    def open_journal(self: Run) -> Journal:
        journal = plain(self)
        journal._stream = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
        return journal

    monkeypatch.setattr(Run, "open_journal", open_journal)
    with pytest.raises(OutputError, match=r"metrics.jsonl cannot be written .*No space left"):
        train(tmp_path)


def test_metrics_read_as_one_run(tmp_path: Path) -> None:
    train(tmp_path, evaluate=lambda step: {"gap": step / 2})
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["kind"]) for line in found] == [
        (2, "train"),
        (4, "train"),
        (4, "eval"),
        (6, "train"),
        (8, "train"),
        (8, "eval"),
        (9, "train"),
        (9, "eval"),
    ]
    assert found[0].keys() == {
        *("step", "kind", "loss", "error", "grad_norm", "lr"),
        *("images_per_second", "skipped_steps", "elapsed_seconds", "eta_seconds", "device_hours"),
    }
    assert found[1]["loss"] == pytest.approx(found[1]["error"])
    assert found[2]["gap"] == 2.0


def test_share_of_the_peak_in_the_log(tmp_path: Path) -> None:
    class Linear:
        """Squares of a linear layer: 2 x 6 x 3 FLOPs forwards, as many for the weights' gradient."""

        def __init__(self) -> None:
            self.module = torch.nn.Linear(6, 3, bias=False)

        def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Losses:
            return Losses(self.module(batch["x"]).square().sum())

    objective: Any = Linear()
    train(tmp_path, objective, optim=OptimConfig(lr=0.01), peak_tflops=1e-6)
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        expected = 72 * line["images_per_second"] / 1e6
        assert line["mfu"] == pytest.approx(expected, abs=1e-4)


def test_half_a_line_of_metrics_is_dropped(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, max_seconds=0, log_every=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "kind": "train"}\n{"step": 3, "ki')
    train(tmp_path, log_every=1)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 10))


@pytest.mark.parametrize("program", ["/opt/env/bin/vlv", "/opt/env/vlv/__main__.py"])
def test_run_folder_holds_settings_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    import yaml

    monkeypatch.setattr("sys.argv", [program, "train", "my run.yaml"])
    train(tmp_path, settings={"part": "a"})
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert settings["part"] == "a"
    assert settings["loop"]["steps"] == 9
    assert settings["optim"]["betas"] == [0.9, 0.99]
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert {"torch", "python"} <= versions.keys()
    assert versions["command"] == "vlv train 'my run.yaml'", "without the folders of this machine"


def test_samples_and_tensorboard(tmp_path: Path) -> None:
    def sample(step: int, folder: Path) -> None:
        (folder / f"{step}.txt").write_text("")

    train(tmp_path, sample=sample, sample_every=4, trackers=None)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "4.txt",
        "8.txt",
        "9.txt",
    ]
    pytest.importorskip("tensorboard")
    assert list((tmp_path / "tensorboard").iterdir())


def test_one_process_per_folder(tmp_path: Path) -> None:
    def nested(step: int) -> dict[str, float]:
        with pytest.raises(OutputError, match="another process works in"):
            train(tmp_path)
        return {"refused": 1.0}

    assert train(tmp_path, evaluate=nested).metrics["refused"] == 1.0


def test_loader_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the data ended after 2 of 9 steps"):
        train(tmp_path / "a", loader=RepeatableLoader(length=2))
    with pytest.raises(DataError, match=r"hands out 3 rows, but loop.batch_size is 4"):
        train(tmp_path / "b", loader=RepeatableLoader(3))


def test_bf16_computes_in_bf16_and_keeps_float32_weights(tmp_path: Path) -> None:
    objective = Denoiser()
    seen = []
    plain = objective.loss

    def loss(batch: dict[str, Any], generator: torch.Generator) -> Losses:
        seen.append(objective.module["head"](torch.randn(4, 8)).dtype)  # type: ignore[index]
        return plain(batch, generator)

    objective.loss = loss  # type: ignore[method-assign]
    train(tmp_path, objective, precision="bf16", steps=3)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in objective.module.parameters()} == {torch.float32}


def test_load_trained_takes_a_part(tmp_path: Path) -> None:
    objective, fresh = Denoiser(), Denoiser()
    train(tmp_path, objective)
    head = fresh.module["head"]  # type: ignore[index]
    assert load_trained(head, tmp_path, part="head") == 9
    assert_same_weights(head, objective.module["head"])  # type: ignore[index]
    with pytest.raises(CheckpointError, match="holds no weights of 'frozen'"):
        load_trained(head, tmp_path, part="frozen")
    with pytest.raises(CheckpointError, match="which is absent in this model"):
        load_trained(head, tmp_path)
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        load_trained(head, tmp_path / "other")


def test_saving_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    plain = Run.save

    def save(self: Run, *, must_succeed: bool) -> None:
        saved.append(self.step)
        plain(self, must_succeed=must_succeed)

    monkeypatch.setattr(Run, "save", save)
    train(tmp_path, save_every=None, save_every_seconds=1e-9)
    assert saved == list(range(1, 10))


def test_there_is_one_loop() -> None:
    source = Path(vlv.__file__).parent
    found = [
        (file.name, line.strip())
        for file in sorted(source.rglob("*.py"))
        for line in file.read_text().splitlines()
        if re.search(r"\)\.backward\(|iter\(run\.loader\)|for batch in .*loader", line)
    ]
    assert found == [
        ("loop.py", "config, stream = run.config, iter(run.loader)"),
        ("step.py", "(loss * micro.share).backward()"),
    ]


def test_training_uses_no_pickle() -> None:
    for file in (Path(vlv.__file__).parent / "training").glob("*.py"):
        assert not re.search(
            r"import pickle|torch\.(load|save)\(|numpy\.load\(|allow_pickle=True", file.read_text()
        )


def test_a_run_goes_on_though_a_setting_was_added_since(tmp_path: Path) -> None:
    now = {"optim": optim_config().model_dump(mode="json"), "model": {"llm": {"path": "l"}}}
    saved = {"optim": {**now["optim"]}, "model": {"llm": {"path": "l"}}}
    del saved["optim"]["betas"]
    now["model"]["llm"]["variant"] = None
    _check_settings(saved, now, tmp_path)
    now["optim"]["betas"] = [0.5, 0.9]
    with pytest.raises(CheckpointError, match=r"optim.betas was \[0.9, 0.99\], now \[0.5, 0.9\]"):
        _check_settings(saved, now, tmp_path)
