"""What frozen parts make of a data set, computed once: every epoch would repeat it.

The VAE's posteriors as latents, and the tokens of a frozen vision tower as features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from tqdm import tqdm

from vlv.data.batches import epoch_batches, fingerprint
from vlv.data.framing import DEFAULT_FRAMING, Framing
from vlv.errors import DataError
from vlv.training.checkpoint import sync, write_json

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
_MANIFEST = "manifest.json"
_LOOSE = "images"

Compute = Callable[[Tensor], "tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Cache:
    """What is computed of every image once, because nothing that trains has a part in it.

    Attributes:
        names: Of the arrays.
        compute: Pixels (B, 3, S, S) to as many tensors (B, ...).
        identity: What the arrays depend on beside the images: hashes of weights, sizes.
    """

    names: tuple[str, ...]
    compute: Compute
    identity: dict[str, Any]


def latents_cache(decoder: DiffusionDecoder) -> Cache:
    """The VAE's posteriors, unscaled: mean and standard deviation, (B, k, h, w) each."""

    def compute(pixels: Tensor) -> tuple[Tensor, ...]:
        mean, std = decoder.posterior(pixels)
        return mean, std

    return Cache(LATENTS, compute, {"vae_encoder": weights_hash(_encoding_half(decoder))})


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
    return Cache(FEATURES, compute, identity)


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
    cache: Cache, records: Sequence[Record], image_size: int, folder: Path, **options: Any
) -> dict[str, Any]:
    """Compute a cache of a data set part by part, or open what was computed before.

    Every .tar or .parquet file is a part in a folder of its own, named after it; all other images are one.
    An interrupted computation goes on with the part that it was at.

    Args:
        cache: What to compute.
        records: N records.
        image_size: Side of the images in pixels.
        folder: Of the cache; created.
        options: As for `fill_part`.

    Returns:
        Name to rows, for the `extra` argument of `BatchLoader`: row i belongs to record i.

    Raises:
        DataError: As `fill_part`, or two files have the same name.
    """
    parts = parts_of(records)
    arrays, rows = [], np.zeros((len(records), 2), np.int64)
    for number, (name, places) in enumerate(parts.items()):
        inside = folder if list(parts) == [_LOOSE] else folder / name
        mine = [records[place] for place in places]
        arrays.append(fill_part(cache, mine, image_size, inside, **options))
        rows[places, 0], rows[places, 1] = number, np.arange(len(places))
    if len(arrays) == 1:
        return dict(arrays[0])
    return {name: JoinedRows([part[name] for part in arrays], rows) for name in cache.names}


def parts_of(records: Sequence[Record]) -> dict[str, list[int]]:
    """The places of the records of each file of many images, and of all other images together.

    Raises:
        DataError: Two files have the same name, which their parts cannot share.
    """
    parts: dict[str, list[int]] = {}
    files: dict[str, str] = {}
    for place, record in enumerate(records):
        path = None if isinstance(record.source, Path) else str(record.source.path)
        name = _LOOSE if path is None else path.rstrip("/").rpartition("/")[2]
        if path is not None and files.setdefault(name, path) != path:
            raise DataError(
                f"{files[name]} and {path} have the same name; cache them in two folders, or rename one"
            )
        parts.setdefault(name, []).append(place)
    return parts


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
    if (folder / _MANIFEST).exists():
        _check_identity(folder, identity, records)
        return _open(folder, cache.names)
    folder.mkdir(parents=True, exist_ok=True)
    images = epoch_batches(
        records, batch_size, image_size, num_workers=num_workers, on_bad=on_bad, framing=framing
    )
    arrays: list[Any] = []
    total = -(-len(records) // batch_size)
    for chunk in tqdm(images, desc=folder.name, unit="batch", total=total):
        computed = [value.float().cpu().numpy() for value in cache.compute(chunk["pixels"])]
        if not arrays:
            arrays = [
                _create(folder / f"{name}.npy", len(records), value)
                for name, value in zip(cache.names, computed, strict=True)
            ]
        for array, values in zip(arrays, computed, strict=True):
            array[chunk["index"].numpy()] = values
    for array, name in zip(arrays, cache.names, strict=True):
        array.flush()
        sync(folder / f"{name}.npy")
    write_json(folder / _MANIFEST, identity | {"content": content_hash(records)})
    return _open(folder, cache.names)


def _create(file: Path, count: int, example: NDArray[np.float32]) -> NDArray[np.float16]:
    array = open_memmap(file, mode="w+", dtype=np.float16, shape=(count, *example.shape[1:]))
    array[:] = np.nan
    return array


def _open(folder: Path, names: Sequence[str]) -> dict[str, NDArray[np.float16]]:
    try:
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"the cache in {folder} cannot be read ({error}); delete the folder"
        ) from error


def _identity(
    cache: Cache, records: Sequence[Record], image_size: int, framing: Framing
) -> dict[str, Any]:
    """What a part depends on, beside the content of its files."""
    return {
        "format": 3,
        **cache.identity,
        "records": fingerprint(records),
        "num_records": len(records),
        "image_size": image_size,
        "framing": framing,
        "files": _stamp(records),
    }


def _files_of(records: Sequence[Record]) -> list[Path]:
    """The files on this machine that hold the images, each once."""
    sources = (record.source for record in records)
    paths = (source if isinstance(source, Path) else source.path for source in sources)
    return [path for path in dict.fromkeys(paths) if isinstance(path, Path) and path.is_file()]


def _stamp(records: Sequence[Record]) -> str:
    """Sizes and times of the files: where they are the same, so is the content."""
    digest = hashlib.sha256()
    for path in _files_of(records):
        about = path.stat()
        digest.update(f"{about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def content_hash(records: Sequence[Record]) -> str:
    """A hash of the files that hold the images; what is remote has no part in it."""
    digest = hashlib.sha256()
    for path in _files_of(records):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _encoding_half(decoder: DiffusionDecoder) -> nn.Module:
    """The part of the VAE that latents depend on: its decoder may be trained further."""
    vae = cast("Any", decoder.vae)
    halves = {"encoder": vae.encoder, "quant_conv": vae.quant_conv}
    return nn.ModuleDict({name: module for name, module in halves.items() if module is not None})


def _check_identity(folder: Path, wanted: dict[str, Any], records: Sequence[Record]) -> None:
    try:
        found = {"framing": DEFAULT_FRAMING} | json.loads((folder / _MANIFEST).read_text())
    except ValueError as error:
        raise DataError(f"{folder / _MANIFEST} is damaged ({error}); delete the folder") from error
    files = wanted.pop("files")
    if found.get("files") != files and found.get("content") is not None:
        wanted["content"] = content_hash(records)  # files were touched or copied; perhaps no more
    for key, value in wanted.items():
        if found.get(key) != value:
            raise DataError(
                f"the cache in {folder} was made with {key} {found.get(key)}, this run has {value}; "
                "delete the folder or name another"
            )


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of all parameters and persistent buffers, names included."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
