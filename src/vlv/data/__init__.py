"""Files in, batches out: open images, find records, hand out batches with exact resume."""

from vlv.data.images import ImageLimits, center_crop_resize, load_image, to_pil, to_rgb, to_tensor
from vlv.data.loader import (
    Batch,
    Listed,
    Loader,
    LoaderSettings,
    Streamed,
    epoch_batches,
)
from vlv.data.positions import merge_states
from vlv.data.records import BadRecord, Record, Span
from vlv.data.shards import TarShardWriter, shard_path
from vlv.data.source import find_records

__all__ = [
    "BadRecord",
    "Batch",
    "ImageLimits",
    "Listed",
    "Loader",
    "LoaderSettings",
    "Record",
    "Source",
    "Span",
    "Streamed",
    "TarShardWriter",
    "center_crop_resize",
    "epoch_batches",
    "find_records",
    "load_image",
    "merge_states",
    "shard_path",
    "to_pil",
    "to_rgb",
    "to_tensor",
]
