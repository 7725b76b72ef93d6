"""Caches of what frozen parts make of images, computed once instead of in every epoch.

There are two: the VAE's posteriors (latents), and the tokens of a frozen vision tower (features). A cache has a part for
every shard, and one for all single images (see `vlv.training.cache_parts`).

Listed records find their rows by place: when a run begins, the files must be those of which the cache was made. Streamed
records find them by the SHA-256 of their image, which is in memory anyhow: when a run begins, weights, image size, framing
and the size of each shard are compared, and later an image that the cache does not have ends the run. So a row is always
that of the very image, whatever its id, its place in the shard, or where the shard lies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlv.data.loader import LoaderSettings, OnBad, Rows, finite_row
from vlv.data.parts import Part
from vlv.data.records import Absent, Held, Record
from vlv.data.source import find_records
from vlv.errors import CacheError
from vlv.models.arguments import present
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.encoder import VLVEncoder
from vlv.models.hashing import weights_hash
from vlv.models.vision_encoder import VisionEncoder
from vlv.progress import Progress
from vlv.training.cache_parts import (
    BESIDE,
    FORMAT,
    check_part,
    fill_part,
    image_hash,
    open_part,
    part_folders,
    parts_of,
    read_manifest,
)

LATENTS = ("latents_mean", "latents_std")
FEATURES = ("features",)
_OPEN_PARTS = 64  # a few for each partition; each holds some files and 100 bytes per record


@dataclass(frozen=True)
class Cache:
    """What is computed of every image once.

    Attributes:
        kind: As the setting and the command are called: data.latents, vlv data cache-latents.
        names: Of the arrays.
        compute: Pixels (B, 3, S, S) to as many tensors (B, ...).
        identity: What the arrays depend on beside the images: hashes of weights, sizes.
    """

    kind: Literal["latents", "features"]
    names: tuple[str, ...]
    compute: Callable[[Tensor], tuple[Tensor, ...]]
    identity: Mapping[str, object]

    def made_with(self, settings: LoaderSettings) -> dict[str, object]:
        """What the arrays depend on beside the images, as the manifest states it."""
        size, framing = settings.image_size, settings.framing
        return {"format": FORMAT, **self.identity, "image_size": size, "framing": framing}


def latents_cache(decoder: DiffusionDecoder) -> Cache:
    """The VAE's posteriors, unscaled: mean and standard deviation, (B, k, h, w) each."""

    def compute(pixels: Tensor) -> tuple[Tensor, ...]:
        mean, std = decoder.posterior(pixels)
        return mean, std

    return Cache("latents", LATENTS, compute, {"vae_encoder": _hash(_vae_encoder(decoder))})


def features_cache(encoder: VLVEncoder | VisionEncoder) -> Cache:
    """The tokens of the frozen vision tower, (B, N, d)."""

    @torch.no_grad()
    def compute(pixels: Tensor) -> tuple[Tensor, ...]:
        return (encoder.image_features(pixels.to(encoder.device)),)

    config = encoder.config
    identity = {
        "vision_tower": _hash(nn.ModuleList(encoder.vision())),
        "input_size": config.image_size,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }
    return Cache("features", FEATURES, compute, identity)


def _hash(module: nn.Module) -> str:
    """Of the weights in bfloat16, in which a run may hold what is frozen."""
    return weights_hash(module, torch.bfloat16)


def _vae_encoder(decoder: DiffusionDecoder) -> nn.Module:
    """The half of the VAE that latents depend on: its decoder may be trained further."""
    vae = present(decoder.vae, "vae")
    halves = {"encoder": vae.encoder, "quant_conv": vae.quant_conv}
    return nn.ModuleDict({name: module for name, module in halves.items() if module is not None})


# Records that are listed -------------------------------------------------------------------------


def fill_cache(
    cache: Cache,
    records: Sequence[Record],
    where: str | Path,
    settings: LoaderSettings,
    *,
    on_bad: OnBad | None = None,
) -> dict[str, Rows]:
    """Compute a cache of a data set part by part, or open what was computed before.

    An interrupted computation goes on where it was, or loses a minute.

    Args:
        cache: What to compute.
        records: N records.
        where: Folder of the cache, created; or `BESIDE`.
        settings: Image size and framing, and the size of the batches.
        on_bad: Told of each record that cannot be read; its row is NaN, which the loader skips and counts.

    Returns:
        Arrays for `Listed`, float16 (N, ...), which lie on the disk: row i belongs to record i.

    Raises:
        DataError: The folder holds what another model, data set, image size or framing gave; two shards have the same
            name; or a record cannot be read and `on_bad` is not given.
    """
    parts = parts_of(records)
    folders = part_folders(where, cache.kind, parts)
    if list(parts) == [None]:
        folders = {None: Path(where)}
    arrays, rows = [], np.zeros((len(records), 2), np.int64)
    for number, (file, places) in enumerate(parts.items()):
        mine = [records[place] for place in places]
        arrays.append(fill_part(cache, mine, folders[file], settings, on_bad))
        rows[places, 0], rows[places, 1] = number, np.arange(len(places))
    if len(arrays) == 1:
        return dict(arrays[0])
    return {name: JoinedRows([part[name] for part in arrays], rows) for name in cache.names}


