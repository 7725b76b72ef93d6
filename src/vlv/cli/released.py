"""Released models on the command line: asking before a download, and telling how far it is."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tqdm import tqdm

from vlv.cli import common
from vlv.errors import ConfigError
from vlv.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vlv.models.folder import Task
    from vlv.models.released import Plan

_MEGABYTE = 1_000_000


def make_ready(
    name: str, tasks: Sequence[Task] | None, revision: str | None = None, *, yes: bool = False
) -> None:
    """See that a released model is on this machine, and ask before anything is downloaded.

    Args:
        name: One of `released_names`.
        tasks: What it is for; None is all that it can.
        revision: Of the checkpoint's repository.
        yes: Ask nothing.

    Raises:
        ConfigError: The user does not want it, or cannot be asked.
    """
    from vlv.models.released import fetch_released

    with _Download() as download:
        folder = fetch_released(
            name,
            tasks=tasks,
            revision=revision,
            agree=lambda plan: _agree(plan, yes),
            report=download.report,
        )
    if download.began:
        common.say(f"{name} is in {folder}")


def describe(name: str, revision: str | None) -> Iterator[str]:
    """What is known of a released model without asking anybody."""
    from vlv.models.folder import released_folder
    from vlv.models.released import is_cached, known_licence, released_model

    model = released_model(name)
    yield f"{name}  ({model.about})"
    for repo in model.repositories:
        yield f"  {repo}  {known_licence(repo) or 'licence: see its card'}"
    folder = released_folder(name, revision)
    if is_cached(name, revision):
        yield f"in the cache: {folder}"
    else:
        yield f"not on this machine; `vlv caption IMAGE --model {name}` says how large it is, asks, and fetches it"


def _agree(plan: Plan, yes: bool) -> None:
    if not yes and not sys.stdin.isatty():
        raise ConfigError(
            f"{plan.name} has to be downloaded first ({plan.size / 1e9:.2f} GB; licences: {', '.join(plan.licences)}); agree "
            f"with --yes (`vlv caption IMAGE --model {plan.name} --yes`), or in a terminal"
        )
    for line in plan.lines():
        common.say(line)
    if not yes:
        with tqdm.external_write_mode(file=sys.stderr):  # above a progress bar
            sys.stderr.write("Download it under these licences? [y/N]\n")
            sys.stderr.flush()
            answer = sys.stdin.readline()
        if answer.strip().lower() not in {"y", "yes"}:
            raise ConfigError(f"{plan.name} was not downloaded; nothing was done")


class _Download:
    """Progress in megabytes, from the first byte on."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._told = 0

    @property
    def began(self) -> bool:
        """Whether anything came."""
        return self._progress is not None

    def report(self, what: str, done: int, total: int) -> None:
        """So many bytes are here."""
        if self._progress is None:
            self._progress = Progress(total // _MEGABYTE, what=what, unit="megabyte")
        if more := done // _MEGABYTE - self._told:
            self._told += more
            self._progress.advance(more)

    def __enter__(self) -> _Download:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._progress is not None:
            self._progress.close()
