"""Training of the miniature pretrained parts: one call each, resumable, saved in the real layouts.

The parts play the roles of the downloaded models, so this is the only place where a decoder, a
Florence-2 or a language model learns anything but the method's own stages:

    inspector   the measuring instrument                  needs nothing
    vae         latents                                   needs nothing
    text        CLIP text tower                           needs nothing
    unet        U-Net, and the text tower with it         needs vae, text
    vision      Florence-2's vision tower, on labels      needs nothing
    florence    Florence-2 on its captioning tasks        needs vision
    llm         language model on text alone              needs nothing

The inspector, and the language model that sees no image, learn from scenes of the split `any`: an instrument must be
able to report every pair of shape and colour, and a language model has read of them. All others learn from `train`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    Florence2ForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from vlv.config import LoopConfig, OptimConfig
from vlv.data.records import Record
from vlv.data.source import find_records
from vlv.errors import ConfigError, ModelFolderError
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.encoder import VLVEncoderConfig
from vlv.storage import replacing_folder
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
from vlv.toyworld.scene import Scene
from vlv.toyworld.table import (
    LABEL,
    TableLoader,
    image_columns,
    scenes_of,
    token_column,
    write_texts,
)
from vlv.toyworld.writing import Form, Write, write_at_length, write_mixed
from vlv.training.distributed import join_world
from vlv.training.loop import fit
from vlv.training.objective import FitResult, Objective

Part = Literal["inspector", "vae", "text", "unet", "vision", "florence", "llm"]
PARTS: tuple[Part, ...] = get_args(Part)
Precision = Literal["fp32", "bf16"]

MOST_TOKENS = 192
"""Of a text that the language model reads."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one part is trained."""

    steps: int
    batch_size: int
    lr: float
    ema: float | None = 0.999
    precision: Precision = "fp32"
    """Of the arithmetic; weights and optimiser stay float32."""

    def settings(self, seed: int) -> tuple[LoopConfig, OptimConfig]:
        """The loop and the optimiser: AdamW, a short warm-up, cosine decay."""
        loop = LoopConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            seed=seed,
            precision=self.precision,
            ema=self.ema,
            eval_every=None,
            save_every=None,
            save_every_seconds=180,
        )
        warmup = min(100, self.steps // 10)
        return loop, OptimConfig(lr=self.lr, weight_decay=0.01, warmup_steps=warmup)


RECIPES: dict[Part, Recipe] = {
    "inspector": Recipe(steps=1500, batch_size=64, lr=1.5e-3),
    "vae": Recipe(steps=5200, batch_size=16, lr=2e-3),
    "text": Recipe(steps=600, batch_size=64, lr=1e-3, ema=0.99),
    "unet": Recipe(steps=2700, batch_size=32, lr=1e-3),
    "vision": Recipe(steps=1000, batch_size=64, lr=1.5e-3),
    "florence": Recipe(steps=2200, batch_size=32, lr=1e-3),
    "llm": Recipe(steps=1600, batch_size=32, lr=1.5e-3),
}
"""Budgets for two CPU cores, several hours in all; on a GPU larger batches cost no more."""


def recipe_of(part: Part) -> Recipe:
    """How a part is trained.

    Raises:
        ConfigError: The part is unknown.
    """
    if part not in RECIPES:
        raise ConfigError(f"unknown part {part!r}; choose one of {', '.join(PARTS)}")
    return RECIPES[part]


def pretrain(
    part: Part,
    data: list[Path],
    models: Path,
    run_dir: Path,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    max_seconds: float | None = None,
    size: components.LlmSize = "medium",
) -> FitResult:
    """Train one part and save it in `models`; the same call goes on after an interruption.

    Args:
        part: Which one.
        data: Rendered shards of the world (`vlv toyworld render`).
        models: Folder of the parts, in the diffusers layout; earlier parts are read from it.
        run_dir: Folder of this run.
        recipe: Length, batches, rate and precision; by default those of `RECIPES`.
        seed: Of the weights, the order of the data, and every draw.
        max_seconds: Stop and save after this time.
        size: Of the llm; a small or large one is saved as ``llm-small`` or ``llm-large``.

    Raises:
        ConfigError: The part is unknown or has no sizes, or the data were not rendered here.
        ModelFolderError: A part that this one needs is not in `models` yet.
        OutputError: The disk refuses.
        Interrupted: As `fit`.
    """
    recipe = recipe or recipe_of(part)
    if size not in components.LLM_SIZES or (size != "medium" and part != "llm"):
        sizes = ", ".join(components.LLM_SIZES)
        raise ConfigError(f"there is no {size} {part}; only the llm has sizes: {sizes}")
    records = find_records(data)
    if "scene" not in (records[0].meta or {}):
        raise ConfigError(f"{data[0]} holds no scenes; render it with `vlv toyworld render`")
    device = join_world().device
    prepare = partial(_llm, size=size) if part == "llm" else _PREPARE[part]
    prepared = prepare(Source(models, records, seed, device))
    about = {"part": part if size == "medium" else f"{part}-{size}"}
    loop, optim = recipe.settings(seed)
    loader = TableLoader(
        prepared.columns, loop.batch_size, seed=seed, device=device, texts=prepared.texts
    )
    result = fit(
        prepared.objective, loader, loop, optim, run_dir, max_seconds=max_seconds, settings=about
    )
    prepared.save()
    return result


@dataclass(frozen=True)
class Source:
    """What a part is made from."""

    models: Path
    records: list[Record]
    seed: int
    device: torch.device

    @cached_property
    def scenes(self) -> list[Scene]:
        """Behind the records."""
        return scenes_of(self.records)

    def images(self, *names: str, labels: bool = False) -> dict[str, Tensor]:
        """Columns of images and boxes, and on demand of labels."""
        columns = image_columns(self.records, components.IMAGE_SIZE, self.models / "scenes")
        chosen = {name: columns[name] for name in names}
        if labels:
            chosen |= {name: c for name, c in columns.items() if name.startswith(LABEL)}
        return chosen

    def texts(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Write,
        variants: int,
        max_length: int,
        end: str = "",
    ) -> Tensor:
        """A column of the token ids of several texts of every scene."""
        texts = write_texts(self.scenes, write, variants, self.seed)
        return token_column(tokenizer, texts, variants, max_length=max_length, end=end)


@dataclass(frozen=True)
class Prepared:
    """A part before its training."""

    objective: Objective
    columns: dict[str, Tensor]
    save: Callable[[], None]
    texts: Sequence[str] = ()
    """The columns that hold several texts of every scene."""


def _inspector(source: Source) -> Prepared:
    inspector = components.seeded(lambda: Inspector(InspectorConfig()), source.seed)
    return Prepared(
        InspectorObjective(inspector),
        source.images("pixels", labels=True),
        lambda: save_parts(source.models / "inspector", inspector),
    )


def _vae(source: Source) -> Prepared:
    vae = components.make_vae(source.seed)
    columns = source.images("pixels", "boxes")

    def save() -> None:
        vae.register_to_config(scaling_factor=round(1 / latent_std(vae, columns["pixels"]), 4))
        save_parts(source.models / "vae", vae)

    return Prepared(VaeObjective(vae), columns, save)


@torch.no_grad()
def latent_std(vae: AutoencoderKL, pixels: Tensor, num_images: int = 1024) -> float:
    """Standard deviation of the latents: its inverse is the latent scale."""
    some = torch.split(pixels[:num_images].to(vae.device), 64)
    means = [vae.encode(batch.float() / 127.5 - 1).latent_dist.mean for batch in some]
    return float(torch.cat(means).std())


def _text(source: Source) -> Prepared:
    tokenizer = components.make_text_tokenizer()
    tower = components.make_text_encoder(tokenizer, source.seed)
    width = components.TEXT_WIDTH
    body = components.seeded(lambda: Inspector(InspectorConfig()), source.seed + 1)
    images = components.seeded(lambda: ImageTower(body, width), source.seed + 2)
    reader = components.seeded(lambda: TextReader(width), source.seed + 3)
    write = partial(write_mixed, shares=TextTowerObjective.shares)
    texts = source.texts(tokenizer, write, 4, components.TEXT_POSITIONS)

    def save() -> None:
        save_parts(source.models / "text", tower)
        save_parts(source.models / "tokenizer", tokenizer)

    return Prepared(
        TextTowerObjective(tower, images, reader),
        source.images("pixels", labels=True) | {"texts": padded_tokens(texts, tokenizer)},
        save,
        ["texts"],
    )


def _unet(source: Source) -> Prepared:
    models = source.models
    tower = CLIPTextModel.from_pretrained(_need(models, "text"))
    tokenizer = CLIPTokenizer.from_pretrained(_need(models, "tokenizer"))
    vae = AutoencoderKL.from_pretrained(_need(models, "vae"))
    unet = components.make_unet(source.seed)
    scheduler = components.make_scheduler()
    decoder = DiffusionDecoder(tower, tokenizer, unet, vae, scheduler)
    columns = source.images("pixels", "boxes")
    mean, std = _latents(decoder.to(source.device), columns.pop("pixels"))
    write = partial(write_mixed, shares=TeacherObjective.shares)
    texts = source.texts(tokenizer, write, 8, components.TEXT_POSITIONS)

    def save() -> None:
        save_parts(models / "unet", unet)
        save_parts(models / "text_encoder", tower)
        save_parts(models / "scheduler", scheduler)

    columns |= {"latents_mean": mean, "latents_std": std, "texts": padded_tokens(texts, tokenizer)}
    return Prepared(TeacherObjective(decoder), columns, save, ["texts"])


def padded_tokens(ids: Tensor, tokenizer: CLIPTokenizer) -> Tensor:
    """Token ids (N, V, L) with as many positions as the tower has, which is how it is used."""
    missing = tokenizer.model_max_length - ids.shape[-1]
    return F.pad(ids, (0, missing), value=tokenizer.pad_token_id)


def _latents(decoder: DiffusionDecoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posteriors of images (N, 3, S, S), half precision."""
    parts = [
        decoder.posterior(batch.to(decoder.text_encoder.device))
        for batch in torch.split(pixels, 512)
    ]
    return torch.cat([p.mean.half() for p in parts]), torch.cat([p.std.half() for p in parts])


def _vision(source: Source) -> Prepared:
    tokenizer = components.make_florence_tokenizer()
    florence = components.make_florence(tokenizer, source.seed)
    reader = components.seeded(lambda: VisionReader(florence, _normalisation()), source.seed + 1)
    return Prepared(
        InspectorObjective(reader),
        source.images("pixels", labels=True),
        lambda: save_parts(source.models / "florence_vision", florence),
    )


def _florence(source: Source) -> Prepared:
    models = source.models
    tokenizer = components.make_florence_tokenizer()
    florence = components.make_florence(tokenizer, source.seed)
    sighted = Florence2ForConditionalGeneration.from_pretrained(_need(models, "florence_vision"))
    for part in ("vision_tower", "multi_modal_projector"):
        getattr(florence.model, part).load_state_dict(getattr(sighted.model, part).state_dict())
    columns = source.images("pixels")
    text_config: Any = florence.config.text_config
    several: dict[components.Task, int] = {"short": 2, "tags": 1, "detailed": 4}
    for task, variants in several.items():
        shares: dict[Form, float] = {task: 1.0}
        write = partial(write_mixed, shares=shares)
        columns[task] = source.texts(
            tokenizer, write, variants, text_config.max_position_embeddings
        )

    def save() -> None:
        save_parts(models / "florence", florence, tokenizer, components.make_image_processor())

    return Prepared(
        FlorenceObjective(florence, tokenizer, _normalisation()), columns, save, components.TASKS
    )


def _normalisation() -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3, 1, 1) that Florence-2's inputs are normalised with."""
    mean, std = VLVEncoderConfig.image_mean, VLVEncoderConfig.image_std
    return torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]


def _llm(source: Source, size: components.LlmSize = "medium") -> Prepared:
    tokenizer = components.make_llm_tokenizer()
    llm = components.make_llm(tokenizer, source.seed, size)
    folder = source.models / ("llm" if size == "medium" else f"llm-{size}")
    texts = source.texts(tokenizer, write_at_length, 4, MOST_TOKENS, str(tokenizer.eos_token))

    return Prepared(
        LlmObjective(llm), {"texts": texts}, lambda: save_parts(folder, llm, tokenizer), ["texts"]
    )


_PREPARE: dict[Part, Callable[[Source], Prepared]] = {
    "inspector": _inspector,
    "vae": _vae,
    "text": _text,
    "unet": _unet,
    "vision": _vision,
    "florence": _florence,
    "llm": _llm,
}


def save_parts(folder: Path, *parts: Any) -> None:
    """Save what lies in one folder: all of it, or nothing."""
    with replacing_folder(folder) as temporary:
        for part in parts:
            part.save_pretrained(temporary)


def _need(models: Path, name: str) -> Path:
    if not (models / name).is_dir():
        raise ModelFolderError(
            f"{models} has no {name}; train the parts in the order {', '.join(PARTS)}"
        )
    return models / name
