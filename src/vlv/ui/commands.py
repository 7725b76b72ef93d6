"""The command line that does the same as a click."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlv.models.adapter import adapted_name

if TYPE_CHECKING:
    from vlv.jobs.images import MixSettings, SampleSettings


@dataclass(frozen=True)
class ModelFlags:
    """How the workbench was told which model to use.

    Attributes:
        model: Its name or folder.
        revision: On the hub.
        adapter: Its folder, or id on the hub.
        device: As typed.
        dtype: As typed.
    """

    model: str = "vlv-tiny"
    revision: str | None = None
    adapter: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    @property
    def name(self) -> str:
        """What results say that they were made with."""
        return adapted_name(self.model, self.adapter)

    def words(self) -> list[str]:
        """As options."""
        return options(
            [
                ("--model", self.model, "vlv-tiny"),
                ("--revision", self.revision, None),
                ("--adapter", self.adapter, None),
                ("--device", self.device, "auto"),
                ("--dtype", self.dtype, "auto"),
            ]
        )


def options(given: Iterable[tuple[str, object, object]]) -> list[str]:
    """Options whose value is not the default.

    >>> options([("--seed", 3, 0), ("--steps", 20, 20), ("--prefix", "-a", None)])
    ['--seed', '3', '--prefix=-a']
    """
    words: list[str] = []
    for name, value, default in given:
        if value == default:
            continue
        text = f"{value:g}" if isinstance(value, float) else str(value)
        words += [f"{name}={text}"] if text.startswith("-") or not text else [name, text]
    return words


def command(*words: str) -> str:
    """Words as one line for the shell.

    >>> command("vlv", "caption", "my images")
    "vlv caption 'my images'"
    """
    return shlex.join(words)


def inputs(names: Sequence[str]) -> list[str]:
    """Paths as arguments, which must not look like options.

    >>> inputs(["a.png", "-b.png"])
    ['a.png', './-b.png']
    """
    return [f"./{name}" if name.startswith("-") else name for name in names]


def sampling(settings: SampleSettings) -> list[str]:
    """Options of how images are sampled."""
    return options(
        [
            ("--steps", settings.steps, 20),
            ("--guidance", settings.guidance, 2.0),
            ("--sampler", settings.sampler, "dpm"),
            ("--seed", settings.seed, 0),
        ]
    )


def mixing(how: MixSettings) -> list[str]:
    """Options of how embeddings are mixed."""
    listed = [
        ",".join(f"{number:g}" for number in numbers) if numbers is not None else None
        for numbers in (how.keep, how.weights)
    ]
    mode = None if how.keep is not None or (how.weights and how.mode == "average") else how.mode
    return options(
        [("--mode", mode, None), ("--keep", listed[0], None), ("--weights", listed[1], None)]
    )
