"""The frozen diffusion decoder of this world: `python -m examples.pictograms.decoder PART --data SHARDS --parts OUT`.

    vae    latents                                         learns on from vlv-tiny's
    unet   U-Net and text tower, which learn together      both learn on from vlv-tiny's, with a tokenizer of this world

The objectives and the loop are those of `vlv toyworld pretrain`; the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from examples.pictograms.drawing import colour_grids
from examples.pictograms.words import say_any
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from vlv.data.loader import LoaderSettings, epoch_batches
from vlv.data.records import Record
from vlv.data.source import find_records
from vlv.errors import DataError, VLVError
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.folder import find_folder
from vlv.progress import say
from vlv.toyworld import components
from vlv.toyworld.objectives import TeacherObjective, VaeObjective
from vlv.toyworld.pretrain import Recipe, latent_std, padded_tokens, save_parts
from vlv.toyworld.table import TableLoader, token_column
from vlv.training.caches import fill_cache, latents_cache
from vlv.training.interrupt import Interrupted
from vlv.training.loop import fit

START = "vlv-tiny"
VOCABULARY = 2600
"""Tokens of the text tower: the 45 colour words and the more frequent words of labels and tags are whole."""
LATENTS = "latents"
"""Folder beside the parts with the cache of `vlv data cache-latents`."""
POSITIONS = 24
"""Tokens of a text: the colours of 16 cells and a name; the length of z, on which the time of both stages depends."""
VARIANTS = 4
"""Texts of each picture."""

RECIPES = {
    "vae": Recipe(steps=700, batch_size=16, lr=1.5e-3, ema=0.99, precision="bf16"),
    "unet": Recipe(steps=1200, batch_size=32, lr=1e-3, ema=0.995, precision="bf16"),
}
"""Budgets for one core, about 10 and 25 minutes where nobody shares it; more steps make a better decoder."""


def texts_of(records: Sequence[Record], pixels: Tensor, variants: int, seed: int) -> list[str]:
    """V texts of every picture, one after the other, that depend on the seed and the picture alone.

    Raises:
        DataError: A record does not say what its picture shows.
    """
    texts = []
    for record, grid in zip(records, colour_grids(pixels.numpy()), strict=True):
        about = record.meta or {}
        if "form" not in about:
            raise DataError(
                f"{record.id} has no words; render it with `python -m examples.pictograms.render`"
            )
        rng = np.random.default_rng([seed, *record.id.encode()])
        texts += [say_any(about, grid, rng) for _ in range(variants)]
    return texts


def pixels_of(records: Sequence[Record]) -> Tensor:
    """The pictures, uint8 (N, 3, S, S)."""
    settings = LoaderSettings(batch_size=512, image_size=components.IMAGE_SIZE, num_workers=1)
    return torch.cat([batch["pixels"] for batch in epoch_batches(list(records), settings)])


def train_vae(
    records: Sequence[Record], start: Path, parts: Path, run: Path, recipe: Recipe, seed: int
) -> None:
    """The VAE, from another one; its latent scale is measured at the end."""
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(start / "vae")
    vae = vae.float()
    pixels = pixels_of(records)
    columns = {"pixels": pixels, "boxes": _no_boxes(len(pixels))}
    _fit(VaeObjective(vae), columns, run, recipe, seed, "vae")
    vae.register_to_config(scaling_factor=round(1 / latent_std(vae, pixels), 4))
    save_parts(parts / "vae", vae)


def train_unet(
    records: Sequence[Record], start: Path, parts: Path, run: Path, recipe: Recipe, seed: int
) -> None:
    """U-Net and text tower, told in words what is in the picture."""
    pixels = pixels_of(records)
    texts = texts_of(records, pixels, VARIANTS, seed)
    tokenizer = components.make_text_tokenizer(texts, VOCABULARY, POSITIONS)
    tower = _tower(tokenizer, start, seed)
    unet: UNet2DConditionModel = UNet2DConditionModel.from_pretrained(start / "unet")
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(parts / "vae")
    scheduler = components.make_scheduler()
    decoder = DiffusionDecoder(tower, tokenizer, unet.float(), vae, scheduler)
    mean, std = _latents(decoder, records, parts.parent / LATENTS)
    ids = token_column(tokenizer, texts, VARIANTS, max_length=POSITIONS)
    columns = {
        "latents_mean": mean,
        "latents_std": std,
        "texts": padded_tokens(ids, tokenizer),
        "boxes": _no_boxes(len(mean)),
    }
    _fit(TeacherObjective(decoder), columns, run, recipe, seed, "unet", ["texts"])
    save_parts(parts / "unet", unet)
    save_parts(parts / "text_encoder", tower)
    save_parts(parts / "tokenizer", tokenizer)
    save_parts(parts / "scheduler", scheduler)


def _latents(
    decoder: DiffusionDecoder, records: Sequence[Record], folder: Path
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posteriors, from the cache that both stages read as well."""
    settings = LoaderSettings(batch_size=64, image_size=components.IMAGE_SIZE, num_workers=1)
    rows = fill_cache(latents_cache(decoder), records, folder, settings)
    mean, std = (
        torch.from_numpy(np.stack([rows[name][i] for i in range(len(records))]))
        for name in ("latents_mean", "latents_std")
    )
    return mean, std