class JoinedRows:
    """Arrays of several parts as one; a row is read when it is asked for.

    Args:
        arrays: Of the parts.
        rows: Part, and row in it, of every record, (N, 2).
    """

    def __init__(self, arrays: Sequence[NDArray[np.float16]], rows: NDArray[np.int64]) -> None:
        self._arrays, self._rows = arrays, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> NDArray[np.float16]:
        part, row = self._rows[index]
        return np.asarray(self._arrays[part][row])


# Shards that are streamed ------------------------------------------------------------------------


def fill_shards(
    cache: Cache,
    shards: Sequence[Part],
    where: str | Path,
    settings: LoaderSettings,
    *,
    on_bad: OnBad | None = None,
) -> int:
    """Compute the cache of shards one after the other; the records of one of them are in memory at a time.

    Args:
        cache: What to compute.
        shards: What to read.
        where: Folder of the cache, or `BESIDE`.
        settings: Image size and framing, and the size of the batches.
        on_bad: Told of each record that cannot be read.

    Raises:
        CacheError: A shard is a Hugging Face dataset, or two have the same name.
        DataError: As `find_records` and `fill_cache`.
    """
    _shard_folders(cache, shards, where)
    num_records = 0
    with Progress(len(shards), what=f"{cache.kind} of shards", unit="shard") as progress:
        for shard in shards:
            records = find_records([str(shard.source)], columns=shard.columns)
            fill_cache(cache, records, where, settings, on_bad=on_bad)
            num_records += len(records)
            progress.advance()
    return num_records


class ShardRows:
    """Finds the rows of streamed records in caches, for `Streamed`.

    Args:
        caches: What was computed, each with its folder or `BESIDE`.
        shards: All that the run reads.
        settings: Image size and framing.

    Raises:
        CacheError: A shard has no cache, or one of another model, image size, framing or shard.
    """

    def __init__(
        self, caches: Sequence[tuple[Cache, str]], shards: Sequence[Part], settings: LoaderSettings
    ) -> None:
        self._open = lru_cache(_OPEN_PARTS)(_open_hashed)
        self._parts: dict[str, list[tuple[Cache, Path]]] = {}
        for cache, where in caches:
            for file, folder in _shard_folders(cache, shards, where).items():
                _check_shard(cache, file, folder, where, settings)
                self._parts.setdefault(file, []).append((cache, folder))

    def __call__(self, index: int, record: Record) -> dict[str, NDArray[np.float16]]:
        """The rows of a record whose image is in memory; safe to call from several threads.

        Raises:
            DataError: Its image could not be read, now or when the cache was made.
            CacheError: The image is none of those of which the cache was made.
        """
        digest = image_hash(record.open())
        if not isinstance(record.source, Held | Absent):
            raise CacheError(
                f"{record.source}: a table that names images by their paths has no cache for streaming; set "
                "data.streaming to false, or pack the images into shards"
            )
        rows: dict[str, NDArray[np.float16]] = {}
        for cache, folder in self._parts[record.source.path]:
            places, arrays = self._open(folder, cache.names)
            place = places.get(digest)
            if place is None:
                raise CacheError(
                    f"{record.name}: the {cache.kind} in {folder} are not those of this image, so the shard has changed; "
                    f"delete the folder and run vlv data cache-{cache.kind} again"
                )
            for name, array in arrays.items():
                rows[name] = finite_row(np.array(array[place]), name, record)
        return rows


def _shard_folders(cache: Cache, shards: Sequence[Part], where: str | Path) -> dict[str, Path]:
    """Shard to the folder of its part."""
    for shard in shards:
        if isinstance(shard.source, str):
            raise CacheError(
                f"{shard}: the {cache.kind} of a Hugging Face dataset cannot be streamed; set data.{cache.kind} to null, "
                "or data.streaming to false"
            )
    return part_folders(where, cache.kind, [str(shard.source) for shard in shards])


def _check_shard(
    cache: Cache, file: str, folder: Path, where: str | Path, settings: LoaderSettings
) -> None:
    found = read_manifest(folder)
    if found is None:
        output = "" if where == BESIDE else f" -o {where}"
        raise CacheError(
            f"{file}: its {cache.kind} are not in {folder}; run vlv data cache-{cache.kind} {file}{output} with the "
            "--config of this run"
        )
    wanted = cache.made_with(settings)
    if found.get("bytes") is not None and Path(file).is_file():
        wanted["bytes"] = Path(file).stat().st_size
    check_part(cache, folder, found, wanted)


def _open_hashed(
    folder: Path, names: tuple[str, ...]
) -> tuple[dict[bytes, int], dict[str, NDArray[np.float16]]]:
    """Hash of an image to its row, and the arrays of a part, memory-mapped."""
    arrays = open_part(folder, (*names, "hashes"))
    hashes = np.array(arrays.pop("hashes"))  # (N, 32)
    return {row.tobytes(): place for place, row in enumerate(hashes)}, arrays
