"""How good is a model of the toy world? Everything is measured on freshly rendered scenes with known truth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from vlv.data.images import to_pil
from vlv.errors import ConfigError
from vlv.evaluation.results import Results
from vlv.evaluation.scenes import NUM_EXAMPLES, World, make_world
from vlv.evaluation.sections import SECTIONS, Experiment, measure
from vlv.evaluation.shelf import Shelf
from vlv.evaluation.study import Settings, Study
from vlv.models.folder import COMPONENTS
from vlv.models.hashing import weights_hash
from vlv.models.pipeline import VLVPipeline
from vlv.toyworld.inspector import Inspector
from vlv.training.journal import versions


def evaluate_toyworld(
    pipe: VLVPipeline,
    inspector: Inspector,
    *,
    num: int = 2000,
    seed: int,
    batch_size: int = 64,
    steps: int = 20,
    guidance: float = 2.0,
    sections: Iterable[str] | None = None,
    stage1: VLVPipeline | None = None,
    control: VLVPipeline | None = None,
    parts: Path | None = None,
    progress: bool = False,
) -> Results:
    """Measure a model on `num` scenes of the split `test`, and a quarter as many of the split `composition`.

    The same arguments give the same figures; a picture starts from the noise of its scene, whatever the batch size. Pictures are
    inspected as they are drawn and not kept.

    Args:
        pipe: The model; sections whose parts it lacks are reported as not measured.
        inspector: The instrument, moved to the model's device.
        num: N, scenes.
        seed: Of the scenes, the noise and the intervals.
        batch_size: Pictures drawn together.
        steps: Sampler steps.
        guidance: Classifier-free guidance.
        sections: Names from `SECTIONS`; None is all of them.
        stage1: The model before stage 2, for the section of that name.
        control: A model trained without stage 1, likewise.
        parts: Folder that keeps the finished batches, so that the same call goes on after an interruption; None keeps nothing.
        progress: Show bars on stderr.

    Raises:
        ConfigError: A section is unknown, or there are fewer than two scenes.
    """
    names = _check(sections, num)
    settings = Settings(seed, batch_size, steps, guidance, progress=progress)
    inspector = cast("Any", inspector).eval().to(pipe.device)
    world = make_world("test", seed, range(num), pipe.image_size, progress=progress)

    def study(model: VLVPipeline, name: str, world: World = world) -> Study:
        shelf = Shelf(parts, _identity(model, settings, world))
        return Study(model, inspector, world, settings, name, shelf)

    run = Experiment(
        study(pipe, ""),
        stage1=None if stage1 is None else study(stage1, "before stage 2"),
        control=None if control is None else study(control, "without stage 1"),
        further=lambda world: study(pipe, world.split, world),
    )
    measured = tuple(measure(run, name) for name in names)
    return Results(
        settings=_describe(run, names, {"model": pipe, "stage1": stage1, "control": control}),
        sections=measured,
        examples=_examples(run.study),
        samples=_samples(run.study),
    )


def _identity(model: VLVPipeline, settings: Settings, world: World) -> dict[str, Any]:
    """What kept batches depend on beside the contexts: encoder and caption decoder show in those."""
    drawing = ("text_encoder", "unet", "vae")
    modules = {name: getattr(model, name, None) for name in drawing}
    return {
        "decoder": {k: weights_hash(m) for k, m in modules.items() if m is not None},
        "schedule": dict(model.scheduler.config) if model.scheduler is not None else {},
        "settings": asdict(replace(settings, progress=False)),
        "world": [world.split, settings.seed, world.seeds[0]],
    }


def _check(sections: Iterable[str] | None, num: int) -> list[str]:
    names = list(SECTIONS if sections is None else sections)
    for name in names:
        if name not in SECTIONS:
            raise ConfigError(f'"{name}" is no section; choose from {", ".join(SECTIONS)}')
    if num < 2:
        raise ConfigError(f"num is {num}; intervals need at least 2 scenes")
    return [name for name in SECTIONS if name in names]


def _describe(
    run: Experiment, names: list[str], models: dict[str, VLVPipeline | None]
) -> dict[str, Any]:
    """Everything that decides the figures."""
    settings, study = run.study.settings, run.study
    return {
        "num": run.num,
        "seed": run.seed,
        "split": study.world.split,
        "image_size": study.world.pixels.shape[-1],
        "batch_size": settings.batch_size,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "sampler": settings.sampler,
        "max_new_tokens": settings.max_new_tokens,
        "intervals": "95 %, 1000 bootstrap resamples of the scenes; of a toy FID 1.96 standard errors, 30 resamples",
        "sections": names,
        "models": {name: describe_model(pipe) for name, pipe in models.items() if pipe},
        "inspector": {
            "parameters": study.inspector.num_parameters(),
            "sha256": weights_hash(study.inspector),
        },
        "versions": versions(),
    }


def describe_model(pipe: VLVPipeline) -> dict[str, Any]:
    """Name, and size and weight hash of each component."""
    parts = {name: getattr(pipe, name, None) for name in COMPONENTS}
    modules = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    return {
        "name": str(pipe.config.get("_name_or_path") or "in memory"),
        "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in modules.items()},
        "sha256": {name: weights_hash(module) for name, module in modules.items()},
    }


# --- for a person to look at ------------------------------------------------------------------------

_ROWS = {
    "original": "originals",
    "from z": "from_z",
    "from our caption": "from_captions",
    "from the true caption": "from_true_text",
    "from its words shuffled": "from_shuffled_words",
}


def _made(study: Study, name: str) -> Any:
    """What a study has made already."""
    return vars(study).get(name)


def _examples(study: Study) -> dict[str, torch.Tensor]:
    rows = {label: _made(study, name) for label, name in _ROWS.items()}
    found = {label: row.examples for label, row in rows.items() if row is not None}
    return {"original": study.world.pixels[:NUM_EXAMPLES]} | found


def _samples(study: Study) -> tuple[dict[str, Any], ...]:
    """One row per scene: its captions, and the shares of claims found in what was made of it."""
    pictures = {label: _made(study, name) for label, name in _ROWS.items()}
    written = _made(study, "captions")
    rows = []
    for index, scene in enumerate(study.world.scenes):
        row: dict[str, Any] = {"index": index, "true_caption": study.world.captions[index]}
        if written is not None:
            stated, true, correct = written.counts[index].sum(0).astype(int).tolist()
            row |= {
                "caption": written.captions[index].text,
                "finished": written.captions[index].finished,
            }
            row |= {"stated": stated, "true": true, "correct": correct}
        for label, seen in pictures.items():
            if seen is not None:
                _, true, correct = seen.counts[index].sum(0).tolist()
                row[f"found in picture {label}"] = correct / true
        rows.append(row | {"scene": scene.to_dict()})
    return tuple(rows)


def example_sheet(results: Results) -> Image.Image:
    """The first scenes as columns: the original above, what was made of it below."""
    rows = [torch.cat(list(pictures), -1) for pictures in results.examples.values()]
    page = torch.cat(rows, -2)  # (3, rows S, columns S)
    image = to_pil(page.float() / 255)
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)
