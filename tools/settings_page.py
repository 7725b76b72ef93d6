"""The table of settings, written from the configuration itself."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from vlv.config import LoraConfig, Stage1Run, Stage2Run, Stage3Run, preset_names
from vlv.curation import settings as filters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic.fields import FieldInfo

_HEAD = """\
<!-- Written by `make pages`. Do not edit: change the docstrings in src/vlv/config_sections.py and config_stages.py, and run the command again. -->

# Settings of a training run

A run is one YAML file, or a preset of the package: {presets}.

Any value is changed on the command line by its full name, such as `--set optim.lr=1e-4`. Unknown names, values of the
wrong type and settings that would have no effect are refused. The resolved settings are kept in the run folder as
`config.yaml`. What they do is told in [training](training.md).
"""


_FILTER_HEAD = """\
# Settings of `vlv data filter`

A YAML file, or a preset of the package: {presets}; changed with `--set short_side_above=255`. What they do is told in
[datasets](datasets.md).

"""

_FILTER_SECTIONS: dict[str, type[BaseModel]] = {
    "watermark, nsfw, aesthetic": filters.ScoreRule,
    "embedding_duplicates": filters.EmbeddingRule,
    "caption_score": filters.CaptionRule,
}

_FIELDS = Stage1Run.model_fields | Stage2Run.model_fields | Stage3Run.model_fields

_TABLE_HEAD = "| setting | type | default | meaning |\n|---|---|---|---|\n"


def settings_page() -> str:
    """All settings as Markdown, one table for each section of the configuration."""
    presets = ", ".join(f"`{name}`" for name in preset_names())
    parts = [_HEAD.format(presets=presets)]
    parts.append("`stage` (`stage1`, `stage2` or `stage3`): which of the three.\n")
    for name, field in _FIELDS.items():
        if sections := list(_sections_of(field.annotation)):
            rows = dict.fromkeys(row for kind in sections for row in _rows(f"{name}.", kind))
            parts.append(f"## {name}\n\n{field.description}\n\n{_TABLE_HEAD}" + "".join(rows))
    return "\n".join([*parts, *_filter_tables()])


def _filter_tables() -> Iterator[str]:
    """The rules of `vlv data filter`, and the two kinds of rule that have settings of their own."""
    presets = ", ".join(f"`{name}`" for name in filters.preset_names())
    yield (
        _FILTER_HEAD.format(presets=presets)
        + _TABLE_HEAD
        + "".join(_rows("", filters.FilterConfig))
    )
    for title, kind in _FILTER_SECTIONS.items():
        yield f"## {title}\n\n{kind.__doc__}\n\n{_TABLE_HEAD}" + "".join(_rows("", kind))


def _rows(prefix: str, section: type[BaseModel]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        meaning = (field.description or "").replace("|", "\\|")
        yield f"| `{prefix}{name}` | {_name(field.annotation)} | {_default(field)} | {meaning} |\n"
        if LoraConfig in _sections_of(field.annotation):
            yield from _rows(f"{prefix}{name}.", LoraConfig)


def _sections_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings classes that an annotation names, alone or in a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_of(part)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "null"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _name(annotation: Any) -> str:
    """A type in plain words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (types.UnionType, Union):
        return " or ".join(_name(choice) for choice in inner)
    if origin in (list, tuple):
        return f"list of {_name(inner[0])}"
    if origin is dict:
        return f"mapping of {_name(inner[0])} to {_name(inner[1])}"
    if hasattr(annotation, "__metadata__"):  # Annotated[int, Gt(0)]
        return _name(annotation.__origin__)
    if annotation is type(None):
        return "null"
    if annotation is LoraConfig:
        return "settings"
    if annotation in _FILTER_SECTIONS.values():
        return "settings, see below"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        annotation.__name__, "path, or {path, subfolder, revision, variant}"
    )


def main(arguments: list[str]) -> int:
    """Write the page to the file named, docs/settings.md by default."""
    (page,) = arguments or ["docs/settings.md"]
    Path(page).write_text(settings_page(), encoding="utf-8")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
