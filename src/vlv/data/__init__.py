"""Files in, batches out: open images, find records, hand out batches with exact resume."""

from vlv.data.batches import Batch, BatchLoader, epoch_batches, fingerprint, merge_states
from vlv.data.images import ImageLimits, center_crop_resize, load_image, to_pil, to_rgb, to_tensor
from vlv.data.quarantine import BadRecord
from vlv.data.records import Record, Span, TarShardWriter, find_records, shard_path

__all__ = [
    "BadRecord",
    "Batch",
    "BatchLoader",
    "ImageLimits",
    "Record",
    "Span",
    "TarShardWriter",
    "center_crop_resize",
    "epoch_batches",
    "find_records",
    "fingerprint",
    "load_image",
    "merge_states",
    "shard_path",
    "to_pil",
    "to_rgb",
    "to_tensor",
]
