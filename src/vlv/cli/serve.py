"""``vlv serve`` and ``vlv mcp``."""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlv.cli import common
from vlv.cli.engine import EngineOptions
from vlv.cli.options import option_group, options, takes_options
from vlv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlv.models.pipeline import VLVPipeline
    from vlv.search.index import Index
    from vlv.serve.settings import ServeSettings


IndexFolder = Annotated[
    Path | None,
    typer.Option(metavar="INDEX", help="Folder of vlv index build, of this model, to be searched."),
]


@option_group("Address")
class AddressOptions:
    """Where the server is, and who may ask."""

    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every network of this machine.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free.")] = 8000
    no_auth: Annotated[
        bool,
        typer.Option(
            "--no-auth", help="Let everybody ask who reaches the host; keys come from VLV_API_KEYS."
        ),
    ] = False


@option_group("Work")
class WorkOptions:
    """How requests are worked on."""

    batch_size: Annotated[int, typer.Option(min=1, help="Items computed together.")] = 32
    queue_size: Annotated[
        int, typer.Option(min=1, help="Items that may wait; more are refused with 429.")
    ] = 64
    timeout: Annotated[float, typer.Option(help="Seconds from a request to its answer.")] = 60.0
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest caption that may be asked for.")
    ] = 1024
    max_body: Annotated[int, typer.Option(min=1, help="Megabytes of a request.")] = 40
    rate: Annotated[
        float | None, typer.Option(help="Requests a minute that each key may make.")
    ] = None
    fetch_from: Annotated[
        list[str],
        typer.Option(
            metavar="HOST",
            help="Fetch images from this host of the internet, such as *.example.org or * (repeatable); otherwise from none.",
        ),
    ] = field(default_factory=list)
    seed: common.Seed = 0


@options
class ServeOptions:
    """Options of ``vlv serve``."""

    address: AddressOptions
    work: WorkOptions
    model: common.ModelOptions
    index: IndexFolder = None
    engine: EngineOptions

    def settings(self) -> ServeSettings:
        """How the server works."""
        from vlv.serve.settings import Limits, ServeSettings

        given = self.work
        return ServeSettings(
            _shown(self.model),
            batch_size=given.batch_size,
            queue_size=given.queue_size,
            timeout=given.timeout,
            seed=given.seed,
            rate=given.rate,
            fetch_from=tuple(given.fetch_from),
            limits=Limits(tokens=given.max_tokens, body_bytes=given.max_body * 1_000_000),
        )


@takes_options
def serve(given: ServeOptions) -> int:
    """Serve a model over HTTP: captions in OpenAI's chat form, embeddings, images, verification.

    Listens on this machine alone unless told otherwise. SIGTERM or SIGINT ends it when the requests in work are answered.
    """
    _need("serve", "fastapi", "uvicorn", "prometheus_client")
    from vlv.serve.server import serve as run
    from vlv.serve.settings import Keys, check_access
    from vlv.serve.sockets import listen

    settings, keys = given.settings(), Keys.from_environment(os.environ)
    check_access(given.address.host, keys, no_auth=given.address.no_auth)
    placement = given.model.placement()
    given.engine.settings()  # complain now
    open_index = _open_index(given.index)
    listener = listen(given.address.host, given.address.port)
    pipe = given.model.load(None, placement)
    host, port = listener.getsockname()[:2]
    with given.engine.running() as attach:
        attach(pipe)
        index = None if open_index is None else open_index(pipe)
        common.say(f"serving {settings.model} on http://{host}:{port}/v1")
        run(pipe, settings, keys, listener, index)
    return 0


@options
class ToolOptions:
    """Options of ``vlv mcp``."""

    root: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder whose images may be named by path (repeatable); without one only base64."
        ),
    ] = None
    timeout: Annotated[float, typer.Option(help="Seconds from a call to its answer.")] = 120.0
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest caption that may be asked for.")
    ] = 1024
    seed: common.Seed = 0
    index: IndexFolder = None
    model: common.ModelOptions

    def settings(self) -> ServeSettings:
        """How the calls are worked on."""
        from vlv.serve.settings import Limits, ServeSettings

        limits = Limits(tokens=self.max_tokens)
        name = _shown(self.model)
        return ServeSettings(name, timeout=self.timeout, seed=self.seed, limits=limits)


@takes_options
def mcp(given: ToolOptions) -> int:
    """Offer a model's abilities as tools of the Model Context Protocol, on stdin and stdout.

    A client such as an editor or a chat program starts this command itself. Nothing listens on a network.
    """
    _need("mcp", "mcp")
    import asyncio

    from vlv.serve.tools import Roots, ToolServer

    roots, placement = Roots(given.root or ()), given.model.placement()
    open_index = _open_index(given.index)

    def load() -> VLVPipeline:
        return given.model.load(None, placement)

    asyncio.run(ToolServer(load, given.settings(), roots, open_index).serve_stdio())
    return 0


def _open_index(folder: Path | None) -> Callable[[VLVPipeline], Index] | None:
    """What opens an index once its model is loaded; a folder that is none is refused now."""
    if folder is None:
        return None
    _need("search", "usearch")
    from vlv.search.index import Index
    from vlv.search.store import check_finished

    check_finished(folder)
    return functools.partial(Index.open, folder)


def _need(extra: str, *packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            raise ConfigError(
                f'this needs the package {package}: pip install "vlv[{extra}]"'
            ) from None


def _shown(model: common.ModelOptions) -> str:
    """The name under which a model is served: of a folder only the last part."""
    from vlv.models.adapter import adapted_name

    names = [
        name if name is None or not Path(name).is_dir() else Path(name).resolve().name
        for name in (model.model, model.adapter)
    ]
    return adapted_name(str(names[0]), names[1])
