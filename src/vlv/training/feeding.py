"""What the loop is fed with: batches of the data that the settings name, and what is computed beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlv.data.framing import DEFAULT_FRAMING, Framing
from vlv.data.loader import Listed, Loader, LoaderData, LoaderSettings, Streamed
from vlv.data.records import Columns, Record, find_records
from vlv.data.streams import Shard, list_shards, must_stream
from vlv.errors import ConfigError
from vlv.models.encoder import VLVEncoder
from vlv.training.latents import Cache, features_cache, fill_cache, latents_cache
from vlv.training.own_captions import cached_ids, own_captions
from vlv.training.shard_caches import ShardRows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from vlv.config import DataConfig, RunConfig
    from vlv.data.quarantine import BadRecord
    from vlv.models.diffusion import DiffusionDecoder
    from vlv.models.vision_encoder import VisionEncoder


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on: records that are listed, or shards that are read one after the other."""

    records: list[Record]
    shards: list[Shard] = field(default_factory=list)


def find_data(data: DataConfig) -> TrainingData:
    """List the records of a run, or only its shards where they are streamed.

    Raises:
        DataError: An input is missing, damaged, or of a type that vlv does not read.
    """
    columns = columns_of(data)
    if must_stream(data.inputs) if data.streaming == "auto" else data.streaming:
        return TrainingData([], list_shards(data.inputs, columns))
    return TrainingData(find_records(data.inputs, columns=columns))


def columns_of(data: DataConfig) -> Columns:
    """What the image, its caption and its hash are called."""
    return Columns(data.image_column, data.caption_column, data.hash_column)


def make_loader(
    config: RunConfig,
    encoder: VLVEncoder | VisionEncoder,
    decoder: DiffusionDecoder,
    found: TrainingData,
    run_dir: Path,
    load_tokenizer: Callable[[], Any],
    *,
    framing: Framing = DEFAULT_FRAMING,
    rank: int = 0,
    num_ranks: int = 1,
    device: str = "cpu",
) -> Loader:
    """Endless batches, with cached latents and the encoder's own captions where the settings ask for them.

    Args:
        config: The run.
        encoder: The encoder that trains.
        decoder: The diffusion decoder, whose VAE makes latents.
        found: What to train on.
        run_dir: Folder of the run, for the quarantine and the captions.
        load_tokenizer: Florence-2's tokenizer, called where own captions are wanted.
        framing: How images become squares.
        rank: Number of this process.
        num_ranks: Processes that train together.
        device: On which the batches are used; for a GPU they are put into page-locked memory.

    Raises:
        ConfigError: A setting needs records that are listed, but they are streamed.
        CacheError: What was computed before is missing (of a stream), or that of other images, another model or crop.
    """
    data = config.data
    what: LoaderData
    if found.shards:
        _check_streamed(config)
        rows_of = _rows_of_shards(config, encoder, decoder, found.shards, framing)
        what = Streamed(found.shards, data.shuffle_buffer, data.partitions, rows_of)
    else:
        arrays = _computed_before(
            config, encoder, decoder, found.records, run_dir, load_tokenizer, framing
        )
        what = Listed(found.records, arrays)
    return Loader(
        what,
        loader_settings(config, framing, pin_memory=device.startswith("cuda")),
        rank=rank,
        num_ranks=num_ranks,
        quarantine=quarantine_file(run_dir, rank),
    )


def _needs_pixels(config: RunConfig) -> bool:
    """Whether a step looks at the images: the encoder without cached features, the VAE without cached latents."""
    denoises = config.stage2 is None or config.stage2.denoising_weight > 0
    return config.data.features is None or (denoises and config.data.latents is None)


def loader_settings(config: RunConfig, framing: Framing, *, pin_memory: bool) -> LoaderSettings:
    """The settings of a run's loader."""
    data = config.data
    return LoaderSettings(
        batch_size=config.loop.batch_size,
        image_size=data.image_size if _needs_pixels(config) else None,
        seed=config.loop.seed,
        framing=framing,
        need_captions=config.stage == "stage2",
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        pin_memory=pin_memory,
        timeout_seconds=data.read_timeout_seconds,
        max_bad_share=data.max_bad_share,
    )


def _check_streamed(config: RunConfig) -> None:
    if config.stage1 is not None and config.stage1.warm_start_steps:
        raise ConfigError(
            "stage1.warm_start_steps captions every image before training, which a stream does not allow; "
            "set it to 0, or data.streaming to false"
        )


def _computed_before(
    config: RunConfig,
    encoder: VLVEncoder | VisionEncoder,
    decoder: DiffusionDecoder,
    records: list[Record],
    run_dir: Path,
    load_tokenizer: Callable[[], Any],
    framing: Framing,
) -> dict[str, Any]:
    """Arrays whose row i belongs to record i."""
    data = config.data
    extra: dict[str, Any] = {}
    for cache, where in _caches(data, encoder, decoder):
        extra |= fill_cache(
            cache,
            records,
            data.image_size,
            where,
            framing=framing,
            num_workers=data.num_workers,
            on_bad=_leave_to_the_loader,
        )
    if config.stage1 is not None and config.stage1.warm_start_steps:
        extra["own_ids"] = own_ids(
            config, encoder, decoder, records, run_dir / "own_ids.npy", load_tokenizer, framing
        )
    return extra


def _rows_of_shards(
    config: RunConfig,
    encoder: VLVEncoder | VisionEncoder,
    decoder: DiffusionDecoder,
    shards: Sequence[Shard],
    framing: Framing,
) -> ShardRows | None:
    caches = _caches(config.data, encoder, decoder)
    return ShardRows(caches, shards, config.data.image_size, framing) if caches else None


def _caches(
    data: DataConfig, encoder: VLVEncoder | VisionEncoder, decoder: DiffusionDecoder
) -> list[tuple[Cache, str]]:
    """What the settings name as computed before, and where it lies."""
    caches = []
    if data.latents is not None:
        caches.append((latents_cache(decoder), data.latents))
    if data.features is not None:
        caches.append((features_cache(encoder), data.features))
    return caches


def quarantine_file(run_dir: Path, rank: int) -> Path:
    """Where a process names its bad records: each has a file of its own, so that no line is torn."""
    return run_dir / (f"quarantine-{rank}.jsonl" if rank else "quarantine.jsonl")


def own_ids(
    config: RunConfig,
    encoder: VLVEncoder | VisionEncoder,
    decoder: DiffusionDecoder,
    records: Sequence[Record],
    cache: Path,
    load_tokenizer: Callable[[], Any],
    framing: Framing = DEFAULT_FRAMING,
) -> NDArray[np.int64]:
    """The encoder's own captions as ids of the text tower, (N, L), for the warm start."""
    assert isinstance(encoder, VLVEncoder), "made of Florence-2"

    def make() -> list[str]:
        return own_captions(
            encoder,
            load_tokenizer(),
            records,
            image_size=config.data.image_size,
            framing=framing,
            on_bad=_leave_to_the_loader,
        )

    return cached_ids(cache, len(records), make, decoder.tokenizer, encoder.num_queries)


def _leave_to_the_loader(bad: BadRecord) -> None:
    """The loader meets the same bad record, counts it and names it."""
