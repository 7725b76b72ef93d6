"""``vlv data cache-latents`` and ``cache-features``: what frozen parts make of a data set, computed once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlv.cli import common

if TYPE_CHECKING:
    from vlv.data.quarantine import BadRecord

Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Folder of the cache, for data.latents or data.features; a hidden one beside each shard by default.",
    ),
]
Config = Annotated[str, typer.Option("--config", "-c", help="Preset or YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting: data.image_size=384 (repeatable)."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images of one pass.")]


def cache_latents(
    inputs: common.Inputs,
    config: Config,
    output: Output = None,
    overrides: Overrides = None,
    batch_size: BatchSize = 64,
) -> int:
    """Compute the VAE's posteriors (mean and deviation, float16) of images, for data.latents.

    A repeated command goes on where it was, or with the shard that it was at. About 37 GB per million images of 384 pixels.
    """
    return _fill("latents", inputs, config, output, overrides, batch_size)


def cache_features(
    inputs: common.Inputs,
    config: Config,
    output: Output = None,
    overrides: Overrides = None,
    batch_size: BatchSize = 16,
) -> int:
    """Compute the frozen vision tower's tokens (float16) of images, for data.features.

    For small sets: Florence-2-large at 768 pixels gives 1182 GB per million images, at 384 pixels 297 GB.
    """
    return _fill("features", inputs, config, output, overrides, batch_size)


def _fill(
    kind: str,
    inputs: list[str],
    config: str,
    output: Path | None,
    overrides: list[str] | None,
    batch_size: int,
) -> int:
    import torch

    from vlv.config import load_config
    from vlv.data.loader import Streamed
    from vlv.training.assemble import framing_of, load_decoder, load_encoder
    from vlv.training.cache_parts import BESIDE
    from vlv.training.caches import features_cache, fill_cache, fill_shards, latents_cache
    from vlv.training.feeding import find_data, one_pass_settings

    settings = load_config(config, overrides or [])
    found = find_data(settings.data.model_copy(update={"inputs": inputs}))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = load_decoder(settings.model.decoder, draws=False, encodes=kind == "latents")
    if kind == "latents":
        cache = latents_cache(decoder.to(device))
    else:
        encoder: Any = load_encoder(settings, decoder)
        cache = features_cache(encoder.to(device).eval())
    failed: list[Any] = []

    def report(bad: BadRecord) -> None:
        failed.append(bad)
        common.say(f"failed: {bad.reason}")

    where = BESIDE if output is None else output
    once = one_pass_settings(settings, framing_of(settings), batch_size=batch_size)
    if isinstance(found, Streamed):
        count = fill_shards(cache, found.shards, where, once, on_bad=report)
    else:
        fill_cache(cache, found.records, where, once, on_bad=report)
        count = len(found.records)
    place = "beside the shards" if output is None else output
    common.say(f"{kind} of {count - len(failed)} images, {len(failed)} failed -> {place}")
    return 2 if failed else 0
