"""``vlv ui``."""

from __future__ import annotations

import importlib
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from vlv.cli import common
from vlv.cli.options import options, takes_options
from vlv.errors import ConfigError


@options
class UiOptions:
    """Options of ``vlv ui``."""

    folder: Annotated[
        str | None,
        typer.Argument(help="Folder of images to open; others can be opened in the page."),
    ] = None
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free.")] = 7860
    work_dir: Annotated[
        Path, typer.Option(help="Folder for dropped images, reconstructions and mixes.")
    ] = Path("vlv-ui")
    index: Annotated[
        Path | None,
        typer.Option(help="Index of vlv index build, for the Search tab."),
    ] = None
    browse: Annotated[
        bool, typer.Option("--open", help="Open the page in the default browser.")
    ] = False
    model: common.ModelOptions


@takes_options
def ui(given: UiOptions) -> int:
    """Caption, reconstruct, mix and judge in the browser, on this machine alone.

    Prints the address to be opened; it holds a secret, so that nobody else on this machine can use it. Captions are saved at once,
    as vlv caption writes them. SIGTERM or SIGINT ends it; what is finished is kept.
    """
    for package in ("gradio", "fastapi", "uvicorn"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise ConfigError(f'the workbench needs {package}: pip install "vlv[ui]"') from None
    from vlv.serve.sockets import listen
    from vlv.ui.commands import ModelFlags
    from vlv.ui.desk import Desk
    from vlv.ui.searching import SearchableIndex
    from vlv.ui.server import Server
    from vlv.ui.workbench import Workbench

    model, placement = given.model, given.model.placement()
    flags = ModelFlags(model.model, model.revision, model.adapter, model.device, model.dtype)
    folder = None if given.folder is None else str(Path(given.folder).absolute())
    index = None if given.index is None else SearchableIndex(given.index.absolute())
    listener = listen("127.0.0.1", given.port)
    desk = Desk(lambda: model.load(None, placement))
    dtype, work_dir = common.dtype_name(placement), given.work_dir.absolute()
    bench = Workbench(desk, flags, dtype, work_dir, index)
    server = Server(bench, listener, folder)
    desk.preload()
    common.say(f"open {server.url} in your browser; Ctrl-C ends it, and what is saved is kept")
    if given.browse:
        webbrowser.open(server.url)
    server.serve_until_signal()
    return 0
