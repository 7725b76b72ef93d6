"""The encoder's own captions for the warm start, written before training by the Florence-2 that it is made of.

Shapes: N records, L ids of the text tower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from vlv.data.loader import LoaderSettings, OnBad, epoch_batches
from vlv.data.records import Record
from vlv.models.encoder import VLVEncoder
from vlv.progress import Progress
from vlv.storage import Journal, read_journal

_CHUNK = 10_000  # captions that are tokenized together


def own_caption_ids(
    encoder: VLVEncoder,
    load_tokenizer: Callable[[], PreTrainedTokenizerBase],
    text_tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    settings: LoaderSettings,
    journal: Path,
    *,
    on_bad: OnBad | None = None,
) -> NDArray[np.int64]:
    """Caption all records with the encoder's backbone; the same call goes on after an interruption.

    Args:
        encoder: Fresh from `VLVEncoder.from_florence`.
        load_tokenizer: Gives Florence-2's tokenizer, if there is something left to caption.
        text_tokenizer: Tokenizer of the text tower.
        records: N records.
        settings: Image size, framing, and how many images are captioned together.
        journal: JSONL file that keeps the captions.
        on_bad: Told of each record that cannot be read, whose caption is then empty; without it that is an error.

    Returns:
        Ids of the captions for the text tower, padded to its length and cut to the number of queries, (N, L).
    """
    known = {row["id"]: row["caption"] for row in read_journal(journal)}
    missing = [record for record in records if record.id not in known]
    if missing:
        tokenizer = load_tokenizer()
        batches = epoch_batches(missing, settings, on_bad=on_bad)
        with Journal(journal) as file, Progress(len(missing), what="own captions") as progress:
            for batch in batches:
                ids = encoder.write(batch["pixels"].to(encoder.device), encoder.num_queries)
                texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
                new = dict(zip(batch["ids"], (text.strip() for text in texts), strict=True))
                file.append({"id": name, "caption": text} for name, text in new.items())
                known |= new
                progress.advance(len(new))
    captions = [known.get(record.id, "") for record in records]
    chunks = [captions[start : start + _CHUNK] for start in range(0, len(captions), _CHUNK)]
    length = encoder.num_queries
    return np.concatenate([_ids_of(chunk, text_tokenizer)[:, :length] for chunk in chunks])


def _ids_of(captions: list[str], tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    padded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="np")
    ids: NDArray[np.int64] = padded.input_ids.astype(np.int64)
    return ids
