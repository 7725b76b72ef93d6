"""VAE posteriors of a data set, computed once: the VAE is frozen, so every epoch would repeat them."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import nn
from tqdm import tqdm

from vlv.data.batches import epoch_batches, fingerprint
from vlv.data.framing import DEFAULT_FRAMING, Framing
from vlv.errors import DataError
from vlv.training.checkpoint import sync, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from vlv.data.batches import Batch
    from vlv.data.quarantine import BadRecord
    from vlv.data.records import Record
    from vlv.models.diffusion import DiffusionDecoder

_NAMES = ("latents_mean", "latents_std")
_MANIFEST = "manifest.json"


def cache_latents(
    decoder: DiffusionDecoder,
    records: Sequence[Record],
    image_size: int,
    folder: Path,
    *,
    framing: Framing = DEFAULT_FRAMING,
    batch_size: int = 64,
    num_workers: int = 0,
    on_bad: Callable[[BadRecord], None] | None = None,
) -> dict[str, NDArray[np.float16]]:
    """Compute the posteriors of all records, or open them where they were computed before.

    The manifest is written last, so an interrupted computation is begun again rather than taken for complete.

    Args:
        decoder: Supplies the VAE.
        records: N records; row i belongs to record i.
        image_size: Side of the images in pixels.
        folder: Of the cache; created.
        framing: How an image becomes a square, see `frame`.
        batch_size: Images of one VAE pass.
        num_workers: Threads that decode images.
        on_bad: Told of each record that cannot be read; its row is NaN, so that its use would not go unnoticed.

    Returns:
        `latents_mean` and `latents_std` for the `extra` argument of `BatchLoader`: memory-mapped float16
        (N, k, h, w), unscaled.

    Raises:
        DataError: The folder holds the posteriors of another VAE, data set, image size or framing; or a record cannot be read
            and `on_bad` is not given.
    """
    identity = _identity(decoder, records, image_size, framing)
    if (folder / _MANIFEST).exists():
        _check_identity(folder, identity)
        return _open(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images = epoch_batches(
        records, batch_size, image_size, num_workers=num_workers, on_bad=on_bad, framing=framing
    )
    rows = _posteriors(decoder, images)
    arrays: list[Any] = []
    for index, posterior in tqdm(
        rows, desc="latents", unit="batch", total=-(-len(records) // batch_size)
    ):
        if not arrays:
            arrays = [
                _create(folder / f"{name}.npy", len(records), posterior[0]) for name in _NAMES
            ]
        for array, values in zip(arrays, posterior, strict=True):
            array[index] = values
    for array, name in zip(arrays, _NAMES, strict=True):
        array.flush()
        sync(folder / f"{name}.npy")
    write_json(folder / _MANIFEST, identity)
    return _open(folder)


def _posteriors(
    decoder: DiffusionDecoder, images: Iterator[Batch]
) -> Iterator[tuple[NDArray[np.int64], tuple[NDArray[np.float32], NDArray[np.float32]]]]:
    """Places of the records of each batch, with mean and standard deviation (B, k, h, w)."""
    for chunk in images:
        mean, std = decoder.posterior(chunk["pixels"])
        yield chunk["index"].numpy(), (mean.float().cpu().numpy(), std.float().cpu().numpy())


def _create(file: Path, count: int, example: NDArray[np.float32]) -> NDArray[np.float16]:
    array = open_memmap(file, mode="w+", dtype=np.float16, shape=(count, *example.shape[1:]))
    array[:] = np.nan
    return array


def _open(folder: Path) -> dict[str, NDArray[np.float16]]:
    try:
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _NAMES}
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"the latents in {folder} cannot be read ({error}); delete the folder"
        ) from error


def _identity(
    decoder: DiffusionDecoder, records: Sequence[Record], image_size: int, framing: Framing
) -> dict[str, Any]:
    """What cached latents depend on."""
    return {
        "format": 2,
        "vae_encoder": weights_hash(_encoding_half(decoder)),
        "records": fingerprint(records),
        "num_records": len(records),
        "image_size": image_size,
        "framing": framing,
    }


def _encoding_half(decoder: DiffusionDecoder) -> nn.Module:
    """The part of the VAE that latents depend on: its decoder may be trained further."""
    vae = cast("Any", decoder.vae)
    halves = {"encoder": vae.encoder, "quant_conv": vae.quant_conv}
    return nn.ModuleDict({name: module for name, module in halves.items() if module is not None})


def _check_identity(folder: Path, wanted: dict[str, Any]) -> None:
    try:
        found = {"framing": DEFAULT_FRAMING} | json.loads((folder / _MANIFEST).read_text())
    except ValueError as error:
        raise DataError(f"{folder / _MANIFEST} is damaged ({error}); delete the folder") from error
    for key, value in wanted.items():
        if found.get(key) != value:
            raise DataError(
                f"the latents in {folder} were made with {key} {found.get(key)}, this run has {value}; "
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
