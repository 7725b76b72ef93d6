"""Options objects, and what every command has in common."""

from __future__ import annotations

import ast
import inspect
import io
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

import vlv.cli
from tests.cli.conftest import Vlv
from vlv.cli import common
from vlv.cli.options import changed, option_group, options, takes_options


@option_group("Colours")
class Colours:
    red: Annotated[int, typer.Option(help="How red.")] = 1
    names: Annotated[list[str], typer.Option("--name", "-n")] = field(default_factory=list)


@options
class Given:
    where: Annotated[Path, typer.Argument()]
    must: Annotated[str, typer.Option("--must")]
    colours: Colours


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @takes_options
    def show(given: Given) -> int:
        """Show what was given."""
        typer.echo(repr(given))
        return 0

    return app


def test_fields_and_groups_become_options(app: typer.Typer) -> None:
    result = CliRunner().invoke(
        app, ["here", "--must", "x", "--red", "3", "-n", "a", "--name", "b"]
    )
    expected = Given(where=Path("here"), must="x", colours=Colours(red=3, names=["a", "b"]))
    assert result.stdout.strip() == repr(expected)
    bare = CliRunner().invoke(app, ["here", "--must", "x"])
    assert bare.stdout.strip() == repr(Given(where=Path("here"), must="x", colours=Colours()))
    assert CliRunner().invoke(app, ["here"]).exit_code == 2, "an option without a default is needed"


def test_help_shows_the_groups(app: typer.Typer) -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    assert "Show what was given." in text
    assert "Colours" in text
    assert text.index("--must") < text.index("Colours") < text.index("--red")


def test_changed_names_the_flags() -> None:
    assert changed(Colours()) == []
    assert changed(Colours(red=2, names=["x"])) == ["--red", "--name"]
    assert changed(common.EndpointOptions(endpoint_settings=["timeout=1"])) == ["--set"]


@pytest.mark.parametrize("arguments", [(), ("data",), ("toyworld",)])
def test_no_arguments_show_the_help(vlv: Vlv, arguments: tuple[str, ...]) -> None:
    result = vlv(*arguments)
    assert (result.code, result.err) == (0, "")
    assert "Usage: vlv" in result.out


@pytest.mark.parametrize(
    ("command", "panels"),
    [
        (("caption",), ("Images", "Output", "Words", "Decoding", "Model and device")),
        (("generate",), ("Sampling", "Model and device")),
        (("data", "caption"), ("Teacher", "Endpoint", "Output")),
        (("data", "pack"), ("Shards", "Processes")),
    ],
)
def test_groups_are_shown(vlv: Vlv, command: tuple[str, ...], panels: tuple[str, ...]) -> None:
    text = vlv(*command, "--help").out
    for panel in panels:
        assert f"─ {panel} ─" in text


def test_no_command_function_has_many_parameters() -> None:
    for path in Path(vlv.cli.__file__).parent.glob("*.py"):
        if path.stem in {"evaluate", "experiments", "ablation"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                count = len(node.args.args) + len(node.args.kwonlyargs)
                assert count < 10, f"{path.name}: {node.name} has {count} parameters"


class Terminal(io.StringIO):
    """Standard error of somebody who watches."""

    def isatty(self) -> bool:
        return True


def test_a_line_every_thirty_seconds_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("vlv.progress.time.monotonic", lambda: now)
    with common.Progress(100) as progress:
        for second in range(70):
            now = float(second)
            progress.report([None])
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "progress: 31/100 images, 1/s, about 01:09 left",
        "progress: 61/100 images, 1/s, about 00:39 left",
    ]


def test_notes_do_not_run_into_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with common.Progress(3) as progress:
        common.say("note: first")
        progress.report([None, "bad.png: it is broken", None])
    shown = [line.rsplit("\r", 1)[-1] for line in screen.getvalue().split("\n")]
    assert "note: first" in shown
    assert "failed: bad.png: it is broken" in shown
    assert any("3/3" in line for line in shown)


def test_warnings_of_vlv_are_lines_on_stderr() -> None:
    code = "import logging, vlv.cli; vlv.cli.run([]); logging.getLogger('vlv.x').warning('careful')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "careful\n"


def commands_of(app: typer.Typer, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words."""
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
        yield (*words, name), command.callback
    for group in app.registered_groups:
        inner = group.typer_instance
        assert inner is not None
        yield from commands_of(inner, *words, str(inner.info.name))


def numeric_options() -> Iterator[tuple[tuple[str, ...], list[str], str, str]]:
    """Each option that is a number: command, what this needs besides, flag and kind."""
    for words, command in commands_of(vlv.cli.app):
        parameters = inspect.signature(command).parameters.values()
        hints = {p.name: p.annotation for p in parameters}
        if any(isinstance(hint, str) for hint in hints.values()):
            hints = get_type_hints(command, include_extras=True)
        infos = {name: get_args(hint) for name, hint in hints.items() if get_args(hint)}
        flags = {
            name: next(
                (x for x in (info.default, *(info.param_decls or ())) if str(x).startswith("--")),
                f"--{name.replace('_', '-')}",
            )
            for name, (_, info) in infos.items()
            if isinstance(info, typer.models.OptionInfo)
        }
        needed: list[str] = []
        for parameter in parameters:
            if parameter.default is inspect.Parameter.empty:
                needed += [*([flags[parameter.name]] if parameter.name in flags else []), "5"]
        for name in flags:
            kinds = {infos[name][0], *get_args(infos[name][0])} & {int, float}
            yield from ((words, needed, flags[name], kind.__name__) for kind in kinds)


@pytest.mark.slow
def test_a_silly_number_of_any_option_is_one_sentence(vlv: Vlv) -> None:
    """Infinity passes the bounds of Typer, as NaN does, and a whole number may be of any length."""
    seen = 0
    for words, needed, flag, kind in numeric_options():
        for value in ("nan", "inf") if kind == "float" else ("9" * 40,):
            result = vlv(*words, *needed, flag, value)
            assert result.code == 1, (words, flag, value)
            assert flag.strip("-") in result.err.replace("_", "-"), (words, flag, value, result.err)
            seen += 1
    assert seen > 100
