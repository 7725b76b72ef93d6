"""The encoder's own captions, written before training by the Florence-2 that it is made of.

Shapes: B batch, N image tokens, P prompt tokens, L ids of the text tower, d Florence width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from vlv.data.framing import DEFAULT_FRAMING, Framing
from vlv.data.loader import LoaderSettings, epoch_batches
from vlv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from vlv.data.quarantine import BadRecord
    from vlv.data.records import Record
    from vlv.models.encoder import VLVEncoder


def own_captions(
    encoder: VLVEncoder,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    image_size: int,
    framing: Framing = DEFAULT_FRAMING,
    on_bad: Callable[[BadRecord], None] | None = None,
    batch_size: int = 32,
) -> list[str]:
    """Caption all records with the encoder's backbone, with a bar on stderr; a record that cannot be read gets an empty caption.

    Args:
        encoder: Fresh from `VLVEncoder.from_florence`.
        tokenizer: Florence-2's.
        records: N records.
        image_size: Side of the images in pixels.
        framing: How an image becomes a square, see `frame`.
        on_bad: Told of each record that cannot be read; without it that is an error.
        batch_size: Images captioned together.

    Returns:
        N captions.
    """
    captions = [""] * len(records)
    settings = LoaderSettings(batch_size=batch_size, image_size=image_size, framing=framing)
    batches = epoch_batches(list(records), settings, on_bad=on_bad)
    total = -(-len(records) // batch_size)
    for batch in tqdm(batches, desc="own captions", unit="batch", total=total):
        ids = _write(encoder, batch["pixels"].to(encoder.device))
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        for index, text in zip(batch["index"].tolist(), texts, strict=True):
            captions[index] = text.strip()
    return captions


def cached_ids(
    cache: Path, count: int, make: Callable[[], Sequence[str]], tokenizer: Any, length: int
) -> NDArray[np.int64]:
    """Ids of ``count`` captions for the text tower, padded to its length and cut to ``length``: (count, L).

    They are made once and kept in ``cache``.

    Raises:
        DataError: The file belongs to other data.
    """
    if not cache.exists():
        captions = list(make())
        ids = tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="np"
        ).input_ids
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(".tmp.npy")
        np.save(temporary, ids[:, :length].astype(np.int64))
        temporary.replace(cache)
    loaded: NDArray[np.int64] = np.load(cache)
    if len(loaded) != count:
        raise DataError(f"{cache} has {len(loaded)} captions for {count} images; remove it")
    return loaded


@torch.no_grad()
def _write(encoder: VLVEncoder, pixels: Tensor) -> Tensor:
    """Captions of Florence-2 itself as its token ids, greedy, (B, T)."""
    backbone: Any = encoder.backbone
    features = encoder.image_features(pixels)  # (B, N, d)
    prompt = torch.tensor(encoder.config.prompt_ids, device=features.device)
    prompt = backbone.get_input_embeddings()(prompt).expand(len(features), -1, -1)  # (B, P, d)
    memory = backbone.model.language_model.encoder(inputs_embeds=torch.cat([features, prompt], 1))
    ids: Tensor = backbone.generate(
        encoder_outputs=memory,  # generate() itself drops inputs_embeds for this class
        attention_mask=torch.ones(memory[0].shape[:2], dtype=torch.long, device=features.device),
        max_new_tokens=encoder.num_queries,
        num_beams=1,
        do_sample=False,
    )
    return ids