def _tower(tokenizer: CLIPTokenizer, start: Path, seed: int) -> CLIPTextModel:
    """Another text tower with fresh embeddings for this vocabulary."""
    tower = components.make_text_encoder(tokenizer, seed)
    old = CLIPTextModel.from_pretrained(start / "text_encoder").float()
    state = {k: v for k, v in old.state_dict().items() if "token_embedding" not in k}
    for name, value in tower.state_dict().items():
        if "position_embedding" in name:  # ours is shorter
            state[name] = state[name][: len(value)]
    tower.load_state_dict(state, strict=False)
    table = tower.get_input_embeddings().weight
    with torch.no_grad():  # the rest was trained on embeddings of this size
        table.mul_(old.get_input_embeddings().weight.std() / table.std())
    return tower


def _no_boxes(count: int) -> Tensor:
    """The whole picture counts alike."""
    return torch.zeros(count, 1, 4, dtype=torch.int16)


def _fit(
    objective: VaeObjective | TeacherObjective,
    columns: dict[str, Tensor],
    run: Path,
    recipe: Recipe,
    seed: int,
    part: str,
    texts: Sequence[str] = (),
) -> None:
    loop, optim = recipe.settings(seed)
    device = torch.device("cpu")
    loader = TableLoader(columns, loop.batch_size, seed=seed, device=device, texts=texts)
    fit(objective, loader, loop, optim, run, settings={"part": part})


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=sorted(RECIPES))
    parser.add_argument(
        "--data", required=True, help="shards of `python -m examples.pictograms.render`"
    )
    parser.add_argument("--parts", type=Path, required=True, help="folder of the decoder's parts")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--start", default=START, help="model whose parts learn on; vlv-tiny")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--batch-size", type=int, help="instead of the recipe's")
    parser.add_argument("--lr", type=float, help="instead of the recipe's")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    names = ("steps", "batch_size", "lr", "precision")
    changes = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    recipe = Recipe(**{**_fields(RECIPES[given.part]), **changes})
    train = {"vae": train_vae, "unet": train_unet}[given.part]
    try:
        records, start = find_records([given.data]), find_folder(given.start)
        train(records, start, given.parts, given.run_dir, recipe, given.seed)
    except (VLVError, Interrupted) as error:
        say(f"decoder: {error}")
        return 1
    say(f"{given.part}: {recipe.steps} steps done; the weights are in {given.parts}")
    return 0


def _fields(recipe: Recipe) -> dict[str, object]:
    return {name: getattr(recipe, name) for name in Recipe.__dataclass_fields__}


if __name__ == "__main__":
    sys.exit(main())
