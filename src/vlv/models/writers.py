"""Who writes captions: our own loop over the language model, or an engine that takes prefixes (`vlv.engine`).

Shapes: B prefixes, N captions of each, Q positions, E language-model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from vlv.models.compilation import uncompiled
from vlv.models.decoding import (
    Generation,
    RowSampling,
    can_record,
    can_share,
    greedy_search,
    read_once,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Writing:
    """How captions are written, with nothing left open."""

    how: Generation
    max_new_tokens: int
    end: int
    """Id of the token that ends a caption."""
    pad: int
    """Id of what may follow it."""
    processors: Sequence[LogitsProcessor] = ()
    """Of the logits of each token, before any sampling."""


class Writer(Protocol):
    """Writes the tokens of captions; who asks does not know which one does."""

    def write(self, prefix: Tensor, writing: Writing, copies: int) -> Sequence[Sequence[int]]:
        """The tokens of N captions behind each prefix, up to the end token and perhaps beyond.

        Args:
            prefix: e = psi(c), (B, Q, E).
            writing: How; a caption depends on its prefix and its own seed alone.
            copies: N.

        Returns:
            B N rows, those of a prefix one after the other.
        """


class OwnWriter:
    """Writes with the language model in this process; leaves its mode and the global generator alone.

    Args:
        llm: The language model.
        records_steps: See `CaptionDecoder.records_steps`.
    """

    def __init__(self, llm: PreTrainedModel, *, records_steps: bool = True) -> None:
        self._llm: Any = llm
        self._records_steps = records_steps

    def write(self, prefix: Tensor, writing: Writing, copies: int) -> Sequence[Sequence[int]]:
        """See `Writer`; greedy search on a GPU is recorded, a prefix is read once where the model allows it."""
        how = writing.how
        rows = prefix.repeat_interleave(copies, 0)
        is_greedy = not how.do_sample and how.num_beams == 1 and how.repetition_penalty == 1.0
        is_greedy = is_greedy and not writing.processors
        training = self._llm.training
        self._llm.train(False)
        try:
            if is_greedy and self._records_steps and can_record(self._llm):
                ids = greedy_search(
                    self._llm,
                    rows,
                    max_new_tokens=writing.max_new_tokens,
                    end=writing.end,
                    pad=writing.pad,
                )
            else:
                ids = self._generate(prefix, rows, writing, copies)
        finally:
            self._llm.train(training)
        written: list[list[int]] = ids.tolist()
        return written

    def _generate(self, prefix: Tensor, rows: Tensor, writing: Writing, copies: int) -> Tensor:
        """The search of transformers, (B N, up to max_new_tokens)."""
        how = writing.how
        samples_beams = how.do_sample and how.num_beams > 1
        sampling = {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
        settings = GenerationConfig(
            pad_token_id=writing.pad,
            eos_token_id=writing.end,
            early_stopping=how.early_stopping,
            max_new_tokens=writing.max_new_tokens,
            num_beams=how.num_beams,
            do_sample=samples_beams,
            **(sampling if samples_beams else {}),
        )
        seeds = how.seeds(len(rows))
        processors = LogitsProcessorList()
        if how.repetition_penalty != 1.0:  # as a setting it would warn that the prefix has no ids
            processors.append(RepetitionPenaltyLogitsProcessor(float(how.repetition_penalty)))
        processors += writing.processors
        if how.do_sample and not samples_beams:
            processors.append(RowSampling(seeds, how.temperature, how.top_p, rows.device))
        devices = [rows.device] if rows.device.type == "cuda" else []
        no_draws_outside = torch.random.fork_rng(devices=devices, enabled=samples_beams)
        with uncompiled(self._llm), no_draws_outside:
            if samples_beams:
                torch.manual_seed(seeds[0])
            shared = copies > 1 and how.num_beams == 1 and can_share(self._llm)
            known = {"past_key_values": read_once(self._llm, prefix, copies)} if shared else {}
            ids: Tensor = self._llm.generate(
                **known,
                inputs_embeds=rows,
                attention_mask=torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device),
                generation_config=settings,
                logits_processor=processors,
                synced_gpus=False,  # it would wait for processes that do not generate
            )
        return ids
