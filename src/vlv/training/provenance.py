"""What the card of a trained model tells: where its parts come from, and how it was trained."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from vlv.config import PartSource, RunConfig
from vlv.models.card import Origin, Provenance, Training, forget_paths, origin_of, past_trainings
from vlv.models.folder import COMPONENTS, MORE_COMPONENTS
from vlv.training.journal import read_metrics

_TRAINS = {
    "language": "encoder, but for its vision tower",
    "all": "encoder",
    "mlp": "projector of the caption decoder",
    "mlp+llm": "caption decoder",
    "mlp+llm+encoder": "caption decoder; encoder, but for its vision tower",
}


def provenance(
    config: RunConfig,
    run_dir: Path,
    *,
    num_images: int | None,
    num_held_out: int,
    learnt_from: Path | None,
) -> Provenance:
    """What is known when a run has ended.

    Args:
        config: Of the run.
        run_dir: Its folder, whose metrics.jsonl has the figures.
        num_images: Different images in the training data; None where they were streamed.
        num_held_out: Images behind the figures.
        learnt_from: Folder of the model whose encoder learnt on; None for a fresh encoder.
    """
    earlier = past_trainings(learnt_from) if learnt_from is not None else ()
    this = describe_run(config, run_dir, num_images=num_images, num_held_out=num_held_out)
    return Provenance(_origins(config), (*earlier, this))


def describe_run(
    config: RunConfig, run_dir: Path, *, num_images: int | None, num_held_out: int
) -> Training:
    """One run as the card tells of it."""
    loop = config.loop
    stage = config.stage1 or config.stage2 or config.stage3
    assert stage is not None, "a run has one stage"
    text = yaml.safe_dump(config.model_dump(mode="json", exclude_none=True))
    evals = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "eval"]
    last = evals[-1] if evals else {}
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    per_step = loop.global_batch_size or loop.batch_size * loop.accumulate * processes
    return Training(
        stage=config.stage,
        steps=loop.steps,
        images_per_step=per_step,
        num_images=num_images,
        learning_rate=config.optim.lr,
        schedule=config.optim.schedule,
        seed=loop.seed,
        precision=loop.precision,
        trains=_TRAINS[stage.trainable] + ("" if config.lora is None else ", by adapters"),
        settings=yaml.safe_load(forget_paths(text)),
        figures={name: value for name, value in last.items() if name not in {"step", "kind"}},
        num_held_out=num_held_out,
    )


def _origins(config: RunConfig) -> dict[str, Origin]:
    model = config.model
    sources: dict[str, PartSource | None] = dict.fromkeys(
        (*COMPONENTS, *MORE_COMPONENTS), model.decoder
    )
    sources["encoder"] = model.encoder or model.florence or model.backbone
    sources["caption_decoder"] = model.caption_decoder or model.llm
    return {
        part: origin_of(source.path, part, revision=source.revision)
        for part, source in sources.items()
        if source is not None
    }
