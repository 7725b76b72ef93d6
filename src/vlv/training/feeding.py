"""The batches that a run trains on, with what is computed before training begins."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vlv.data.loader import Listed, Loader, LoaderSettings, Rows, Streamed
from vlv.data.records import Columns
from vlv.data.source import Source
from vlv.errors import ConfigError
from vlv.models.arguments import present
from vlv.models.encoder import VLVEncoder
from vlv.training.caches import Cache, ShardRows, features_cache, fill_cache, latents_cache
from vlv.training.own_captions import own_caption_ids
from vlv.training.texts import text_mix

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from vlv.config import DataConfig, RunConfig
    from vlv.data.framing import Framing
    from vlv.data.records import BadRecord
    from vlv.training.assemble import Parts
    from vlv.training.distributed import World


def find_data(data: DataConfig) -> Listed | Streamed:
    """List the records of a run, or only its shards where they are streamed.

    Raises:
        DataError: An input is missing, damaged, or of a type that vlv does not read.
    """
    source = Source(data.inputs, columns_of(data))
    if source.must_stream() if data.streaming == "auto" else data.streaming:
        return Streamed(source.shards(), data.shuffle_buffer, data.partitions)
    return Listed(source.records())


def columns_of(data: DataConfig) -> Columns:
    """What the image, its caption and its hash are called."""
    return Columns(data.image_column, data.caption_column, data.hash_column, data.image_root)


def make_loader(
    config: RunConfig,
    parts: Parts,
    found: Listed | Streamed,
    run_dir: Path,
    world: World,
    framing: Framing,
    load_tokenizer: Callable[[], PreTrainedTokenizerBase],
) -> Loader:
    """Endless batches, with cached latents and the encoder's own captions where the settings ask for them.

    Args:
        config: The run.
        parts: The encoder that trains, and the diffusion decoder, whose VAE makes latents.
        found: What to train on.
        run_dir: Folder of the run, for the quarantine and the captions.
        world: The processes that train together.
        framing: How images become squares.
        load_tokenizer: Florence-2's tokenizer, called where own captions are wanted.

    Raises:
        ConfigError: A setting needs records that are listed, but they are streamed.
        CacheError: A cache is missing (of a stream), or that of other images, another model or framing.
    """
    caches = _caches(config.data, parts)
    once = one_pass_settings(config, framing)
    data: Listed | Streamed
    if isinstance(found, Streamed):
        _check_streamed(config)
        rows_of = ShardRows(caches, found.shards, once) if caches else None
        data = replace(found, rows_of=rows_of)
    else:
        arrays: dict[str, Rows] = {}
        for cache, where in caches:
            arrays |= fill_cache(cache, found.records, where, once, on_bad=_leave_to_the_loader)
        if config.stage1 is not None and config.stage1.warm_start_steps:
            assert isinstance(parts.encoder, VLVEncoder), "made of Florence-2"
            arrays["own_ids"] = own_caption_ids(
                parts.encoder,
                load_tokenizer,
                present(parts.decoder.tokenizer, "tokenizer"),
                found.records,
                replace(once, batch_size=32),
                run_dir / "own_captions.jsonl",
                on_bad=_leave_to_the_loader,
            )
        data = replace(found, arrays=arrays)
    return Loader(
        data,
        _loader_settings(config, framing, pin_memory=world.device.type == "cuda"),
        rank=world.rank,
        num_ranks=world.num_ranks,
        quarantine=quarantine_file(run_dir, world.rank),
    )


def one_pass_settings(
    config: RunConfig, framing: Framing, *, batch_size: int = 64
) -> LoaderSettings:
    """For a pass over all images before training, as a cache needs it."""
    return LoaderSettings(
        batch_size=batch_size,
        image_size=config.data.image_size,
        framing=framing,
        num_workers=config.data.num_workers,
        timeout_seconds=config.data.read_timeout_seconds,
    )


def _loader_settings(config: RunConfig, framing: Framing, *, pin_memory: bool) -> LoaderSettings:
    data = config.data
    return LoaderSettings(
        batch_size=config.loop.batch_size,
        image_size=data.image_size if _needs_pixels(config) else None,
        seed=config.loop.seed,
        framing=framing,
        texts=None if config.stage2 is None else text_mix(config.stage2),
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        pin_memory=pin_memory,
        timeout_seconds=data.read_timeout_seconds,
        max_bad_share=data.max_bad_share,
    )


def _needs_pixels(config: RunConfig) -> bool:
    """Whether a step looks at the images: the encoder without cached features, the VAE without cached latents."""
    denoises = config.stage2 is None or config.stage2.denoising_weight > 0  # or judges by it
    return config.data.features is None or (denoises and config.data.latents is None)


def _check_streamed(config: RunConfig) -> None:
    if config.stage1 is not None and config.stage1.warm_start_steps:
        raise ConfigError(
            "stage1.warm_start_steps captions every image before training, which a stream does not allow; "
            "set it to 0, or data.streaming to false"
        )


def _caches(data: DataConfig, parts: Parts) -> list[tuple[Cache, str]]:
    """The caches that the settings name, and where they lie."""
    caches = []
    if data.latents is not None:
        caches.append((latents_cache(parts.decoder), data.latents))
    if data.features is not None:
        caches.append((features_cache(parts.encoder), data.features))
    return caches


def quarantine_file(run_dir: Path, rank: int) -> Path:
    """Where a process names its bad records: each has a file of its own, so that no line is torn."""
    return run_dir / (f"quarantine-{rank}.jsonl" if rank else "quarantine.jsonl")


def _leave_to_the_loader(bad: BadRecord) -> None:
    """The loader meets the same bad record, counts it and names it."""
