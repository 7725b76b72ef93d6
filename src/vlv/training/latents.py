"""What frozen parts make of a data set, computed once: every epoch would repeat it.

The VAE's posteriors as latents, and the tokens of a frozen vision tower as features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from tqdm import tqdm

from vlv.data.batches import epoch_batches
from vlv.data.framing import DEFAULT_FRAMING, Framing
from vlv.errors import DataError
from vlv.training.cache_parts import (
    FORMAT,
    content_hash,
    hashed,
    ids_hash,
    open_part,
    part_folders,
    parts_of,
    read_manifest,
    refuse_difference,
    stamp,
    write_hashes,
    write_manifest,
)
from vlv.training.checkpoint import sync

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vlv.data.quarantine import BadRecord
    from vlv.data.records import Record
    from vlv.models.diffusion import DiffusionDecoder
    from vlv.models.encoder import VLVEncoder
    from vlv.models.vision_encoder import VisionEncoder

LATENTS = ("latents_mean", "latents_std")
FEATURES = ("features",)
Compute = Callable[[Tensor], "tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Cache:
    """What is computed of every image once, because nothing that trains has a part in it.

    Attributes:
        kind: What the setting and the command are called: data.latents, vlv data cache-latents.
        names: Of the arrays.
        compute: Pixels (B, 3, S, S) to as many tensors (B, ...).
        identity: What the arrays depend on beside the images: hashes of weights, sizes.
    """

    kind: Literal["latents", "features"]
    names: tuple[str, ...]
    compute: Compute
    identity: dict[str, Any]

    def depends_on(self, image_size: int, framing: Framing) -> dict[str, Any]:
        """What the arrays depend on beside the images, as the manifest states it."""
        return {"format": FORMAT, **self.identity, "image_size": image_size, "framing": framing}


def latents_cache(decoder: DiffusionDecoder) -> Cache:
    """The VAE's posteriors, unscaled: mean and standard deviation, (B, k, h, w) each."""

    def compute(pixels: Tensor) -> tuple[Tensor, ...]:
        mean, std = decoder.posterior(pixels)
        return mean, std

    identity = {"vae_encoder": weights_hash(_encoding_half(decoder))}
    return Cache("latents", LATENTS, compute, identity)


def features_cache(encoder: VLVEncoder | VisionEncoder) -> Cache:
    """The tokens of the frozen vision tower, (B, N, d)."""

    @torch.no_grad()
    def compute(pixels: Tensor) -> tuple[Tensor, ...]:
        return (encoder.image_features(pixels.to(encoder.device)),)

    config = encoder.config
    identity = {
        "vision_tower": weights_hash(nn.ModuleList(encoder.vision())),
        "input_size": config.image_size,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }
    return Cache("features", FEATURES, compute, identity)


def cache_latents(
    decoder: DiffusionDecoder,
    records: Sequence[Record],
    image_size: int,
    folder: Path,
    **options: Any,
) -> dict[str, NDArray[np.float16]]:
    """The VAE posteriors of a data set, in one part: see `fill_part`."""
    return fill_part(latents_cache(decoder), records, image_size, folder, **options)


def fill_cache(
    cache: Cache, records: Sequence[Record], image_size: int, where: str | Path, **options: Any
) -> dict[str, Any]:
    """Compute a cache of a data set part by part, or open what was computed before.

    Every .tar or .parquet file is a part in a folder of its own, named after it; all other images are one.
    An interrupted computation goes on with the part that it was at.

    Args:
        cache: What to compute.
        records: N records.
        image_size: Side of the images in pixels.
        where: Folder of the cache, created; or `BESIDE`.
        options: As for `fill_part`.

    Returns:
        Name to rows, for the `extra` argument of `BatchLoader`: row i belongs to record i.

    Raises:
        DataError: As `fill_part`, or two files have the same name.
    """
    parts = parts_of(records)
    folders = part_folders(where, cache.kind, parts)
    if list(parts) == [None]:
        folders = {None: Path(where)}
    arrays, rows = [], np.zeros((len(records), 2), np.int64)
    for number, (file, places) in enumerate(parts.items()):
        mine = [records[place] for place in places]
        arrays.append(fill_part(cache, mine, image_size, folders[file], **options))
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

    def __init__(self, arrays: Sequence[NDArray[Any]], rows: NDArray[np.int64]) -> None:
        self._arrays, self._rows = arrays, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> NDArray[Any]:
        part, row = self._rows[index]
        return np.asarray(self._arrays[part][row])


