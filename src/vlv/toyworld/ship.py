"""From a finished training to the folder that the package ships.

It holds the weights in half precision, the inspector, the settings and logs of every run, and a
model card with the measured figures.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vlv.errors import ModelFolderError
from vlv.models.card import CARD_NAME, forget_paths
from vlv.models.components import check_replaceable, write_component
from vlv.models.pipeline import VLVPipeline
from vlv.storage import Json, replacing_folder
from vlv.toyworld.inspector import Inspector

LOG_LINES = 200
"""Lines kept of each run's log; a longer one is thinned evenly."""


def ship(
    model: Path, parts: Path, runs: Path, out: Path, results: Path | None = None, note: str = ""
) -> None:
    """Write the shipped model folder: complete, or not at all.

    Args:
        model: The model folder that stage 2 saved.
        parts: The folder of the pretrained parts; its inspector is taken along.
        runs: The folder that holds the run of every part and stage; the settings and logs of all are taken along.
        out: Where the model goes.
        results: JSON of `vlv eval toyworld`, quoted in the card.
        note: A sentence on how this training departed from the recipe, for the card.

    Raises:
        ModelFolderError: The model or the inspector is missing.
        OutputError: The folder holds something else, or the disk refuses.
    """
    if not (parts / "inspector").is_dir():
        raise ModelFolderError(f"{parts} has no inspector; train it first")
    check_replaceable(out)
    pipe, inspector = (
        VLVPipeline.from_pretrained(model),
        Inspector.from_pretrained(parts / "inspector"),
    )
    figures = json.loads(results.read_text("utf-8")) if results is not None else None
    with replacing_folder(out) as folder:
        # whole: a part that stage 3 took from the shipped model would be named there, and the folder would name itself
        pipe.save_pretrained(folder, dtype=torch.float16, references={})
        write_component(inspector, folder / "inspector", torch.float16)
        for log in sorted(runs.glob("*/metrics.jsonl")):
            _keep_run(log.parent, folder / "training" / log.parent.name)
        if results is not None:
            _copy_text(results, folder / "evaluation.json")
        (folder / CARD_NAME).write_text(_card(figures, note), encoding="utf-8")


def _keep_run(run: Path, out: Path) -> None:
    """Settings, versions and the thinned log of one run."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "versions.json"):
        if (run / name).is_file():
            _copy_text(run / name, out / name)
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    every = -(-len(lines) // LOG_LINES)
    kept = [line for i, line in enumerate(lines) if i % every == 0 or i == len(lines) - 1]
    (out / "metrics.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")


def _copy_text(source: Path, target: Path) -> None:
    """Copy a text file without the paths of this machine."""
    target.write_text(forget_paths(source.read_text("utf-8")), encoding="utf-8")


def _card(results: Json | None, note: str) -> str:
    return _CARD.format(figures=_NOT_YET if results is None else _figures(results), note=note)


def _figures(results: Json) -> str:
    """The table of an evaluation's figures."""
    settings = results["settings"]
    head = (
        f"n = {settings['num']} scenes of seed {settings['seed']}, {settings['steps']} sampler steps, "
        f"guidance {settings['guidance']}.\n\n| figure | value | 95 % interval | unit |\n|---|---|---|---|"
    )
    figures = [
        figure
        for section in results["sections"].values()
        for figure in section.get("figures", {}).values()
    ]
    return "\n".join([head, *(_row(figure) for figure in figures if figure["value"] is not None)])


def _row(figure: Json) -> str:
    low, high = figure["low"], figure["high"]
    interval = "" if low is None else f"{low:.4g} to {high:.4g}"
    return f"| {figure['label']} | {figure['value']:.4g} | {interval} | {figure['unit']} |"


_NOT_YET = "Not measured yet: `vlv eval toyworld --num 2000 --seed 1` prints them."

_CARD = """---
library_name: vlv
pipeline_tag: image-to-text
license: apache-2.0
knows: "The toy world only: one to three rendered solids on a plain, 64 pixels wide."
parts: {{encoder: Apache-2.0, text_encoder: Apache-2.0, tokenizer: Apache-2.0, unet: Apache-2.0, vae: Apache-2.0, scheduler: Apache-2.0, caption_decoder: Apache-2.0}}
---

# vlv-tiny

A complete Vision-Language-Vision auto-encoder
([arXiv 2507.07104](https://arxiv.org/abs/2507.07104)) of about 10 million parameters. It knows one
thing only: the toy world that `vlv toyworld render` draws. On a photograph it will see spheres,
cubes, cylinders and cones. It is here to show the method at work in seconds on a processor, and to
test every line of code that real models run through.

```python
from vlv import VLVPipeline

pipe = VLVPipeline.from_pretrained("vlv-tiny")
pipe.caption("scene.png")
pipe.reconstruct("scene.png", seed=0)
```

## Parts and licence

Every part was trained from random weights by the commands of `runs/tiny.sh`, on rendered images and
generated text alone: no foreign weights and no foreign data are in it. All of it is Apache-2.0.

The classes are those of the real models: `AutoencoderKL`, `UNet2DConditionModel`, `CLIPTextModel`,
`Florence2ForConditionalGeneration` (inside the encoder), `Qwen2ForCausalLM` (inside the caption
decoder). `inspector/` is the measuring instrument, not a part of the model.

## Data and training

40,000 rendered scenes of the split `train` (seed 0); some pairs of shape and colour never occur in
it. The text tower learns from pairs of captions and images, the U-Net from its frozen output.
Florence-2 learns three captioning tasks (short, tags, detailed). Stage 1 starts from it with fresh
queries and a fresh projector, and learns from images alone by the denoising loss alone; stage 2
learns from captions too; in stage 3 the frozen decoder judges the captions that the model writes of
images without any. `training/` holds the settings, versions and logs of every run. {note}

## Evaluation

On freshly rendered held-out scenes, judged by the inspector and the caption parser; toy-world
evidence, not comparable with any other data set.

{figures}

## Limits

64x64 pixels; one to three solids; the words of one small grammar. Nothing that it measures carries
over to photographs.
"""
