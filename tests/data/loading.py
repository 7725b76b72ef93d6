"""Loaders from flat arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from vlv.data.loader import Listed, Loader, LoaderSettings, Streamed
from vlv.data.parts import Part
from vlv.data.records import Record

_SETTINGS = {field.name for field in fields(LoaderSettings)}
_LOADER = {"rank", "num_ranks", "quarantine", "on_bad"}


def listed(
    records: Sequence[Record], batch_size: int, image_size: int | None, **options: Any
) -> Loader:
    return _loader(Listed, records, batch_size, image_size, options)


def streamed(
    shards: Sequence[Part], batch_size: int, image_size: int | None, **options: Any
) -> Loader:
    return _loader(Streamed, shards, batch_size, image_size, options)


def _loader(
    kind: Any, what: Any, batch_size: int, image_size: int | None, options: dict[str, Any]
) -> Loader:
    settings = {k: v for k, v in options.items() if k in _SETTINGS}
    own = {k: v for k, v in options.items() if k in _LOADER}
    rest = {k: v for k, v in options.items() if k not in settings | own}
    settings |= {"batch_size": batch_size, "image_size": image_size}
    return Loader(kind(what, **rest), LoaderSettings(**settings), **own)
