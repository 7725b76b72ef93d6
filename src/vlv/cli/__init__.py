"""The ``vlv`` command: parses, calls one public function, prints.

Data go to stdout or to files, everything else to stderr. Exit codes: 0 all done, 1 wrong usage, settings
or files, 2 finished with failed items, 75 training was preempted (SIGTERM or SIGUSR1) and has saved its state, 130
interrupted in a clean state. A second signal ends training at once: 130, or 128 + its number.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer.main import get_command

from vlv import __version__
from vlv.cli import (
    ask,
    caption,
    common,
    convert,
    data,
    demo,
    embed,
    evaluate,
    images,
    info,
    push,
    search,
    serve,
    toyworld,
    train,
    ui,
    verify,
)
from vlv.errors import VLVError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

app = typer.Typer(
    name="vlv",
    help="Turn images into caption embeddings, and those into images and captions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlv {__version__}")
        raise typer.Exit


app.command()(caption.caption)
app.command()(ask.ask)
app.command()(verify.verify)
app.command()(images.reconstruct)
app.command()(images.generate)
app.command()(images.mix)
app.command()(embed.embed)
app.command()(search.search)
app.command()(demo.demo)
app.command()(info.info)
app.command()(train.train)
app.command()(train.summary)
app.command()(push.push)
app.command()(serve.serve)
app.command()(serve.mcp)
app.command()(ui.ui)
app.command()(info.doctor)
app.add_typer(search.app)
app.add_typer(data.app)
app.add_typer(evaluate.app)
app.add_typer(toyworld.app)
app.add_typer(convert.app)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Turn images into caption embeddings, and those into images and captions."""


@cache
def _parser() -> Callable[..., int | None]:
    """All commands; made once, which takes a tenth of a second."""
    return get_command(app)


def run(arguments: Sequence[str]) -> int:
    """Carry out one command line; return the exit code.

    >>> run(["--no-such-option"])
    1
    """
    common.quieten()
    common.share_processor()
    try:
        code = _parser()(args=list(arguments), prog_name="vlv", standalone_mode=False)
        sys.stdout.flush()
    except VLVError as error:
        if common.is_to_be_told(error):
            common.complain(str(error))
        return 1
    except OSError as error:
        common.complain(_of_system(error))
        _let_go_of_stdout()
        return 1
    except MemoryError:
        common.complain("the memory of this machine is used up; take a smaller batch or model")
        return 1
    except typer.TyperException as error:
        message = error.format_message()
        if not message:  # nothing was asked for, so the help was shown
            return 0
        context = getattr(error, "ctx", None)
        command = "vlv" if context is None else context.command_path
        common.complain(f"{message} (see {command} --help)")
        return 1
    if code == INTERRUPTED:
        common.say("vlv: interrupted")
    return int(code or 0)


def _of_system(error: OSError) -> str:
    """What the system refuses, where no step of the command has words of its own for it."""
    what = error.filename or "the output"
    reason = error.strerror or error
    return f"{what} cannot be read or written ({reason}); what is finished is kept, and the same command goes on"


def _let_go_of_stdout() -> None:
    """Where nothing more can be printed, Python would complain of it once more when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


INTERRUPTED = 130


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Entry point of the ``vlv`` script."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))
