"""A writer of captions that asks an engine; callers do not know it from our own loop.

Shapes: B prefixes, N captions of each, Q positions, E language-model width.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import torch

from vlv.endpoint.transport import PassingError
from vlv.engine.connection import Connection, LostError
from vlv.engine.folder import engine_cache, saved_language_model
from vlv.engine.process import EngineProcess, not_ready
from vlv.engine.requests import CaptionRequest, encoded
from vlv.engine.weights import FollowedWeights
from vlv.errors import ConfigError, EndpointError
from vlv.progress import say

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from vlv.engine.settings import EngineSettings
    from vlv.models.captioner import CaptionDecoder
    from vlv.models.decoding import Generation
    from vlv.models.writers import Writing

LONGEST = 8192
"""Positions that an engine is started with, at most."""
_TELL_EVERY = 30.0
_LOOK_EVERY = 0.25
_MAX_SEED = 2**63


class EngineWriter:
    """Writes captions with an engine that has a caption decoder's language model.

    A context: the engine is there within it. One that ends meanwhile is started again, once for each call of `write`, and asked
    for what is missing.

    Args:
        decoder: The caption decoder.
        folder: Its language model, see `saved_language_model`.
        settings: Where the engine is.
        device: Where one of our own works.
        dtype: In which it computes; None is that of the language model.
        follow: Whether it gets the weights again when they have changed.
    """

    def __init__(
        self,
        decoder: CaptionDecoder,
        folder: Path,
        settings: EngineSettings,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        follow: bool = False,
    ) -> None:
        self._settings, self._name = settings, folder.name
        weights = decoder.llm.get_input_embeddings().weight
        self._width, self._vocabulary = int(weights.shape[1]), int(weights.shape[0])
        limit = decoder.num_positions
        self._max_length = LONGEST if limit is None else min(LONGEST, limit + 1)
        self._dtype = dtype or weights.dtype
        self._followed = FollowedWeights(decoder.llm, self._dtype) if follow else None
        self._arguments = _arguments(folder, self._dtype, self._max_length)
        self._process: EngineProcess | None = None
        if settings.python is not None:
            arguments = [*self._arguments, *_arguments_on(device), *settings.arguments]
            logs = engine_cache() / "logs"
            self._process = EngineProcess(
                settings.python, arguments, logs, device, takes_weights=follow
            )
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *rest: object) -> None:
        self.close()

    def __deepcopy__(self, memo: object) -> EngineWriter:
        """A copy of the decoder has the same engine."""
        return self

    def close(self) -> None:
        """Leave the engine, and end one of our own."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.stop()

    # --- start -----------------------------------------------------------------------------------

    def _start(self) -> None:
        process = self._process
        if process is None:
            endpoint = self._settings.endpoint(self._name)
            self._connection = Connection(endpoint)
            self._check_served(self._connection, endpoint.base_url)
            return
        process.start()
        if self._followed is not None:
            self._followed.engine_began()
        endpoint = self._settings.endpoint(self._name, process.url)
        self._connection = Connection(endpoint, process.key, lambda: process.has_ended)
        self._await(process, self._connection)

    def _check_served(self, connection: Connection, url: str) -> None:
        try:
            served = connection.served()
        except PassingError as error:
            raise EndpointError(
                f"{error.reason}; is the engine running, and the address right?"
            ) from error
        if self._name not in served.names:
            raise ConfigError(
                f"the engine at {url} serves {', '.join(served.names) or 'nothing'}, and not the language model of this "
                f"model; start it with: VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 vllm {' '.join(self._arguments)}"
            )
        self._max_length = served.max_length or self._max_length

    def _await(self, process: EngineProcess, connection: Connection) -> None:
        """Wait until an engine of our own is ready, and tell that we do."""
        say(f"starting the engine; its log is {process.log}")
        began = told = time.monotonic()
        while True:
            try:
                served = connection.served()
            except PassingError as error:
                seconds = time.monotonic() - began
                if process.has_ended or seconds > self._settings.wait:
                    raise not_ready(process, self._settings.wait) from error
                if time.monotonic() - told > _TELL_EVERY:
                    told = time.monotonic()
                    say(f"the engine is starting, {seconds:.0f} s so far: {process.says()}")
                time.sleep(_LOOK_EVERY)
            else:
                self._max_length = served.max_length or self._max_length
                say(f"the engine is ready after {time.monotonic() - began:.1f} s")
                return

    # --- captions --------------------------------------------------------------------------------

    def write(self, prefix: Tensor, writing: Writing, copies: int) -> Sequence[Sequence[int]]:
        """See `Writer`.

        Raises:
            ConfigError: The engine cannot write so, or the prefix holds what is no number.
            EndpointError: It does not write.
        """
        check_engine_writes(writing.how)
        self._check(prefix, writing)
        seeds = writing.how.seeds(len(prefix) * copies)
        texts = [encoded(row) for row in prefix.to(self._dtype)]
        plain = replace(writing, how=replace(writing.how, seed=0))
        requests = {
            number: CaptionRequest(
                texts[number // copies], plain, seed % _MAX_SEED, self._vocabulary
            )
            for number, seed in enumerate(seeds)
        }
        written: dict[int, list[int]] = {}
        self._ask(requests, written)
        return [written[number] for number in range(len(seeds))]

    def _ask(self, requests: dict[int, CaptionRequest], written: dict[int, list[int]]) -> None:
        """Fill in what is missing, with a second engine where the first one ends."""
        for is_last in (False, True):
            left = {k: v for k, v in requests.items() if k not in written}
            try:
                self._renewed().ask(left, written.__setitem__)
            except LostError as lost:
                process = self._process
                assert process is not None, "only an engine of our own is known to have ended"
                if is_last:
                    raise EndpointError(
                        f"the engine ended again; its last line: {process.why()}"
                    ) from lost
                missing = len(requests) - len(written)
                say(
                    f"the engine ended, and is started again for {missing} captions; its last line: {process.why()}"
                )
                self.close()
                self._start()
            else:
                return

    def _renewed(self) -> Connection:
        """The connection to an engine that has the weights of now; started where the last start failed."""
        if self._connection is None:
            self._start()
        assert self._connection is not None
        if self._followed is not None and not self._followed.are_known:
            with self._followed.saved() as folder:
                self._connection.reload(folder)
        return self._connection

    def _check(self, prefix: Tensor, writing: Writing) -> None:
        """Refuse what an engine would answer with nonsense, or with an error in its own words."""
        if prefix.ndim != 3 or prefix.shape[2] != self._width:
            raise ConfigError(
                f"a prefix is (B, Q, {self._width}) for this engine, not {tuple(prefix.shape)}"
            )
        finite = prefix.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            number = int((~finite).int().argmax()) + 1
            raise ConfigError(
                f"the prefix of caption {number} of {len(prefix)} holds NaN or infinity, from which an engine writes "
                "nothing; is the model broken, or its dtype too small (--dtype float32)?"
            )
        needed = prefix.shape[1] + writing.max_new_tokens
        if needed > self._max_length:
            raise ConfigError(
                f"the engine has {self._max_length} positions, but {prefix.shape[1]} of the prefix and "
                f"{writing.max_new_tokens} of the caption need {needed}; set max_new_tokens to at most "
                f"{self._max_length - prefix.shape[1]}"
            )


def check_engine_writes(how: Generation) -> None:
    """Refuse what only our own loop does.

    Raises:
        ConfigError: It is a beam search, has a penalty of repetitions, words to include or to exclude, or a schema.
    """
    if how.include or how.exclude or how.schema is not None:
        raise ConfigError(
            "an engine takes no words to include or exclude and no schema; leave them out, or the engine"
        )
    if how.num_beams > 1 or how.repetition_penalty != 1.0:
        raise ConfigError(
            "an engine writes greedily or samples; leave num_beams and repetition_penalty at 1, or the engine out"
        )


def _arguments(folder: Path, dtype: torch.dtype, max_length: int) -> list[str]:
    name = str(dtype).removeprefix("torch.")
    return [
        *("serve", str(folder), "--served-model-name", folder.name),
        *("--enable-prompt-embeds", "--generation-config", "vllm"),
        *("--dtype", name, "--max-model-len", str(max_length)),
    ]


def _arguments_on(device: torch.device) -> list[str]:
    """Compiling takes minutes that a CPU does not win back; on a GPU there must be room for our encoder."""
    if device.type == "cuda":
        return ["--gpu-memory-utilization", "0.8"]
    return ["--enforce-eager"]


@contextmanager
def engine_writes(
    decoder: CaptionDecoder,
    settings: EngineSettings,
    *,
    release: bool = False,
    dtype: torch.dtype | None = None,
    follow: bool = False,
) -> Iterator[None]:
    """Let an engine write what a caption decoder writes, as long as the block lasts.

    Args:
        decoder: Encodes and projects as before.
        settings: Where the engine is.
        release: Free the memory of the language model here, for good: the decoder cannot write without the engine then.
        dtype: In which the engine computes; None is that of the language model.
        follow: Give the engine the weights again whenever they have changed, for a language model that trains.

    Raises:
        EndpointError: The engine cannot be started or reached.
        ConfigError: It has another model.
        OutputError: The language model cannot be written to the cache.
    """
    folder, device = saved_language_model(decoder, untied=follow), decoder.llm.device
    if release:
        embeddings = copy.deepcopy(decoder.llm.get_input_embeddings())
        decoder.llm.to("meta")
        if decoder.config.takes_instructions:  # instructions are embedded here
            decoder.llm.set_input_embeddings(embeddings)
        del embeddings
        torch.cuda.empty_cache()  # the engine takes what is free
    with EngineWriter(decoder, folder, settings, device, dtype=dtype, follow=follow) as writer:
        decoder.writer = writer
        try:
            yield
        finally:
            decoder.writer = None
