"""``vlv data cache-latents`` and ``cache-features``: what frozen parts make of a data set, computed once."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlv.cli import common
from vlv.cli.options import options, takes_options

if TYPE_CHECKING:
    from vlv.data.records import BadRecord


@options
class CacheOptions:
    """Options of both commands."""

    inputs: common.Inputs
    config: Annotated[str, typer.Option("--config", "-c", help="Preset or YAML file of the run.")]
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder of the cache, for data.latents or data.features; a hidden one beside each shard by default.",
        ),
    ] = None
    overrides: Annotated[
        list[str], typer.Option("--set", help="Change a setting: data.image_size=384 (repeatable).")
    ] = field(default_factory=list)


@options
class LatentsOptions:
    """Options of ``vlv data cache-latents``."""

    cache: CacheOptions
    batch_size: common.BatchSize = 64


@options
class FeaturesOptions:
    """Options of ``vlv data cache-features``."""

    cache: CacheOptions
    batch_size: common.BatchSize = 16


@takes_options
def cache_latents(given: LatentsOptions) -> int:
    """Compute the VAE's posteriors (mean and deviation, float16) of images, for data.latents.

    A repeated command goes on where it was. About 37 GB per million images of 384 pixels.
    """
    return _fill("latents", given.cache, given.batch_size)


@takes_options
def cache_features(given: FeaturesOptions) -> int:
    """Compute the frozen vision tower's tokens (float16) of images, for data.features.

    For small sets: Florence-2-large at 768 pixels gives 1182 GB per million images, at 384 pixels 297 GB.
    """
    return _fill("features", given.cache, given.batch_size)


def _fill(kind: Literal["latents", "features"], given: CacheOptions, batch_size: int) -> int:
    import torch

    from vlv.config import load_config
    from vlv.data.loader import Streamed
    from vlv.training.assemble import load_encoder
    from vlv.training.cache_parts import BESIDE
    from vlv.training.caches import features_cache, fill_cache, fill_shards, latents_cache
    from vlv.training.feeding import find_data, one_pass_settings
    from vlv.training.parts import framing_of, load_decoder

    config = load_config(given.config, given.overrides)
    found = find_data(config.data.model_copy(update={"inputs": given.inputs}))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = load_decoder(config.model.decoder, draws=False, encodes=kind == "latents")
    if kind == "latents":
        cache = latents_cache(decoder.to(device))
    else:
        encoder: Any = load_encoder(config, decoder)
        cache = features_cache(encoder.to(device).eval())
    failed: list[BadRecord] = []

    def report(bad: BadRecord) -> None:
        failed.append(bad)
        common.say(f"failed: {bad.reason}")

    where = BESIDE if given.output is None else given.output
    settings = one_pass_settings(config, framing_of(config), batch_size=batch_size)
    if isinstance(found, Streamed):
        count = fill_shards(cache, found.shards, where, settings, on_bad=report)
    else:
        fill_cache(cache, found.records, where, settings, on_bad=report)
        count = len(found.records)
    place = "beside the shards" if given.output is None else given.output
    common.say(f"{kind} of {count - len(failed)} images, {len(failed)} failed -> {place}")
    return 2 if failed else 0
