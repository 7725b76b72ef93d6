"""How the variants of an ablation are trained: the settings of each of their trainings, and the models that come of them.

A training run is named by its settings, so whoever asks for the same run finds it: what variants and ablations have in common is
trained once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlv.config import RunConfig, load_config
from vlv.errors import ConfigError
from vlv.evaluation.experiments import toyworld
from vlv.evaluation.experiments.variants import Variant
from vlv.models.folder import find_folder
from vlv.training.assemble import train


@dataclass(frozen=True)
class Plan:
    """How the variants are trained and measured.

    Attributes:
        parts: Folder of the pretrained parts, as `vlv toyworld pretrain` writes them.
        stage1: Preset or file of the settings of stage 1.
        stage2: Of stage 2.
        stage3: Of a stage 3 that goes on from a finished model.
        captions: Of a stage 2 that goes on from it with true captions: the yardstick of stage 3.
        finished: That model, a folder or a shipped one.
        changes1: Changes of them, for every variant.
        changes2: Likewise.
        changes3: Of both that go on.
        wrong: Folder of a bad teacher's captions (`vlv toyworld render --wrong`); who learns them, or as many true ones, does so by
            the preset of `captions` with `changes2`.
        rates: Factors of the learning rate of a variant's last training, among which each variant gets its own (see `alternatives`);
            a single one is not tuned.
        seeds: S; seed s trains with ``loop.seed=s``.
        given: Model folders by variant, one for each seed, that are measured instead of trained.
        measuring: N scenes, their seed, steps and guidance; its sections follow from the measures.
        tuning_num: Scenes of the split `val` on which rates are tuned.
        trained: Folder of the training runs, which ablations can share; in the run's own folder by default.

    Raises:
        ConfigError: A rate is not above 0, or there is none.
    """

    parts: Path
    stage1: str = "tiny-ablation-stage1"
    stage2: str = "tiny-ablation-stage2"
    stage3: str = "tiny-ablation-stage3"
    captions: str = "tiny-ablation-captions-stage2"
    finished: str = "vlv-tiny"
    changes1: tuple[str, ...] = ()
    changes2: tuple[str, ...] = ()
    changes3: tuple[str, ...] = ()
    wrong: Path | None = None
    rates: tuple[float, ...] = (1.0,)
    seeds: int = 3
    given: Mapping[str, Sequence[str]] = field(default_factory=dict)
    measuring: toyworld.Plan = field(default_factory=lambda: toyworld.Plan(num=1000))
    tuning_num: int = 500
    trained: Path | None = None

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0:
            raise ConfigError(
                "every --rate is a factor above 0 of the learning rate; write --rate 0.5"
            )


def alternatives(variant: Variant, plan: Plan) -> dict[str, Variant]:
    """The forms of a variant among which validation chooses, by what tells them apart.

    A rate changes the last training of the variant. A single form, which nothing tells apart, is not tuned.
    """
    if len(plan.rates) == 1 and not variant.choices:
        return {"": _at_rate(variant, plan.rates[0], plan)}
    if variant.last is not None and variant.stage3 is None:  # nothing is trained
        return {"": variant}
    return {
        ", ".join([f"rate x {rate:g}", *more]): _at_rate(_with(variant, more), rate, plan)
        for more in variant.choices or ((),)
        for rate in plan.rates
    }


def _with(variant: Variant, changes: Sequence[str]) -> Variant:
    """The variant with further changes of its last training."""
    more = tuple(changes)
    if variant.last is not None:
        return replace(variant, choices=(), stage3=(*(variant.stage3 or ()), *more))
    if variant.stage2 is not None:
        return replace(variant, choices=(), stage2=(*variant.stage2, *more))
    return replace(variant, choices=(), stage1=(*(variant.stage1 or ()), *more))


def _at_rate(variant: Variant, rate: float, plan: Plan) -> Variant:
    """The variant with a multiple of the learning rate of its last training."""
    if rate == 1 or (variant.last is not None and variant.stage3 is None):
        return variant
    *_, last = _settings(variant, 0, plan, Path("model"))
    return _with(variant, [f"optim.lr={rate * last.optim.lr:.6g}"])


# --- settings --------------------------------------------------------------------------------------


def _changes(variant: Variant, stage: str, seed: int, plan: Plan) -> list[str]:
    """Changes of the settings of a stage."""
    parts = plan.parts.as_posix()
    part = "florence" if stage == "stage1" else "llm"
    common = plan.changes1 if stage == "stage1" else plan.changes2
    own = (variant.stage1 if stage == "stage1" else variant.stage2) or ()
    return [
        f"model.decoder={parts}",
        f"model.{part}={parts}/{part}",
        *common,
        *(change.replace("{parts}", parts) for change in own),
        f"loop.seed={seed}",
    ]


def _first(variant: Variant, seed: int, plan: Plan) -> RunConfig:
    """The settings of stage 1.

    A share of it is the beginning of the whole: it ends in the midst of the decay, as the paper's checkpoints of one run do.
    """
    changes = _changes(variant, "stage1", seed, plan)
    whole = load_config(plan.stage1, changes)
    if variant.share == 1:
        return whole
    steps = whole.loop.steps
    decay = whole.optim.decay_steps or steps
    shares = [f"loop.steps={round(variant.share * steps)}"]
    if whole.optim.schedule != "constant":
        shares.append(f"optim.decay_steps={decay}")
    return load_config(plan.stage1, [*changes, *shares])


def _second(variant: Variant, seed: int, plan: Plan, encoder: Path) -> RunConfig:
    """The settings of stage 2, after a stage 1 where the variant has one."""
    changes = _changes(variant, "stage2", seed, plan)
    if variant.stage1 is not None:
        changes.append(f"model.encoder={encoder.as_posix()}")
    return load_config(plan.stage2, changes)


def _taught(variant: Variant, seed: int, plan: Plan) -> RunConfig | None:
    """The settings of a training by a good or a bad teacher, which the finished model gets first; None where it gets none."""
    if variant.teacher is None:
        return None
    wrong = [] if variant.teacher == "good" else [f"data.inputs=[{plan.wrong}]"]
    changes = [*plan.changes2, *wrong, f"loop.seed={seed}"]
    return load_config(plan.captions, [*_start(plan.finished), *changes])


def _last(variant: Variant, seed: int, plan: Plan, model: str) -> RunConfig | None:
    """The settings of a training that goes on from a model; None where it is measured as it is."""
    if variant.stage3 is None:
        return None
    preset = plan.stage3 if variant.last == "stage3" else plan.captions
    changes = [*_start(model), *plan.changes3, *variant.stage3, f"loop.seed={seed}"]
    return load_config(preset, changes)


def _start(model: str) -> list[str]:
    """The settings that name a model as the one to go on from."""
    return [f"model.{part}={model}" for part in ("encoder", "decoder", "caption_decoder")]


def _settings(variant: Variant, seed: int, plan: Plan, before: Path) -> Iterator[RunConfig]:
    """The settings of every training of a variant, in order, as if all but the first went on from one model."""
    if variant.last is not None:
        for config in (_taught(variant, seed, plan), _last(variant, seed, plan, plan.finished)):
            if config is not None:
                yield config
        return
    if variant.stage1 is not None:
        yield _first(variant, seed, plan)
    if variant.stage2 is not None:
        yield _second(variant, seed, plan, before)


def settings_of(variant: Variant, seed: int, plan: Plan) -> list[RunConfig]:
    """The settings of every training of a variant, in order; where a trained model goes on it is called `model`."""
    return list(_settings(variant, seed, plan, Path("model")))


# --- models ----------------------------------------------------------------------------------------


def model_of(variant: Variant, seed: int, home: Path, plan: Plan) -> Path:
    """The model folder of a variant, trained where it is not yet.

    Args:
        variant: One of its `alternatives`.
        seed: Of the training.
        home: Of the training runs.
        plan: Of the training.

    Raises:
        Interrupted: As `vlv.training.assemble.train`.
    """
    if variant.last is not None:
        taught = _taught(variant, seed, plan)
        start = find_folder(plan.finished) if taught is None else _trained(taught, home)
        name = plan.finished if taught is None else start.as_posix()
        config = _last(variant, seed, plan, name)
        return start if config is None else _trained(config, home)
    first = Path()
    if variant.stage1 is not None:
        first = _trained(_first(variant, seed, plan), home)
        if variant.stage2 is None:
            return first
    return _trained(_second(variant, seed, plan, first), home)


def _trained(config: RunConfig, home: Path) -> Path:
    """The model of a training run that is named by its settings."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    name = f"{config.stage}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    model = home / name / "model"
    if not model.is_dir():  # it is saved complete, or not at all
        train(config, home / name)
    return model
