"""A miniature inspector, a CLIP, and a short way to let a judge look at a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from tests import tiny
from vlv.evaluation.experiments.judging import judge_run
from vlv.evaluation.experiments.run import Judge, Run
from vlv.toyworld.inspector import Inspector, InspectorConfig

if TYPE_CHECKING:
    from pathlib import Path

    from vlv.evaluation.experiments.backends import Backends
    from vlv.jobs.tally import Tally


def judge(run: Run, text: str, backends: Backends, **options: Any) -> Tally:
    """Let the judge NAME=KIND:VALUE look at a run."""
    return judge_run(run, Judge.parse(text, **options), backends)


def make_inspector(seed: int = 0) -> Inspector:
    """An untrained inspector of width 16 that sees other things in other pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inspector = Inspector(InspectorConfig(channels=(8, 16, 16), heads=2))
    with torch.no_grad():
        for head in (inspector.scene_head, inspector.object_head):
            head.weight.mul_(100)
        inspector.object_head.bias[1] = 1000  # it always sees three objects
    return cast("Inspector", inspector.eval())


def save_clip(folder: Path) -> Path:
    """A CLIP with 16 text positions, whose end token is the tokenizer's."""
    tokenizer = tiny.make_clip_tokenizer()
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    text: dict[str, Any] = {
        **small, "vocab_size": len(tokenizer), "max_position_embeddings": tiny.TEXT_POSITIONS,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {**small, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder
