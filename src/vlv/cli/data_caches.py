"""``vlv data cache-latents`` and ``cache-features``: what frozen parts make of a data set, computed once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlv.cli import common

if TYPE_CHECKING:
    from vlv.data.quarantine import BadRecord

Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="Folder of the cache, for data.latents or data.features."),
]
Config = Annotated[str, typer.Option("--config", "-c", help="Preset or YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting: data.image_size=384 (repeatable)."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images of one pass.")]


def cache_latents(
    inputs: common.Inputs,
    output: Output,
    config: Config,
    overrides: Overrides = None,
    batch_size: BatchSize = 64,
) -> int:
    """Compute the VAE's posteriors (mean and deviation, float16) of images, for data.latents.

    A repeated command goes on with the shard that it was at. About 37 GB per million images of 384 pixels.
    """
    return _fill("latents", inputs, output, config, overrides, batch_size)


def cache_features(
    inputs: common.Inputs,
    output: Output,
    config: Config,
    overrides: Overrides = None,
    batch_size: BatchSize = 16,
) -> int:
    """Compute the frozen vision tower's tokens (float16) of images, for data.features.

    For small sets: Florence-2-large at 768 pixels gives 1182 GB per million images, at 384 pixels 297 GB.
    """
    return _fill("features", inputs, output, config, overrides, batch_size)


def _fill(
    kind: str,
    inputs: list[str],
    output: Path,
    config: str,
    overrides: list[str] | None,
    batch_size: int,
) -> int:
    import torch

    from vlv.config import load_config
    from vlv.data.records import find_records
    from vlv.training.assemble import framing_of, load_decoder, load_encoder
    from vlv.training.feeding import columns_of
    from vlv.training.latents import features_cache, fill_cache, latents_cache

    settings = load_config(config, overrides or [])
    records = find_records(inputs, columns=columns_of(settings.data))
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

    fill_cache(
        cache,
        records,
        settings.data.image_size,
        output,
        framing=framing_of(settings),
        batch_size=batch_size,
        num_workers=settings.data.num_workers,
        on_bad=report,
    )
    common.say(f"{kind} of {len(records) - len(failed)} images, {len(failed)} failed -> {output}")
    return 2 if failed else 0
