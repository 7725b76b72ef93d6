"""The predicted memory against the measured one: what the CPU allocator of torch handed out, seen by its profiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from tests import tiny
from tests.training.ranks import run_ranks
from tests.training.support import loop_config, optim_config
from tests.training.test_stages import make_batch, stage1, stage2
from vlv.config import LoopConfig, LoraConfig, ModelPreset, RunConfig, load_config
from vlv.jobs.plans import (
    RunPlan,
    describe_parts,
    describe_preset,
    plan_captioning,
    plan_reconstruction,
    plan_training,
    training_batch,
)
from vlv.models.architectures import outline
from vlv.models.draws import RowGenerator
from vlv.models.pipeline import VLVPipeline
from vlv.models.placement import linear_layers
from vlv.training.assemble import Parts, make_objective, prepare, set_precision
from vlv.training.distributed import join_world
from vlv.training.microbatches import with_targets
from vlv.training.prediction import Footprint, num_bytes, predict_step, sum_of_bytes
from vlv.training.recompute import predicted_peak
from vlv.training.step import TrainingStep
from vlv.training.weights import set_train_mode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BATCH_SIZE, TOKENS = 6, 24
AVERAGED = {"accumulate": 2, "ema": 0.9}


def measured(held: list[torch.Tensor], work: Callable[[], Any]) -> int:
    """Bytes of what is held, and the most that `work` had allocated on top of it."""
    weights = sum_of_bytes(held)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = record.profiler.kineto_results.events()
    allocations = [e for e in events if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(allocations, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return weights + peak


def tensors_of(*modules: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers."""
    group = nn.ModuleList(modules)
    return [*group.parameters(), *group.buffers()]


def config(stage: str, precision: str, **loop: Any) -> RunConfig:
    changes = {"batch_size": BATCH_SIZE, "precision": precision, "accumulate": 1} | loop
    changes["global_batch_size"] = "null"
    changed = load_config(f"paper-{stage}", [f"loop.{k}={v}" for k, v in changes.items()])
    if stage == "stage2":
        settings = changed.stage2.model_copy(update={"max_caption_tokens": TOKENS})
        changed = changed.model_copy(update={"stage2": settings})
    return changed


class Captions:
    """A tokenizer whose captions all have the greatest length."""

    eos_token_id = pad_token_id = 0

    def __call__(self, texts: Any, **_: Any) -> Any:
        return type("Ids", (), {"input_ids": [[5] * (TOKENS - 1) for _ in texts]})

    def decode(self, ids: Any, **_: Any) -> str:
        return str(ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "loop"),
    [
        pytest.param("stage1", "fp32", {}, marks=pytest.mark.slow),
        pytest.param("stage1", "bf16", {}, marks=pytest.mark.slow),
        ("stage2", "fp32", {"ema": 0.99}),
        ("stage2", "bf16", {"accumulate": 2}),
    ],
)
def test_training(
    tiny_models: ModelPreset, stage: str, precision: str, loop: dict[str, Any]
) -> None:
    assert_predicted(tiny_models, config(stage, precision, **loop))


@pytest.mark.slow
def test_training_of_adapters(tiny_models: ModelPreset) -> None:
    """Beside weights in 16 bits as measured; beside 4 bits from shapes alone, and from real layers of bitsandbytes."""
    for package in ("peft", "bitsandbytes"):
        pytest.importorskip(package, reason='pip install "vlv[lora,quant]"')
    run = config("stage2", "bf16", accumulate=2)
    assert run.stage2 is not None
    half_run, packed_run = (
        run.model_copy(update={"stage2": run.stage2.model_copy(update={"lora": lora})})
        for lora in (LoraConfig(rank=2), LoraConfig(rank=2, bits=4))
    )
    half = assert_predicted(tiny_models, half_run)
    packed = plan_training(tiny_models, "packed", packed_run).footprint
    linear = sum(layer.weight.numel() for layer in linear_layers(tiny.make_llm()).values())
    assert half.weights - packed.weights == 1.5 * linear
    assert half.gradients == packed.gradients
    whole = sum(p.numel() * 4 for p in tiny.make_caption_decoder().parameters())
    assert half.gradients < 0.5 * whole
    parts = Parts(tiny.make_encoder(), tiny.make_decoder(), tiny.make_caption_decoder())
    parts.decoder.unet = parts.decoder.vae = None
    objective = prepare(packed_run, parts, torch.device("cpu"))
    found = predicted_peak(objective, tiny.IMAGE_SIZE, run.loop, run.optim, "never")
    assert found == pytest.approx(packed.peak, rel=0.02)


def assert_predicted(tiny_models: ModelPreset, run: RunConfig) -> Footprint:
    """Compare the memory of a run's step with what is measured."""
    stage, loop = run.stage, run.loop
    predicted = plan_training(tiny_models, stage, run).footprint
    parts = Parts(tiny.make_encoder(), tiny.make_decoder())
    if stage == "stage2":
        parts = Parts(tiny.make_encoder(), tiny.make_decoder(), tiny.make_caption_decoder())
        parts.decoder.unet = parts.decoder.vae = None
        parts.caption_decoder.tokenizer = Captions()  # type: ignore[union-attr,assignment]
    objective = make_objective(run, parts)
    set_precision(run, parts, objective)
    pixels = torch.zeros(BATCH_SIZE, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, dtype=torch.uint8)
    peak = measured(
        tensors_of(objective.module),
        lambda: predict_step(objective, training_batch(pixels), run.loop, run.optim),
    )
    assert predicted.peak == pytest.approx(peak, rel=0.10), predicted
    trained = sum(p.numel() * 4 for p in objective.module.parameters() if p.requires_grad)
    assert predicted.gradients == trained
    moments = 3 if loop.ema else 2
    assert predicted.optimizer == pytest.approx(moments * trained, rel=0.02)
    return predicted


