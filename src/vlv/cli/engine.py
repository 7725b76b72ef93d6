"""Options of commands whose captions an engine may write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlv.cli.options import changed, option_group
from vlv.errors import ConfigError

if TYPE_CHECKING:
    from vlv.engine import EngineSettings
    from vlv.models.pipeline import VLVPipeline


@option_group("Engine")
class EngineOptions:
    """Who writes the captions."""

    engine: Annotated[
        Literal["vllm"] | None,
        typer.Option(
            help="Let vLLM write behind the prefixes that this process makes; by default, it writes itself."
        ),
    ] = None
    engine_python: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Interpreter of an environment with vLLM, which is started and ended.",
        ),
    ] = None
    engine_url: Annotated[
        str | None,
        typer.Option(help="Address of a running one instead: http://127.0.0.1:8001/v1."),
    ] = None
    engine_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the key of that address.")
    ] = None
    engine_arg: Annotated[
        list[str],
        typer.Option(
            metavar="ARG",
            help="Argument of vllm serve: --engine-arg=--tensor-parallel-size=2 (repeatable).",
        ),
    ] = field(default_factory=list)

    def settings(self) -> EngineSettings | None:
        """Where the engine is; None where this process writes.

        Raises:
            ConfigError: An option has no effect, or one is missing.
        """
        if self.engine is None:
            if given := changed(self):
                raise ConfigError(f"{given[0]} has no effect without --engine vllm")
            return None
        from vlv.engine import EngineSettings

        return EngineSettings(
            self.engine_python, self.engine_url, self.engine_key_env, tuple(self.engine_arg)
        )

    @contextmanager
    def running(self) -> Iterator[Callable[[VLVPipeline], VLVPipeline]]:
        """A function that lets the engine, if one is wanted, write for a pipeline as long as the block lasts."""
        settings = self.settings()
        with ExitStack() as engines:

            def attach(pipe: VLVPipeline) -> VLVPipeline:
                if settings is not None:
                    from vlv.engine import engine_writes
                    from vlv.models.arguments import present

                    decoder = present(pipe.caption_decoder, "caption_decoder")
                    release = pipe.offload_device is None
                    engines.enter_context(engine_writes(decoder, settings, release=release))
                return pipe

            yield attach
