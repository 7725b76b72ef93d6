"""CaptionDecoder: context c in, caption out.

A projector psi takes c to the language model's width; the result stands before the caption as a
prefix. An instruction, such as a question, may stand between the two. Shapes: B batch, Q queries, D text width, E
language-model width, T caption tokens with the end token, I instruction tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vlv.errors import ConfigError, ModelFolderError
from vlv.models.arguments import named, whole_number
from vlv.models.caption_loss import (
    Batching,
    LossMean,
    caption_log_probs,
    caption_loss,
    has_numbers,
    padding_share,
    plain_head,
)
from vlv.models.captioner_config import CaptionDecoderConfig
from vlv.models.decoding import Caption, Generation, GenerationOptions, tidy_caption
from vlv.models.encoder import Projector
from vlv.models.instructions import instructions_of
from vlv.models.json_writing import JsonWriting
from vlv.models.lora import let_train
from vlv.models.word_writing import TokenTexts, write_with_words
from vlv.models.writers import OwnWriter, Writer, Writing

CaptionParts = Literal["none", "mlp", "mlp+llm"]
TOKENIZER_FOLDER = "tokenizer"
LONGEST_CAPTION = 300
"""Tokens at which a caption is stopped by default (the authors' limit)."""


class CaptionTokens(NamedTuple):
    """Captions as supervised tokens."""

    ids: Tensor
    """Caption tokens and end token, padded on the right, (B, T)."""
    lengths: Tensor
    """Supervised tokens of each caption, (B,)."""
    num_truncated: int
    """Captions that were cut, and so carry no end token."""


class CaptionDecoder(PreTrainedModel):
    """Context to caption (paper, section 3.3).

    The tokenizer belongs to the component and is saved in its ``tokenizer`` folder; beside a
    language model's ``config.json`` AutoTokenizer would take it for that family's own tokenizer and
    change the ids silently.
    """

    config: CaptionDecoderConfig
    config_class = CaptionDecoderConfig
    base_model_prefix = ""
    main_input_name = "c"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    tokenizer: PreTrainedTokenizerBase
    records_steps = True
    """Whether greedy search on a GPU records its step where it can, which changes nothing but its speed."""
    writer: Writer | None = None
    """Who writes behind the prefixes; None is the language model itself, in this process."""

    def __init__(self, config: CaptionDecoderConfig) -> None:
        super().__init__(config)
        llm_config = cast("PreTrainedConfig", config.llm_config)
        self.llm: Any = AutoModelForCausalLM.from_config(llm_config, trust_remote_code=False)
        # Not hidden_size: some models embed tokens in fewer channels than they compute in.
        width = self.llm.get_input_embeddings().embedding_dim
        self.mlp = Projector(config.text_width, width)
        self._has_plain_head: bool | None = None
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def device(self) -> torch.device:
        """Where the projector is; of a language model that an engine has taken over, no weights are left here."""
        return next(self.mlp.parameters()).device

    # --- loading and saving ----------------------------------------------------------------------

    @classmethod
    def from_llm(
        cls, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, text_width: int, seed: int
    ) -> CaptionDecoder:
        """Put a fresh projector on a pretrained language model.

        Args:
            llm: Any causal language model; it is taken over, not copied.
            tokenizer: Its tokenizer, which must have an end token.
            text_width: D.
            seed: Of the projector.

        Returns:
            The caption decoder, on the language model's device and in its dtype.

        Raises:
            ConfigError: The tokenizer has no end token.
        """
        with torch.device("meta"):
            decoder = cls(CaptionDecoderConfig(llm_config=llm.config, text_width=text_width))
        decoder.llm = llm
        decoder._attach(tokenizer)
        decoder.mlp.draw(torch.Generator().manual_seed(seed))
        decoder.mlp.to(llm.device, llm.dtype)
        return decoder

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """Load weights and tokenizer; arguments as in ``PreTrainedModel.from_pretrained``."""
        loaded = super().from_pretrained(path, *args, **kwargs)
        decoder = loaded[0] if isinstance(loaded, tuple) else loaded
        subfolder = Path(kwargs.get("subfolder") or "") / TOKENIZER_FOLDER
        where = {k: kwargs[k] for k in ("revision", "local_files_only", "cache_dir") if k in kwargs}
        decoder._attach(
            AutoTokenizer.from_pretrained(
                path, subfolder=subfolder.as_posix(), trust_remote_code=False, **where
            )
        )
        return loaded

    def save_pretrained(  # type: ignore[override]
        self, folder: str | Path, *args: Any, **kwargs: Any
    ) -> None:
        """Save weights, configuration and tokenizer."""
        super().save_pretrained(folder, *args, **kwargs)
        self._tokenizer().save_pretrained(Path(folder) / TOKENIZER_FOLDER)

    def _attach(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the caption decoder's tokenizer has no end token; set tokenizer.eos_token"
            )
        self.tokenizer = tokenizer

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if not hasattr(self, "tokenizer"):
            raise ModelFolderError(
                "this caption decoder has no tokenizer; build it with from_llm or from_pretrained"
            )
        return self.tokenizer

    # --- training --------------------------------------------------------------------------------

    def trainable(self, parts: CaptionParts) -> list[nn.Parameter]:
        """Choose what trains (paper, Table 4).

        Args:
            parts: "mlp" is psi alone, "mlp+llm" everything, or psi and the adapters where there are any, "none" nothing.
        """
        self.mlp.requires_grad_(parts != "none")
        let_train(self.llm, parts == "mlp+llm")
        return [p for p in self.parameters() if p.requires_grad]

    def prefix(self, c: Tensor) -> Tensor:
        """From context to prefix: e = psi(c), (B, Q, D) to (B, Q, E)."""
        e = self.mlp(c.to(next(self.mlp.parameters()).dtype))
        typed: Tensor = e.to(self.llm.get_input_embeddings().weight.dtype)
        return typed

    def tokenize(
        self, captions: Sequence[str], max_tokens: int | None = None, *, with_end: bool = True
    ) -> CaptionTokens:
        """Turn captions into supervised tokens.

        Args:
            captions: B texts.
            max_tokens: Longest kept sequence with its end token. A longer caption is cut and gets
                no end token, for it did not end there.
            with_end: Whether the end token is supervised, which teaches the model to stop.

        Returns:
            Ids padded on the right, with the lengths that make the loss mask: pad and end token may
            share an id.
        """
        rows = self.token_rows(captions, with_end=with_end)
        num_truncated = sum(len(row) > max_tokens for row in rows) if max_tokens else 0
        tensors = [torch.tensor(row[:max_tokens]) for row in rows]
        ids = nn.utils.rnn.pad_sequence(
            tensors, batch_first=True, padding_value=self._tokenizer().eos_token_id
        )
        lengths = torch.tensor([len(row) for row in tensors])
        return CaptionTokens(ids.to(self.device), lengths.to(self.device), num_truncated)

    def token_rows(self, captions: Sequence[str], *, with_end: bool = True) -> list[list[int]]:
        """The tokens of each caption, uncut, with the end token where it is wanted."""
        tokenizer = self._tokenizer()
        rows = tokenizer(list(captions), add_special_tokens=False).input_ids
        end = [tokenizer.eos_token_id] if with_end else []
        return [[*row, *end] for row in rows]

    def loss(
        self,
        c: Tensor,
        captions: Sequence[str],
        *,
        instructions: Sequence[str | None] = (),
        max_tokens: int | None = None,
        with_end: bool = True,
        batching: Batching = "auto",
    ) -> Tensor:
        """Cross-entropy of the captions given c (paper, equation 2).

        Only caption tokens and the end token are predicted; prefix, instruction and padding carry no loss.

        Args:
            c: Context, (B, Q, D).
            captions: B texts.
            instructions: B texts that the captions answer, None for a plain one; empty is none at all.
            max_tokens: See `tokenize`.
            with_end: See `tokenize`.
            batching: How captions of different lengths share a pass, see `caption_loss`; the loss is the same.

        Returns:
            Mean over all supervised tokens, a float32 scalar.
        """
        if len(captions) != len(c):
            raise ValueError(f"{len(c)} contexts need as many captions, got {len(captions)}")
        rows = [row[:max_tokens] for row in self.token_rows(captions, with_end=with_end)]
        before = self.instruction_rows(instructions)
        return self.loss_of_tokens(c, rows, instructions=before, batching=batching)

    def loss_of_tokens(
        self,
        c: Tensor,
        rows: Sequence[Sequence[int]],
        *,
        instructions: Sequence[Sequence[int]] = (),
        batching: Batching = "auto",
        mean: LossMean = "tokens",
    ) -> Tensor:
        """`loss` of captions that are tokens already, M rows for each c; `instructions` has as many, or none.

        `mean` is that of `caption_loss`.
        """
        self._check_texts(c, rows, instructions)
        head = self.find_head()
        return caption_loss(
            self.llm,
            self.prefix(c),
            rows,
            instructions=instructions,
            batching=batching,
            head=head,
            mean=mean,
        )

    def log_probs_of_tokens(
        self,
        c: Tensor,
        rows: Sequence[Sequence[Sequence[int]]],
        *,
        instructions: Sequence[Sequence[int]] = (),
        batching: Batching = "auto",
    ) -> Tensor:
        """Log-probability of several captions of each context, with gradients.

        Args:
            c: Context, (B, Q, D).
            rows: The tokens of M captions for each context, with the end token where there is one.
            instructions: The tokens of one instruction for each context, as of `instruction_rows`; empty is none at all.
            batching: See `loss`.

        Returns:
            Sums over the tokens, (B, M), float32.
        """
        each = [row for captions in rows for row in captions]
        before = [
            row
            for row, captions in zip(instructions, rows, strict=bool(instructions))
            for _ in captions
        ]
        self._check_texts(c, each, before)
        found = caption_log_probs(
            self.llm,
            self.prefix(c),
            each,
            instructions=before,
            batching=batching,
            head=self.find_head(),
        )
        return found.view(len(rows), -1)

    def instruction_rows(self, instructions: Sequence[str | None]) -> list[list[int]]:
        """The tokens of each instruction, which a line break ends; none for None."""
        texts = [f"{text}\n" for text in instructions if text is not None]
        rows = iter(self.token_rows(texts, with_end=False) if texts else ())
        return [[] if text is None else next(rows) for text in instructions]

    def _check_texts(
        self, c: Tensor, rows: Sequence[Sequence[int]], instructions: Sequence[Sequence[int]]
    ) -> None:
        before = instructions or [()]
        longest = max(len(i) + len(row) for i, row in zip(cycle(before), rows, strict=False))
        self._check_length(c.shape[1], longest, "max_caption_tokens")

    def padding_share(
        self, num_prefix: int, rows: Sequence[Sequence[int]], *, batching: Batching = "auto"
    ) -> float:
        """Share of padding among the positions that `loss_of_tokens` reads, behind prefixes of Q positions each.

        The tokens of an instruction count as part of the row.
        """
        return padding_share(self.llm, num_prefix, rows, batching)

    def find_head(self) -> nn.Linear | None:
        """The language model's head, if it is a plain linear layer; found out once, with real weights."""
        if self._has_plain_head is None:
            head = plain_head(self.llm)
            if has_numbers(self.llm):
                self._has_plain_head = head is not None
            return head
        found: nn.Linear | None = self.llm.get_output_embeddings() if self._has_plain_head else None
        return found

    # --- inference -------------------------------------------------------------------------------

    @named(Generation)
    def generate(self, c: Tensor, **generation: Unpack[GenerationOptions]) -> list[Caption]:
        """Write captions; see `write`.

        Args:
            c: Context, (B, Q, D).
            **generation: The fields of `Generation`.
        """
        return self.write(c, Generation(**generation))

    @torch.no_grad()
    def write(self, c: Tensor, how: Generation, *, copies: int = 1) -> list[Caption]:
        """Write captions of context (B, Q, D).

        A batch equals single calls; only samples of a beam search depend on the whole batch.

        Args:
            c: Context.
            how: How they are written; its seeds are those of the captions, its prompts those of the contexts.
            copies: N captions of each context, which is read once where the language model allows it.

        Returns:
            B N captions, those of a context one after the other.

        Raises:
            ConfigError: The model does not know the style, or takes no instructions.
        """
        whole_number("copies", copies, 1)
        instructions = self.instruction_rows(self.instructions(how, len(c)))
        lengths = sorted(set(map(len, instructions)))
        if len(lengths) < 2:
            return self._written(self.prefix(c), instructions, how, copies)
        # Contexts whose instructions have the same length share a pass: no padding, so nothing depends on the batch.
        seeds, e = how.seeds(len(c) * copies), self.prefix(c)
        captions: dict[int, list[Caption]] = {}
        for length in lengths:
            rows = [row for row, tokens in enumerate(instructions) if len(tokens) == length]
            own = [seed for row in rows for seed in seeds[row * copies : (row + 1) * copies]]
            found = self._written(
                e[rows], [instructions[row] for row in rows], replace(how, seed=own), copies
            )
            captions |= {row: found[i * copies : (i + 1) * copies] for i, row in enumerate(rows)}
        return [caption for row in range(len(c)) for caption in captions[row]]

    def _written(
        self, e: Tensor, instructions: Sequence[Sequence[int]], how: Generation, copies: int
    ) -> list[Caption]:
        """Captions behind prefixes (B, Q, E) and B instructions of one length."""
        if instructions and instructions[0]:
            ids = torch.tensor(instructions, device=e.device)
            e = torch.cat([e, self.llm.get_input_embeddings()(ids).to(e.dtype)], 1)  # (B, Q + I, E)
        max_new_tokens = how.max_new_tokens
        if max_new_tokens is None:
            max_new_tokens = self.longest_caption(e.shape[1])
        self._check_length(e.shape[1], max_new_tokens, "max_new_tokens")
        end, tokenizer = self._end_id(how.end_token), self._tokenizer()
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        writer = self.writer or OwnWriter(self.llm, records_steps=self.records_steps)
        tidies = how.tidy if how.tidy is not None else not self.config.ends_by_itself
        first = [] if how.schema is None else [self._json_writing.processor(str(how.schema))]

        def write(
            e: Tensor, how: Generation, copies: int, processors: Sequence[LogitsProcessor] = ()
        ) -> list[Caption]:
            writing = Writing(how, max_new_tokens, end, int(pad), [*first, *processors])
            captions = [self._caption(row, end) for row in writer.write(e, writing, copies)]
            if tidies and how.schema is None:
                captions = [replace(x, text=tidy_caption(x.text)) for x in captions]
            return captions

        if how.include or how.exclude:
            return write_with_words(write, e, how, copies, self._token_texts)
        return write(e, how, copies)

    @cached_property
    def _json_writing(self) -> JsonWriting:
        return JsonWriting(self._tokenizer(), len(self.llm.get_input_embeddings().weight))

    @cached_property
    def _token_texts(self) -> TokenTexts:
        return TokenTexts(self._tokenizer())

    def instructions(self, how: Generation, count: int) -> list[str | None]:
        """What is asked for each of `count` contexts; None is the plain caption.

        Raises:
            ConfigError: The model does not know the style, or takes no instructions.
        """
        return instructions_of(how, count, self.config)

    @property
    def styles(self) -> dict[str, str]:
        """Instruction of each style that it was taught, by name."""
        return self.config.styles or {}

    def longest_caption(self, num_prefix: int) -> int:
        """Tokens that fit after a prefix, 300 at most: a model is not asked for positions it was not made for."""
        limit = self.num_positions
        return LONGEST_CAPTION if limit is None else min(LONGEST_CAPTION, limit - num_prefix + 1)

    @property
    def num_positions(self) -> int | None:
        """Positions that the language model was made for, as far as its configuration tells."""
        config = self.config.llm_config.get_text_config()  # type: ignore[union-attr]
        return getattr(config, "max_position_embeddings", None)

    def _check_length(self, num_prefix: int, num_tokens: int, setting: str) -> None:
        """Refuse a sequence that a language model with learnt positions has no positions for.

        Rotary positions have no such end; the last caption token is never read.
        """
        config = self.config.llm_config.get_text_config()  # type: ignore[union-attr]
        limit = self.num_positions
        needed = num_prefix + num_tokens - 1
        if limit and needed > limit and getattr(config, "rope_parameters", None) is None:
            raise ConfigError(
                f"the language model has {limit} positions, but {num_prefix} of the prefix and "
                f"{num_tokens} of the caption need {needed}; set {setting} to at most "
                f"{limit - num_prefix + 1}, or choose another model"
            )

    def _end_id(self, end_token: str | None) -> int:
        tokenizer = self._tokenizer()
        if end_token is None:
            return int(tokenizer.eos_token_id)
        if end_token not in tokenizer.get_vocab():
            raise ConfigError(f"end_token {end_token!r} is no token of the language model")
        return int(tokenizer.get_vocab()[end_token])

    def _caption(self, ids: Sequence[int], end: int) -> Caption:
        """Cut generated ids at the end; what follows it is padding.

        The tokenizer's end token is no part of the caption, another end such as "." is.
        """
        tokenizer = self._tokenizer()
        finished = end in ids
        length = ids.index(end) + (end != tokenizer.eos_token_id) if finished else len(ids)
        text = str(tokenizer.decode([*ids[:length]], skip_special_tokens=True)).strip()
        return Caption(text, length, finished, tuple(ids[:length]))
