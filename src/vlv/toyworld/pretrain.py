"""Training of the miniature pretrained parts: one call each, resumable, saved in the real layouts.

The parts play the roles of the downloaded models, so this is the only place where a decoder, a
Florence-2 or a language model learns anything but the method's own stages:

    inspector   the measuring instrument                  needs nothing
    vae         latents                                   needs nothing
    vae_decoder the VAE's decoder, further                needs vae
    text        CLIP text tower                           needs nothing
    unet        text-conditioned U-Net                    needs vae, text
    vision      Florence-2's vision tower, on labels      needs nothing
    florence    Florence-2 on its captioning tasks        needs vision
    llm         language model on text alone              needs nothing
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from diffusers import AutoencoderKL
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    Florence2ForConditionalGeneration,
)

from vlv.config import LoopConfig, OptimConfig
from vlv.data.loader import Listed, Loader, LoaderSettings
from vlv.data.records import Record
from vlv.data.source import find_records
from vlv.errors import ConfigError, ModelFolderError
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.encoder import VLVEncoderConfig
from vlv.toyworld import components
from vlv.toyworld.inspector import Inspector, InspectorConfig
from vlv.toyworld.objectives import (
    FlorenceObjective,
    ImageTower,
    InspectorObjective,
    LlmObjective,
    TeacherObjective,
    TextReader,
    TextTowerObjective,
    VaeObjective,
    VisionReader,
)
from vlv.training.loop import fit
from vlv.training.objective import FitResult, Objective

Part = Literal["inspector", "vae", "vae_decoder", "text", "unet", "vision", "florence", "llm"]
PARTS: tuple[Part, ...] = get_args(Part)
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one part is trained."""

    steps: int
    batch_size: int
    lr: float
    ema: float | None = 0.999

    def settings(
        self, seed: int, steps: int | None, precision: Precision
    ) -> tuple[LoopConfig, OptimConfig]:
        """The loop and the optimiser: AdamW, a short warm-up, cosine decay."""
        steps = steps or self.steps
        loop = LoopConfig(
            steps=steps,
            batch_size=self.batch_size,
            seed=seed,
            precision=precision,
            ema=self.ema,
            eval_every=None,
            save_every=None,
            save_every_seconds=180,
        )
        warmup = min(100, steps // 10)
        return loop, OptimConfig(lr=self.lr, weight_decay=0.01, warmup_steps=warmup)


RECIPES: dict[Part, Recipe] = {
    "inspector": Recipe(steps=1500, batch_size=64, lr=1.5e-3),
    "vae": Recipe(steps=2200, batch_size=16, lr=2e-3),
    "vae_decoder": Recipe(steps=3000, batch_size=16, lr=1e-3),
    "text": Recipe(steps=600, batch_size=64, lr=1e-3, ema=0.99),
    "unet": Recipe(steps=2700, batch_size=32, lr=1e-3),
    "vision": Recipe(steps=1000, batch_size=64, lr=1.5e-3),
    "florence": Recipe(steps=2200, batch_size=32, lr=1e-3),
    "llm": Recipe(steps=1600, batch_size=32, lr=1.5e-3),
}
"""Budgets for two CPU cores, several hours in all."""


def pretrain(
    part: Part,
    data: list[Path],
    models: Path,
    run_dir: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    max_seconds: float | None = None,
    size: components.LlmSize = "medium",
    precision: Precision = "fp32",
) -> FitResult:
    """Train one part and save it in `models`; the same call goes on after an interruption.

    Args:
        part: Which one.
        data: Rendered shards of the world (`vlv toyworld render`).
        models: Folder of the parts, in the diffusers layout; earlier parts are read from it.
        run_dir: Folder of this run.
        seed: Of the weights, the order of the data, and every draw.
        steps: Other length than the recipe's.
        max_seconds: Stop and save after this time.
        size: Of the llm; a small or large one is saved as ``llm-small`` or ``llm-large``.
        precision: Of the arithmetic; weights and optimiser stay float32.

    Raises:
        ConfigError: The part is unknown or has no sizes, or the data were not rendered here.
        ModelFolderError: A part that this one needs is not in `models` yet.
        Interrupted: As `fit`.
    """
    if part not in PARTS:
        raise ConfigError(f"unknown part {part!r}; choose one of {', '.join(PARTS)}")
    if size not in components.LLM_SIZES or (size != "medium" and part != "llm"):
        sizes = ", ".join(components.LLM_SIZES)
        raise ConfigError(f"there is no {size} {part}; only the llm has sizes: {sizes}")
    records = find_records(data)
    if "scene" not in (records[0].meta or {}):
        raise ConfigError(f"{data[0]} holds no scenes; render it with `vlv toyworld render`")
    prepare = partial(_llm, size=size) if part == "llm" else _PREPARE[part]
    objective, save, extra = prepare(models, records, seed)
    recipe = RECIPES[part]
    about = {"part": part if size == "medium" else f"{part}-{size}"}
    loop, optim = recipe.settings(seed, steps, precision)
    settings = LoaderSettings(
        batch_size=recipe.batch_size,
        image_size=None if part in ("llm", "unet") else components.IMAGE_SIZE,
        seed=seed,
        num_workers=1,
    )
    loader = Loader(Listed(records, extra or {}), settings)
    result = fit(objective, loader, loop, optim, run_dir, max_seconds=max_seconds, settings=about)
    save(records)
    return result


Save = Callable[[list[Record]], None]
Prepared = tuple[Objective, Save, dict[str, Any] | None]


def _inspector(models: Path, records: list[Record], seed: int) -> Prepared:
    del records
    inspector = components.seeded(lambda: Inspector(InspectorConfig()), seed)
    return InspectorObjective(inspector), lambda _: _save(inspector, models / "inspector"), None


def _vae(models: Path, records: list[Record], seed: int) -> Prepared:
    del records
    vae: Any = components.make_vae(seed)

    def save(records: list[Record]) -> None:
        vae.register_to_config(scaling_factor=round(1 / _latent_std(vae, records), 4))
        _save(vae, models / "vae")

    return VaeObjective(vae), save, None


def _vae_decoder(models: Path, records: list[Record], seed: int) -> Prepared:
    del records, seed
    vae = AutoencoderKL.from_pretrained(_need(models, "vae"))
    encoder = (vae.encoder, vae.quant_conv)
    for half in encoder:
        half.requires_grad_(False)
    return VaeObjective(vae), lambda _: _save(vae, models / "vae"), None


@torch.no_grad()
def _latent_std(vae: Any, records: list[Record], num_images: int = 1024) -> float:
    """Standard deviation of the latents: its inverse is the latent scale."""
    settings = LoaderSettings(batch_size=64, image_size=components.IMAGE_SIZE)
    loader = Loader(records[:num_images], settings)
    batches = (next(loader)["pixels"] for _ in range(max(1, len(records[:num_images]) // 64)))
    means = [vae.encode(b.float() / 127.5 - 1).latent_dist.mean for b in batches]
    return float(torch.cat(means).std())


def _text(models: Path, records: list[Record], seed: int) -> Prepared:
    del records
    tokenizer = components.make_text_tokenizer()
    tower = components.make_text_encoder(tokenizer, seed)
    body = components.seeded(lambda: Inspector(InspectorConfig()), seed + 1)
    images = components.seeded(lambda: ImageTower(body, components.TEXT_WIDTH), seed + 2)
    reader = components.seeded(TextReader, seed + 3)

    def save(_: list[Record]) -> None:
        _save(tower, models / "text_encoder")
        tokenizer.save_pretrained(models / "tokenizer")

    return TextTowerObjective(tower, tokenizer, images, reader), save, None


def _unet(models: Path, records: list[Record], seed: int) -> Prepared:
    from vlv.training.caches import fill_cache, latents_cache

    tower = CLIPTextModel.from_pretrained(_need(models, "text_encoder"))
    tokenizer = CLIPTokenizer.from_pretrained(_need(models, "tokenizer"))
    vae = AutoencoderKL.from_pretrained(_need(models, "vae"))
    unet = components.make_unet(seed)
    scheduler: Any = components.make_scheduler()
    decoder = DiffusionDecoder(tower, tokenizer, cast("Any", unet), cast("Any", vae), scheduler)
    settings = LoaderSettings(batch_size=64, image_size=components.IMAGE_SIZE)
    cached = fill_cache(latents_cache(decoder), records, models / "latents", settings)

    def save(_: list[Record]) -> None:
        _save(unet, models / "unet")
        scheduler.save_pretrained(models / "scheduler")

    return TeacherObjective(decoder), save, dict(cached)


def _vision(models: Path, records: list[Record], seed: int) -> Prepared:
    del records
    tokenizer = components.make_florence_tokenizer()
    florence = components.make_florence(tokenizer, seed)
    reader = components.seeded(lambda: VisionReader(florence, _normalisation()), seed + 1)

    def save(_: list[Record]) -> None:
        _save(florence, models / "florence_vision")

    return InspectorObjective(reader), save, None


def _florence(models: Path, records: list[Record], seed: int) -> Prepared:
    del records
    tokenizer = components.make_florence_tokenizer()
    florence = components.make_florence(tokenizer, seed)
    sighted = Florence2ForConditionalGeneration.from_pretrained(_need(models, "florence_vision"))
    for part in ("vision_tower", "multi_modal_projector"):
        getattr(florence.model, part).load_state_dict(getattr(sighted.model, part).state_dict())

    def save(_: list[Record]) -> None:
        _save(florence, models / "florence")
        tokenizer.save_pretrained(models / "florence")

    return FlorenceObjective(florence, tokenizer, _normalisation()), save, None


def _normalisation() -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (3, 1, 1) that Florence-2's inputs are normalised with."""
    mean, std = VLVEncoderConfig.image_mean, VLVEncoderConfig.image_std
    return torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]


def _llm(
    models: Path, records: list[Record], seed: int, size: components.LlmSize = "medium"
) -> Prepared:
    del records
    tokenizer = components.make_llm_tokenizer()
    llm = components.make_llm(tokenizer, seed, size)
    folder = models / ("llm" if size == "medium" else f"llm-{size}")

    def save(_: list[Record]) -> None:
        _save(llm, folder)
        tokenizer.save_pretrained(folder)

    return LlmObjective(llm, tokenizer), save, None


_PREPARE: dict[Part, Callable[[Path, list[Record], int], Prepared]] = {
    "inspector": _inspector,
    "vae": _vae,
    "vae_decoder": _vae_decoder,
    "text": _text,
    "unet": _unet,
    "vision": _vision,
    "florence": _florence,
    "llm": _llm,
}


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, safe_serialization=True)


def _need(models: Path, name: str) -> Path:
    if not (models / name).is_dir():
        raise ModelFolderError(
            f"{models} has no {name}; train the parts in the order {', '.join(PARTS)}"
        )
    return models / name
