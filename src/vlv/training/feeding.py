"""What the loop is fed with: batches of the data that the settings name, and what is computed beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlv.data.batches import BatchLoader
from vlv.data.framing import DEFAULT_FRAMING, Framing
from vlv.models.encoder import VLVEncoder
from vlv.training.latents import cache_latents
from vlv.training.own_captions import cached_ids, own_captions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from vlv.config import RunConfig
    from vlv.data.quarantine import BadRecord
    from vlv.data.records import Record
    from vlv.models.diffusion import DiffusionDecoder
    from vlv.models.vision_encoder import VisionEncoder


def make_loader(
    config: RunConfig,
    encoder: VLVEncoder | VisionEncoder,
    decoder: DiffusionDecoder,
    records: list[Record],
    run_dir: Path,
    load_tokenizer: Callable[[], Any],
    *,
    framing: Framing = DEFAULT_FRAMING,
    rank: int = 0,
    num_ranks: int = 1,
) -> BatchLoader:
    """Endless batches, with cached latents and the encoder's own captions where the settings ask for them.

    Args:
        config: The run.
        encoder: The encoder that trains.
        decoder: The diffusion decoder, whose VAE makes latents.
        records: What to train on.
        run_dir: Folder of the run, for the quarantine and the captions.
        load_tokenizer: Florence-2's tokenizer, called where own captions are wanted.
        framing: How images become squares.
        rank: Number of this process.
        num_ranks: Processes that train together.
    """
    data = config.data
    extra: dict[str, NDArray[Any]] = {}
    if data.latents is not None:
        extra |= cache_latents(
            decoder,
            records,
            data.image_size,
            Path(data.latents),
            framing=framing,
            num_workers=data.num_workers,
            on_bad=_leave_to_the_loader,
        )
    if config.stage1 is not None and config.stage1.warm_start_steps:
        extra["own_ids"] = own_ids(
            config, encoder, decoder, records, run_dir / "own_ids.npy", load_tokenizer, framing
        )
    return BatchLoader(
        records,
        config.loop.batch_size,
        data.image_size,
        seed=config.loop.seed,
        rank=rank,
        num_ranks=num_ranks,
        num_workers=data.num_workers,
        quarantine=quarantine_file(run_dir, rank),
        max_bad_share=data.max_bad_share,
        framing=framing,
        extra=extra,
    )


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
