"""Miniature models and a judge, so that whole experiments run in seconds."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.evaluation.support import make_inspector
from vlv.endpoint import Endpoint
from vlv.evaluation.experiments.backends import Backends

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

QUICK: dict[str, Any] = {"concurrency": 4, "backoff": 0.001, "max_backoff": 0.01, "retries": 2}


@pytest.fixture(autouse=True)
def read_once(models_read_once: None) -> None:
    """Experiments read a model again and again; what matters here is what they do with it."""


@pytest.fixture(scope="session")
def inspector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspector")
    make_inspector().save_pretrained(folder)
    return folder


@pytest.fixture
def make_backends(tmp_path: Path) -> Callable[..., Backends]:
    """Backends whose endpoints are asked quickly."""

    def make(**options: Any) -> Backends:
        return Backends(batch_size=3, **{"endpoint": partial(Endpoint, **QUICK)} | options)

    return make
