"""One typed options object per command, and the groups of options that commands share.

A command takes one dataclass; its fields become the options and arguments that Typer shows:

    @options
    class EmbedOptions:
        inputs: InputOptions                    # a group, flattened in place
        output: Annotated[Path, typer.Option("--output", "-o", help="FILE.safetensors")]
        batch_size: BatchSize = 16

    @app.command()
    @takes_options
    def embed(given: EmbedOptions) -> int: ...

A field that is itself such a class is a group. Its options appear under the panel that the group names.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import typer

from vlv.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

_LARGEST = 2**63 - 1


@dataclass_transform(kw_only_default=True, frozen_default=True)
def options(cls: type[T]) -> type[T]:
    """Make a class an options object: a frozen dataclass with keyword-only fields."""
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def option_group(panel: str) -> Callable[[type[T]], type[T]]:
    """Make a class a group of options that ``--help`` shows together under a heading."""

    def decorate(cls: type[T]) -> type[T]:
        cls.__panel__ = panel  # type: ignore[attr-defined]
        return options(cls)

    return decorate


def takes_options(command: Callable[[T], int]) -> Callable[..., int]:
    """Turn a command that takes one options object into one whose parameters Typer can read."""
    (name,) = inspect.signature(command).parameters
    cls = get_type_hints(command)[name]

    def flat(**values: Any) -> int:
        return command(_build(cls, values))

    flat.__signature__ = inspect.Signature(list(_parameters(cls)))  # type: ignore[attr-defined]
    flat.__annotations__ = {}
    flat.__name__, flat.__doc__ = command.__name__, command.__doc__
    return flat


def takes_numbers(command: Callable[..., int]) -> Callable[..., int]:
    """Refuse NaN, infinity and numbers of any length for a command without an options object, which has it from there."""

    @functools.wraps(command)
    def call(**values: Any) -> int:
        return command(**{x: _sane(v, f"--{x.replace('_', '-')}") for x, v in values.items()})

    return call


def changed(group: DataclassInstance) -> list[str]:
    """Options of a group that differ from their defaults, as they are written on the command line."""
    hints = get_type_hints(type(group), include_extras=True)
    return [
        _flag(field.name, hints[field.name])
        for field in dataclasses.fields(group)
        if getattr(group, field.name) != _default(field)
    ]


def _parameters(cls: type, panel: str | None = None) -> Iterator[inspect.Parameter]:
    panel = getattr(cls, "__panel__", panel)
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _parameters(hint, panel)  # type: ignore[arg-type]
        else:
            yield inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_default(field),
                annotation=_under(panel, hint),
            )


def _build(cls: type[T], values: Mapping[str, Any]) -> T:
    hints = get_type_hints(cls, include_extras=True)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    return cls(
        **{
            field.name: _build(hints[field.name], values)
            if dataclasses.is_dataclass(hints[field.name])
            else _sane(values[field.name], _flag(field.name, hints[field.name]))
            for field in fields
        }
    )


def _sane(value: T, flag: str) -> T:
    """The value of an option; Typer takes NaN and infinity for numbers within any bounds, and integers of any length."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigError(f"{flag} is {number}; give a finite number")
        if isinstance(number, int) and abs(number) > _LARGEST:
            raise ConfigError(f"{flag} is {str(number)[:30]}; give a smaller number")
    return value


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty


def _under(panel: str | None, hint: Any) -> Any:
    """The annotation of an option with its panel filled in; one that names a panel itself keeps it."""
    if panel is None or get_origin(hint) is not Annotated:
        return hint
    kind, info = get_args(hint)
    if isinstance(info, typer.models.OptionInfo) and info.rich_help_panel is None:
        info = copy(info)
        info.rich_help_panel = panel
    return Annotated[kind, info]


def _flag(name: str, hint: Any) -> str:
    info = get_args(hint)[1]
    flags = [info.default, *(info.param_decls or ())]
    return next((str(f) for f in flags if str(f).startswith("--")), f"--{name.replace('_', '-')}")
