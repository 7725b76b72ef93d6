"""The predicted memory against the measured one: what the CPU allocator of torch handed out, seen by its profiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tests import tiny
from vlv.config import ModelPreset, RunConfig, load_config
from vlv.jobs.memory_plan import (
    describe_parts,
    plan_captioning,
    plan_reconstruction,
    plan_training,
    training_batch,
)
from vlv.models.pipeline import VLVPipeline
from vlv.training.assemble import Parts, make_objective, set_precision
from vlv.training.memory import num_bytes, rehearse_training

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH_SIZE, TOKENS = 6, 24


def measured(modules: list[nn.Module], work: Callable[[], Any]) -> int:
    """Bytes of the modules, and the most that `work` had allocated on top of them."""
    weights = num_bytes(nn.ModuleList(modules))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = record.profiler.kineto_results.events()
    allocations = [e for e in events if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(allocations, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return weights + peak


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


@pytest.mark.parametrize(
    ("stage", "precision", "loop"),
    [
        ("stage1", "fp32", {}),
        ("stage1", "bf16", {}),
        ("stage2", "fp32", {"ema": 0.99}),
        ("stage2", "bf16", {"accumulate": 2}),
    ],
)
def test_training(
    tiny_models: ModelPreset, stage: str, precision: str, loop: dict[str, Any]
) -> None:
    run = config(stage, precision, **loop)
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
        [objective.module],
        lambda: rehearse_training(objective, training_batch(pixels), run.loop, run.optim),
    )
    assert predicted.peak == pytest.approx(peak, rel=0.10), predicted
    trained = sum(p.numel() * 4 for p in objective.module.parameters() if p.requires_grad)
    assert predicted.gradients == trained
    moments = 3 if loop.get("ema") else 2
    assert predicted.optimizer == pytest.approx(moments * trained, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference(tiny_models: ModelPreset, tiny_folder: Any, dtype: torch.dtype) -> None:
    pipe = VLVPipeline.from_pretrained(tiny_folder, dtype=dtype)
    pixels = list(torch.rand(BATCH_SIZE, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE))
    reading = [pipe.encoder, pipe.text_encoder, pipe.caption_decoder]
    peak = measured(
        reading, lambda: pipe.caption(pixels, batch_size=BATCH_SIZE, max_new_tokens=TOKENS)
    )
    predicted = plan_captioning(tiny_models, BATCH_SIZE, dtype, TOKENS).footprint
    assert predicted.peak == pytest.approx(peak, rel=0.10), predicted
    drawing = [pipe.encoder, pipe.text_encoder, pipe.unet, pipe.vae]
    peak = measured(drawing, lambda: pipe.reconstruct(pixels, batch_size=BATCH_SIZE, steps=2))
    predicted = plan_reconstruction(tiny_models, BATCH_SIZE, dtype).footprint
    assert predicted.peak == pytest.approx(peak, rel=0.10), predicted
    assert predicted.weights == pytest.approx(num_bytes(nn.ModuleList(drawing)), rel=0.01)


def test_parts(tiny_models: ModelPreset) -> None:
    parts = {part.name: part for part in describe_parts(tiny_models)}
    assert parts["llm"].num_parameters == sum(p.numel() for p in tiny.make_llm().parameters())
    assert parts["llm"].download == 0