STAGES = {"stage1": stage1, "stage2": stage2}
ON_SHARDS = [
    (stage, loop_config(batch_size=2, parallel="fsdp", **changes))
    for stage in STAGES
    for changes in ({}, AVERAGED)
]


def sharded(stage: str, loop: LoopConfig) -> int:
    """Memory of one of two processes among which what trains is sharded, measured."""
    objective = STAGES[stage]()
    step = TrainingStep(objective, loop, optim_config(lr_scale={}), join_world())
    set_train_mode(step.module)
    batches = [
        with_targets(make_batch(), objective, 2, RowGenerator(0, 0, range(2)))
        for _ in range(loop.accumulate)
    ]
    step(batches, 0)  # now the optimiser has its state
    frozen = num_bytes(step.module) - sum(p.numel() * 4 for p in step.parameters.values())
    averages = step.average.averages.values() if step.average else ()
    held = [*step.parameters.values(), *averages, *step.optimizer.tensors().values()]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in held]
    # a thread of the collectives frees its buffers late on a busy machine: the least of three steps is the step's own
    return frozen + min(measured(local, lambda: step(batches, loop.steps - 1)) for _ in range(3))


def all_sharded(rank: int) -> list[int]:
    del rank
    return [sharded(stage, loop) for stage, loop in ON_SHARDS]


@pytest.mark.slow
def test_training_of_a_share() -> None:
    found_by_rank = run_ranks(2, all_sharded)
    for number, (stage, loop) in enumerate(ON_SHARDS):
        whole, share = (
            predict_step(
                STAGES[stage](), make_batch(), loop, optim_config(lr_scale={}), num_ranks=n
            ).peak
            for n in (1, 2)
        )
        for found in found_by_rank:
            case = f"{stage}, {loop}"
            assert share == pytest.approx(found[number], rel=0.025), case
            assert whole > 1.03 * found[number], (
                f"a prediction for one process would do, too: {case}"
            )


def test_each_process_of_ddp_holds_its_gradients_all_the_time() -> None:
    loop, optim = loop_config(batch_size=2), optim_config(lr_scale={})
    alone, beside = (predict_step(stage2(), make_batch(), loop, optim, num_ranks=n) for n in (1, 2))
    assert beside.peak - alone.peak == alone.gradients == beside.gradients


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference(tiny_models: ModelPreset, tiny_folder: Any, dtype: torch.dtype) -> None:
    pipe = VLVPipeline.from_pretrained(tiny_folder, dtype=dtype)
    pixels = list(torch.rand(BATCH_SIZE, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE))
    reading = [pipe.encoder, pipe.text_encoder, pipe.caption_decoder]
    peak = measured(
        tensors_of(*reading),
        lambda: pipe.caption(pixels, batch_size=BATCH_SIZE, max_new_tokens=TOKENS),
    )
    predicted = plan_captioning(tiny_models, BATCH_SIZE, dtype, TOKENS).footprint
    assert predicted.peak == pytest.approx(peak, rel=0.10), predicted
    drawing = [pipe.encoder, pipe.text_encoder, pipe.unet, pipe.vae]
    peak = measured(
        tensors_of(*drawing), lambda: pipe.reconstruct(pixels, batch_size=BATCH_SIZE, steps=2)
    )
    predicted = plan_reconstruction(tiny_models, BATCH_SIZE, dtype).footprint
    assert predicted.peak == pytest.approx(peak, rel=0.10), predicted
    assert predicted.weights == pytest.approx(num_bytes(nn.ModuleList(drawing)), rel=0.01)


def test_parts(tiny_models: ModelPreset) -> None:
    parts = {part.name: part for part in describe_preset(tiny_models)}
    assert parts["llm"].num_parameters == sum(p.numel() for p in tiny.make_llm().parameters())
    assert parts["llm"].download == 0


def test_adapters_of_the_papers_language_model_are_a_few_percent_of_it(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason='adapters need the package peft: pip install "vlv[lora]"')
    parts = ["florence=florence-community/Florence-2-large", "encoder=null", "num_queries=77"]
    changes = ["trainable=mlp+llm", "lora={rank: 16}", "frozen_encoder_steps=0"]
    config = load_config(
        "paper-stage2",
        [*(f"model.{part}" for part in parts), *(f"stage2.{change}" for change in changes)],
    )
    found = describe_parts(config, Parts(*outline(config.model, config.data.image_size)))
    reader = next(part for part in found if part.name == "caption_decoder")
    width, inner, narrow, layers, rank = 2048, 11_008, 256, 36, 16  # Qwen2.5-3B
    sides = [2 * width, width + narrow, width + narrow, 2 * width, *3 * [width + inner]]
    assert reader.num_adapters == layers * rank * sum(sides)
    assert 0.005 < reader.num_adapters / reader.num_parameters < 0.05
    psi = 1024 * width + width + width**2 + width
    assert reader.num_trained == reader.num_adapters + psi
    plan = RunPlan(config, 1, None, 0, found)
    (line,) = (line for line in plan.lines(tmp_path) if "adapters:" in line)
    assert line == (
        "  adapters: 29.93 M weights, 0.97% of the parts that they change; RUN_DIR/adapter takes 144.9 MB"
    )