def fill_part(
    cache: Cache,
    records: Sequence[Record],
    image_size: int,
    folder: Path,
    *,
    framing: Framing = DEFAULT_FRAMING,
    batch_size: int = 64,
    num_workers: int = 0,
    on_bad: Callable[[BadRecord], None] | None = None,
) -> dict[str, NDArray[np.float16]]:
    """Compute the arrays of all records, or open them where they were computed before.

    The manifest is written last, so an interrupted computation is begun again rather than taken for complete.

    Args:
        cache: What to compute.
        records: N records; row i belongs to record i.
        image_size: Side of the images in pixels.
        folder: Of the cache; created.
        framing: How an image becomes a square, see `frame`.
        batch_size: Images of one pass.
        num_workers: Threads that decode images.
        on_bad: Told of each record that cannot be read; its row is NaN, which the loader skips and counts.

    Returns:
        For each name an array for the `extra` argument of `BatchLoader`: memory-mapped float16 (N, ...).

    Raises:
        DataError: The folder holds what another model, data set, image size or framing gave; or a record cannot be read
            and `on_bad` is not given.
    """
    identity = _identity(cache, records, image_size, framing)
    if _is_filled(cache, folder, identity, records):
        return open_part(folder, cache.names)
    folder.mkdir(parents=True, exist_ok=True)
    kept = [hashed(record) for record in records]
    images = epoch_batches(
        kept, batch_size, image_size, num_workers=num_workers, on_bad=on_bad, framing=framing
    )
    arrays: list[Any] = []
    total = -(-len(records) // batch_size)
    for chunk in tqdm(images, desc=folder.name, unit="batch", total=total):
        computed = [value.float().cpu().numpy() for value in cache.compute(chunk["pixels"])]
        if not arrays:
            files = [folder / f"{name}.npy" for name in cache.names]
            arrays = [_create(*pair, len(records)) for pair in zip(files, computed, strict=True)]
        for array, values in zip(arrays, computed, strict=True):
            array[chunk["index"].numpy()] = values
    if not arrays:
        raise DataError(f"none of {len(records)} images for {folder} can be read")
    for array, name in zip(arrays, cache.names, strict=True):
        array.flush()
        sync(folder / f"{name}.npy")
    write_hashes(folder, kept)
    write_manifest(folder, identity, records)
    return open_part(folder, cache.names)


def _create(file: Path, example: NDArray[np.float32], count: int) -> NDArray[np.float16]:
    array = open_memmap(file, mode="w+", dtype=np.float16, shape=(count, *example.shape[1:]))
    array[:] = np.nan
    return array


def _identity(
    cache: Cache, records: Sequence[Record], image_size: int, framing: Framing
) -> dict[str, Any]:
    """What a part was made of, beside the content of its files."""
    return {
        **cache.depends_on(image_size, framing),
        "records": ids_hash(records),
        "num_records": len(records),
        "files": stamp(records),
    }


def _is_filled(
    cache: Cache, folder: Path, wanted: dict[str, Any], records: Sequence[Record]
) -> bool:
    found = read_manifest(folder)
    if found is None:
        return False
    expected = {key: value for key, value in wanted.items() if key != "files"}
    if found.get("files") != wanted["files"] and found.get("content") is not None:
        expected["content"] = content_hash(records)  # files were touched or copied; perhaps no more
    refuse_difference(cache.kind, folder, found, expected)
    return True


def _encoding_half(decoder: DiffusionDecoder) -> nn.Module:
    """The part of the VAE that latents depend on: its decoder may be trained further."""
    vae = cast("Any", decoder.vae)
    halves = {"encoder": vae.encoder, "quant_conv": vae.quant_conv}
    return nn.ModuleDict({name: module for name, module in halves.items() if module is not None})


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of all parameters and persistent buffers, names included."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
