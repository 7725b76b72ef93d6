"""What frozen parts make of a data set, computed once: every epoch would repeat it.

The VAE's posteriors as latents, and the tokens of a frozen vision tower as features.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from tqdm import tqdm

from vlv.data.framing import DEFAULT_FRAMING, Framing
from vlv.data.loader import LoaderSettings, epoch_batches
from vlv.errors import DataError
from vlv.storage import write_text
from vlv.training.cache_parts import (
    FORMAT,
    content_hash,
    file_of,
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

SAVE_SECONDS = 60.0
"""How much work on single images an interruption may cost."""
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
    An interrupted computation goes on with the part that it was at, and among single images where it was.

    Args:
        cache: What to compute.
        records: N records.
        image_size: Side of the images in pixels.
        where: Folder of the cache, created; or `BESIDE`.
        options: As for `fill_part`.

    Returns:
        Name to rows, for `Listed`: row i belongs to record i.

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

    The manifest is written last, so an interrupted computation is not taken for complete. That of single images goes on
    with the batch that it was at, or loses `SAVE_SECONDS`; that of a shard, whose images have to be hashed, is begun again.

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
        For each name an array for `Listed`: memory-mapped float16 (N, ...).

    Raises:
        DataError: The folder holds what another model, data set, image size or framing gave; or a record cannot be read
            and `on_bad` is not given.
    """
    identity = _identity(cache, records, image_size, framing)
    if _is_filled(cache, folder, identity, records):
        return open_part(folder, cache.names)
    folder.mkdir(parents=True, exist_ok=True)
    kept = [hashed(record) for record in records]
    growing = _Growing(folder, cache.names, identity, records)
    places = growing.places()
    images = epoch_batches(
        [kept[place] for place in places],
        LoaderSettings(
            batch_size=batch_size, image_size=image_size, num_workers=num_workers, framing=framing
        ),
        on_bad=on_bad,
    )
    total, left = (-(-n // batch_size) for n in (len(records), len(places)))
    for chunk in tqdm(images, desc=folder.name, unit="batch", total=total, initial=total - left):
        computed = [value.float().cpu().numpy() for value in cache.compute(chunk["pixels"])]
        growing.put(places[chunk["index"].numpy()], computed)
        growing.save_now_and_then()
    if not growing.arrays:
        raise DataError(f"none of {len(records)} images for {folder} can be read")
    growing.flush()
    write_hashes(folder, kept)
    write_manifest(folder, identity, records)
    growing.progress.unlink(missing_ok=True)
    return open_part(folder, cache.names)


class _Growing:
    """The arrays of a part while they are computed; those of an interrupted computation of the very same grow on.

    Args:
        folder: Of the part.
        names: Of the arrays.
        identity: What they are made of.
        records: N records; where they lie in shards, whose hashes would be lost, nothing is saved on the way.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        identity: dict[str, Any],
        records: Sequence[Record],
    ) -> None:
        self.files = [folder / f"{name}.npy" for name in names]
        self.progress = folder / "progress.json"
        self.arrays: list[Any] = []
        self._identity, self._count, self._done = identity, len(records), 0
        self._saved = time.monotonic()
        self._in_shards = any(file_of(record) is not None for record in records)
        try:
            found = json.loads(self.progress.read_text())
            arrays = [np.load(file, mmap_mode="r+") for file in self.files]
        except (OSError, EOFError, ValueError):
            return
        if {key: found.get(key) for key in identity} == identity:
            self.arrays, self._done = arrays, found["done"]

    def places(self) -> NDArray[np.int64]:
        """The records that are still to be computed; those that could not be read are tried, and told of, again."""
        rest = np.arange(self._done, self._count)
        if not self.arrays:
            return rest
        done = self.arrays[0][: self._done].reshape(self._done, -1)
        return np.concatenate([np.flatnonzero(np.isnan(done[:, 0])), rest])

    def put(self, rows: NDArray[np.int64], values: Sequence[NDArray[np.float32]]) -> None:
        """Set some rows of each array; the arrays are made with the first ones."""
        if not self.arrays:
            self.progress.unlink(missing_ok=True)  # it tells of other arrays
            pairs = zip(self.files, values, strict=True)
            self.arrays = [_create(*pair, self._count) for pair in pairs]
        for array, value in zip(self.arrays, values, strict=True):
            array[rows] = value
        self._done = max(self._done, int(rows[-1]) + 1)

    def flush(self) -> None:
        """Force the arrays to the disk."""
        for array, file in zip(self.arrays, self.files, strict=True):
            array.flush()
            sync(file)

    def save_now_and_then(self) -> None:
        """Every `SAVE_SECONDS` write down how far it is."""
        if not self._in_shards and time.monotonic() - self._saved >= SAVE_SECONDS:
            self.flush()
            write_text(self.progress, json.dumps(self._identity | {"done": self._done}))
            self._saved = time.monotonic()


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
